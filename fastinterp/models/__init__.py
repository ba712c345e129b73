"""Networks by name, the numpy-seeded initialisation of the paper's, the loading of weights."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fastinterp.models.networks import Pool, Small, WResnet
from fastinterp.models.zoo import LIBRARIES, check_zoo_name, create_zoo_model, resnet18_cifar

PAPER_MODELS = {"small": Small, "pool": Pool, "wresnet": WResnet}
MODELS = {**PAPER_MODELS, "resnet18-cifar": resnet18_cifar}

__all__ = [
    "MODELS",
    "PAPER_MODELS",
    "Pool",
    "Small",
    "WResnet",
    "check_model",
    "create_model",
    "init_paper",
    "load_weights",
]


def check_model(name: str) -> None:
    """Raises ValueError unless ``create_model`` knows ``name``."""
    if name.partition(":")[0] in LIBRARIES:
        check_zoo_name(name)
    elif name not in MODELS:
        raise ValueError(
            f"unknown model {name!r}; use one of {', '.join(MODELS)}, torchvision:NAME or timm:NAME"
        )


def create_model(name: str, in_channels: int, num_classes: int) -> nn.Module:
    """A network by name, untrained, with the default initialisation of its authors.

    Args:
        name: of MODELS, or torchvision:NAME or timm:NAME.
        in_channels: of the images.
        num_classes: length of the logits.

    Raises:
        ValueError: unknown name, or not for that number of channels.
        ImportError: the library is not installed.
    """
    check_model(name)
    if name in MODELS:
        return MODELS[name](in_channels, num_classes)
    return create_zoo_model(name, in_channels, num_classes)


@torch.no_grad()
def init_paper(model: nn.Module, rng: np.random.RandomState) -> None:
    """Draws a network's weights from numpy's legacy generator, in the released code's order.

    Each convolution is normal(0, 1 / (k k c_in)) drawn as (c_out, k k c_in), which the released
    code transposes and reshapes to (k, k, c_in, c_out); biases are 0; the head is normal(0, 1/C).
    """
    for i in range(model.convolutions):
        convolution = model.conv(i)
        c_out, c_in, k, _ = convolution.weight.shape
        drawn = rng.normal(scale=1 / math.sqrt(k * k * c_in), size=(c_out, k * k * c_in))
        hwio = drawn.T.reshape(k, k, c_in, c_out)
        convolution.weight.copy_(torch.from_numpy(hwio.transpose(3, 2, 0, 1).copy()))
        convolution.bias.zero_()
    head = model.head.weight
    head.copy_(torch.from_numpy(rng.normal(scale=1 / math.sqrt(head.shape[1]), size=head.shape)))


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads every parameter of ``model`` from a file, strictly.

    Args:
        model: receives the weights; unchanged when an error is raised.
        path: an .npz of arrays (as released by the paper's authors), a .safetensors file, or a run
            folder that holds model.safetensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind, or of another network.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}: give an .npz, a .safetensors file or the folder of a finished "
            "method in a run, such as runs/NAME/int"
        )
    weights = _read(path)
    wanted = model.state_dict()
    problems = [f"missing {name}" for name in sorted(wanted.keys() - weights.keys())]
    problems += [f"unexpected {name}" for name in sorted(weights.keys() - wanted.keys())]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted
        if name in weights and weights[name].shape != wanted[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:4]) + (" ..." if len(problems) > 4 else "")
        raise ValueError(
            f"{path} holds the weights of another network than {type(model).__name__} "
            f"({shown}); choose the model and dataset it was trained with"
        )
    model.load_state_dict(weights, strict=True)


def _read(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{path} is neither an .npz nor a .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, EOFError, SafetensorError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or not a weight file: {error}") from error
