"""Random numbers of a training run: initialisation, order of the images, random starts.

"paper" replays the released code: numpy's legacy generator seeded anew for the initialisation and
for the loop, uniform numbers drawn in float64 and in NHWC order. "torch" draws on the device. Both
draw for the batch of all processes together, so that nothing depends on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from fastinterp.attacks import random_start
from fastinterp.models import init_paper


class PaperRng:
    def __init__(self, seed: int):
        self.seed = seed
        self._state = np.random.RandomState(seed)

    def create(self, make: Callable[[], nn.Module]) -> nn.Module:
        """The network that ``make`` gives, with the weights of this seed."""
        model = make()
        init_paper(model, np.random.RandomState(self.seed))
        return model

    def permutation(self, n: int) -> torch.Tensor:
        return torch.from_numpy(self._state.permutation(n))

    def start(self, x: torch.Tensor, eps: float) -> torch.Tensor:
        n, c, h, w = x.shape
        drawn = torch.from_numpy(self._state.uniform(-eps, eps, (n, h, w, c)))
        # Copied into x's strides: those of a permuted one-channel batch pass for channels_last, and
        # the convolutions would go back and forth between layouts.
        return torch.empty_like(x).copy_(drawn.permute(0, 3, 1, 2))

    def state_dict(self) -> dict:
        kind, keys, position, has_gauss, gauss = self._state.get_state()
        keys = torch.from_numpy(keys.astype(np.int64))
        return {"kind": kind, "keys": keys, "rest": [position, has_gauss, gauss]}

    def load_state_dict(self, state: dict) -> None:
        keys = state["keys"].numpy().astype(np.uint32)
        self._state.set_state((state["kind"], keys, *state["rest"]))


class TorchRng:
    def __init__(self, seed: int):
        self.seed = seed
        self._order = torch.Generator().manual_seed(seed)
        self._starts: torch.Generator | None = None
        self._pending: torch.Tensor | None = None

    def create(self, make: Callable[[], nn.Module]) -> nn.Module:
        """The network that ``make`` gives, with the weights of this seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return make()

    def permutation(self, n: int) -> torch.Tensor:
        return torch.randperm(n, generator=self._order)

    def start(self, x: torch.Tensor, eps: float) -> torch.Tensor:
        if self._starts is None:
            self._starts = torch.Generator(x.device).manual_seed(self.seed + 1)
            if self._pending is not None:
                self._starts.set_state(self._pending)
        return random_start(x, eps, generator=self._starts)

    def state_dict(self) -> dict:
        starts = self._pending if self._starts is None else self._starts.get_state()
        return {"order": self._order.get_state(), "starts": starts}

    def load_state_dict(self, state: dict) -> None:
        self._order.set_state(state["order"])
        self._starts, self._pending = None, state["starts"]


RNGS = {"torch": TorchRng, "paper": PaperRng}
