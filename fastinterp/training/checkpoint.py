"""Checkpoints that are either whole or not there.

A checkpoint is a folder ``step-00000123`` with ``model.safetensors`` and ``state.pt``, filled under
another name, flushed to disk and then renamed. Whatever moment a run is killed at, the newest
``step-*`` folder is complete.
"""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fastinterp._files import TEMPORARY, sync, write_atomically


def save_model(model: nn.Module, path: Path) -> None:
    """Writes the model's state_dict as safetensors, atomically."""
    write_atomically(path, lambda temporary: save_file(model.state_dict(), temporary))


def save(folder: Path, step: int, model: nn.Module, state: dict) -> Path:
    """Writes checkpoint ``step`` below ``folder`` and removes older ones.

    Args:
        folder: created if missing.
        step: number of finished steps.
        model: its state_dict is written as safetensors.
        state: tensors, numbers, strings and containers of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    if final.exists():
        return final
    temporary = folder / (TEMPORARY + final.name)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file(model.state_dict(), temporary / "model.safetensors")
    torch.save(state, temporary / "state.pt")
    for part in ("model.safetensors", "state.pt"):
        sync(temporary / part)
    os.replace(temporary, final)
    sync(folder)
    for other in (*folder.glob("step-*"), *folder.glob(f"{TEMPORARY}*")):
        if other != final:
            shutil.rmtree(other)
    return final


def latest(folder: Path) -> Path | None:
    """The newest checkpoint below ``folder``, or None."""
    return max(folder.glob("step-*"), default=None)


def load(checkpoint: Path, model: nn.Module) -> dict:
    """Loads the weights into ``model`` and returns the state.

    Raises:
        ValueError: a file is damaged or belongs to another network.
    """
    try:
        weights = load_file(checkpoint / "model.safetensors")
        state = torch.load(checkpoint / "state.pt", weights_only=True)
        model.load_state_dict(weights, strict=True)
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        raise ValueError(f"checkpoint {checkpoint} cannot be read: {error}") from error
    return state
