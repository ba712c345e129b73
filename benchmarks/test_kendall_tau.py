"""Kendall's tau of many maps against scipy, map by map, and torchmetrics.

pytest benchmarks/test_kendall_tau.py [--csv FILE]. A peer may take seconds, so each side runs a few
times only. A row is kept only where both sides agree.
"""

import statistics
import time

import pytest
import torch

from benchmarks import record
from benchmarks.conftest import ROWS
from fastinterp.metrics import kendall_tau

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 3
# Maps of MNIST Small's class activations, and of the size of a CIFAR-10 image. torchmetrics is so
# slow that it gets fewer; its time grows with their number.
SHAPES = {"scipy": [(10_000, 7, 7), (1_000, 32, 32)], "torchmetrics": [(200, 7, 7), (10, 32, 32)]}


def by_scipy(a, b):
    kendalltau = pytest.importorskip("scipy.stats").kendalltau
    pairs = zip(a.flatten(1).cpu().numpy(), b.flatten(1).cpu().numpy(), strict=True)
    return torch.tensor([kendalltau(row, other).statistic for row, other in pairs])


def by_torchmetrics(a, b):
    functional = pytest.importorskip("torchmetrics.functional")
    return functional.kendall_rank_corrcoef(a.flatten(1).T, b.flatten(1).T)


PEERS = {"scipy": by_scipy, "torchmetrics": by_torchmetrics}


def _seconds(side, *maps):
    start = time.perf_counter()
    value = side(*maps)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, value


@pytest.mark.parametrize(
    ("peer", "shape"), [(peer, shape) for peer, shapes in SHAPES.items() for shape in shapes]
)
def test_kendall_tau(request, shape, peer):
    a, b = torch.randn(2, *shape, device=DEVICE).unbind()
    b = (a + b).mul(4).round()  # related, with ties
    sides = {peer: PEERS[peer], "fastinterp": kendall_tau}
    times = {name: [] for name in sides}
    for _ in range(ROUNDS):
        values = []
        for name, side in sides.items():
            seconds, value = _seconds(side, a, b)
            times[name].append(seconds)
            values.append(value.double().cpu())
    check = (values[0] - values[1]).abs().max().item()
    assert check < 1e-5
    theirs = statistics.median(times[peer])
    request.config.stash[ROWS] += [
        {
            "benchmark": "kendall_tau",
            "case": f"{shape} against {peer}",
            "side": name,
            **record.quantiles(values),
            "ratio": f"{theirs / statistics.median(values):.2f}",
            "check": f"{check:.1e}",
        }
        for name, values in times.items()
    ]
