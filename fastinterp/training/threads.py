"""How many CPU threads a network is trained with."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

TRIALS = 5
WORTH = 0.9  # of the time that all threads take; what gains less may be chance
SLOWER = 1.5  # times the best so far: fewer threads will not be faster
LONG = 5.0  # seconds; a network whose step takes so long keeps all threads busy


def choose_threads(model: nn.Module, x: torch.Tensor, y: torch.Tensor, amp: str) -> None:
    """Sets the number of torch's threads with which the model's gradients are fastest.

    Small networks lose by many threads, whose waiting for one another outweighs their work, and by
    two of them on cores that others use. Tried are all of torch's threads, half of them and so on,
    on a copy of the model and without moving torch's random numbers.

    Args:
        model: on the CPU, images (N, C, H, W) -> logits (N, K).
        x, y: a batch, int64 (N,) the labels.
        amp: "off" or "bf16", of TrainConfig.
    """
    most = torch.get_num_threads()
    if most == 1:
        return
    trial = copy.deepcopy(model)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16"):
            loss = F.cross_entropy(trial(x), y)
        loss.backward()

    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(fastest(step, most))


def fastest(step: Callable[[], None], most: int) -> int:
    """Of most, most / 2, ..., 1 threads those that ``step`` is fastest with; sets others."""
    seconds, count = {}, most
    while count:
        torch.set_num_threads(count)
        seconds[count] = _seconds(step)
        if seconds[count] > min(LONG, SLOWER * min(seconds.values())):
            break
        count //= 2
    best = min(seconds, key=seconds.get)
    return best if seconds[best] < WORTH * seconds[most] else most


def _seconds(step: Callable[[], None]) -> float:
    """Median of some steps after the first, or the first if that is long enough to tell."""
    taken = []
    while len(taken) < 1 + TRIALS and not (taken and taken[0] > LONG):
        begin = time.perf_counter()
        step()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:] or taken)
