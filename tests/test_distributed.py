"""Two gloo processes against one, with batch norm and with double backprop in the objective."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fastinterp import InterpretationRegularizer, fuse
from fastinterp.objectives import METHODS
from fastinterp.regularizers import input_gradient_norm

RANKS, EPS = 2, 0.1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 6, 3, 2, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3))
        )
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.pool(self.body(x)).flatten(1))


class Penalised(nn.Module):
    """What a user wraps: cross-entropy and two penalties, one of them with double backprop."""

    def __init__(self):
        super().__init__()
        self.model = fuse(Net())
        self.regularizer = InterpretationRegularizer("cam", eps=EPS, step_size=0.02, steps=3)

    def forward(self, x, y, eps, start):
        value, aux = self.regularizer(self.model, x, y, start=start, return_aux=True)
        norm = input_gradient_norm(self.model, x, y, norm="l1")
        return F.cross_entropy(aux.logits, y) + 0.1 * value + 0.1 * norm, {}


def build(name):
    torch.manual_seed(1)
    if name == "user":
        return Penalised().double()
    return METHODS[name](fuse(Net()), step_size=0.02, steps=3).double()


def shard(rank):
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(RANKS, 4, 1, 16, 16, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 10, (RANKS, 4), generator=generator)
    start = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 * EPS - EPS
    return x[rank], y[rank], start[rank]


def work(rank, name, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    # Several forward passes per step: the buffers must not be overwritten between them.
    wrapped = DistributedDataParallel(build(name), broadcast_buffers=False)
    x, y, start = shard(rank)
    for _ in range(2):  # accumulated
        loss, _ = wrapped(x, y, EPS, start)
        loss.backward()
    torch.save([p.grad for p in wrapped.parameters()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["user", "int", "ig-norm"])
def test_two_processes_give_the_gradients_of_one(tmp_path, name):
    mp.spawn(work, args=(name, str(tmp_path)), nprocs=RANKS)
    # Each process normalises by its own batches and keeps its own running statistics.
    copies = [build(name) for _ in range(RANKS)]
    for rank, copy in enumerate(copies):
        x, y, start = shard(rank)
        for _ in range(2):
            copy(x, y, EPS, start)[0].backward()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for i, parameters in enumerate(zip(*(copy.parameters() for copy in copies), strict=True)):
        mean = sum(p.grad for p in parameters) / RANKS
        for grads in ranks:
            torch.testing.assert_close(grads[i], mean, rtol=1e-9, atol=1e-11)
        assert mean.abs().sum() > 0
