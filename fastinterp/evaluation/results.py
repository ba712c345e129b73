"""Finished pieces of an evaluation on disk, so that one which was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fastinterp._files import write_atomically
from fastinterp.data import LabelledImages

AT_ONCE = 1_000  # images


def fingerprint(*tensors: torch.Tensor) -> str:
    """SHA-256 of the values, types and shapes of tensors, in hex."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(_head(tensor.dtype, tensor.shape))
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def images_fingerprint(split: LabelledImages, index: torch.Tensor) -> str:
    """That of uint8 images (B, C, H, W) and labels (B,) at ``index``, never held at once."""
    labels = split.labels[index]
    digest = hashlib.sha256(_head(torch.uint8, (len(index), *split.image_shape)))
    for part in index.split(AT_ONCE):
        digest.update(_bytes(split.pixels(part)))
    digest.update(_head(labels.dtype, labels.shape))
    digest.update(_bytes(labels))
    return digest.hexdigest()


def _head(dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    return f"{dtype} {tuple(shape)}".encode()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers with their names, in hex."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {fingerprint(tensor)}".encode())
    return digest.hexdigest()


class Results:
    """One JSON file per piece below ``folder``, each written whole or not at all.

    A file holds the settings it was computed with, the result and a checksum of both. One that is
    damaged, or of other settings, images or weights, is reported and computed again.

    Args:
        folder: created when the first piece is finished.
        say: receives what is to be told about files that were not used.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = print):
        self.folder, self.say = folder, say

    def get(self, name: str, settings: dict, compute: Callable[[], dict]) -> dict:
        """The result of the piece ``name``: the one on disk if it is sound, else ``compute()``.

        Args:
            name: may hold "/", for sub-folders.
            settings: everything that the result depends on, as JSON values.
            compute: gives a dictionary of JSON values.

        Raises:
            OSError: the folder cannot be written.
        """
        path = self.folder / f"{name}.json"
        # As they will be read back: tuples are lists then.
        settings = json.loads(json.dumps(settings))
        known = self._read(path, settings)
        if known is not None:
            return known
        result = json.loads(json.dumps(compute()))
        document = {"settings": settings, "result": result, "checksum": _checksum(settings, result)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(document) + "\n"))
        return result

    def _read(self, path: Path, settings: dict) -> dict | None:
        if not path.exists():
            return None
        try:
            document = json.loads(path.read_text())
            then, result = document["settings"], document["result"]
            if document["checksum"] != _checksum(then, result):
                raise ValueError("its checksum is another")
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.say(f"{path} is damaged ({error}): computed again")
            return None
        if then == settings:
            return result
        changed = sorted(
            key for key in then.keys() | settings if then.get(key) != settings.get(key)
        )
        self.say(f"{path} is of other {', '.join(changed)}: computed again")
        return None


def _checksum(settings: dict, result: dict) -> str:
    return hashlib.sha256(json.dumps([settings, result], sort_keys=True).encode()).hexdigest()


class KeptBatches:
    """An attack whose finished batches are on disk, so that one which was stopped goes on there.

    A file holds the images of a batch, their checksum, what they were computed from and where the
    random numbers stood afterwards. One that is damaged, or of other settings, images or weights,
    is reported and computed again.

    Args:
        attack: see accuracy.attacked_batches, which is to be given this object in its place.
        folder: created with the first batch, removed by ``clear``.
        settings: of the attack, as JSON values.
        say: receives what is to be told about files that were not used.
    """

    def __init__(
        self,
        attack: Callable[..., torch.Tensor],
        folder: Path,
        settings: dict,
        say: Callable[[str], None] = print,
    ):
        self.attack, self.folder, self.settings, self.say = attack, folder, settings, say
        self._number, self._weights = 0, None

    def __call__(self, model, x, y, *, generator) -> torch.Tensor:
        path = self.folder / f"{self._number:06d}.safetensors"
        self._number += 1
        self._weights = self._weights or model_fingerprint(model)
        batch = fingerprint(x, y, generator.get_state())
        source = _checksum(self.settings, {"weights": self._weights, "batch": batch})
        known = self._read(path, source)
        if known is not None:
            generator.set_state(known["generator"])
            return known["images"].to(x)
        x_adv = self.attack(model, x, y, generator=generator)
        tensors = {"images": x_adv.cpu().contiguous(), "generator": generator.get_state()}
        said = {"source": source, "checksum": fingerprint(*tensors.values())}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=said))
        return x_adv

    def clear(self) -> None:
        """Removes the files of all batches."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, path: Path, source: str) -> dict[str, torch.Tensor] | None:
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                said = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in ("images", "generator")}
            if said["checksum"] != fingerprint(*tensors.values()):
                raise ValueError("its checksum is another")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            self.say(f"{path} is damaged ({error}): computed again")
            return None
        if said["source"] != source:
            self.say(f"{path} is of other settings, images or weights: computed again")
            return None
        return tensors
