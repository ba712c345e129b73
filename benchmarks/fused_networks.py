"""A step of double backprop before and after fuse: python -m benchmarks.fused_networks [--csv FILE]

Networks of torchvision and timm, eager on both sides, in the same format and dtype, one step at a
time in turn. A network is timed when its parameter gradients in float64, on a few images, agree
before and after; in float32 one turned ReLU moves the second derivatives of a deep net by percents.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
from tabulate import tabulate
from torch.nn import functional as F

import fastinterp
from benchmarks import gate, record

NETWORKS = (
    *("resnet18", "resnet50", "wide_resnet50_2", "vgg11_bn", "densenet121", "mobilenet_v2"),
    *("regnet_y_400mf", "googlenet", "timm:resnet18", "timm:resnet26d"),
)


def create(name: str) -> torch.nn.Module:
    library, _, model = name.rpartition(":")
    if library == "timm":
        import timm

        return timm.create_model(model, num_classes=10)
    import torchvision

    options = {"aux_logits": False, "init_weights": True} if model == "googlenet" else {}
    return torchvision.models.get_model(model, weights=None, num_classes=10, **options)


def step(net, x, y, dtype) -> list[torch.Tensor]:
    """Gradients of CE + the mean l1 norm of d f_y/dx, BN in train mode."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        logits = net(x)
    (saliency,) = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), x, create_graph=True)
    loss = F.cross_entropy(logits.to(x.dtype), y) + saliency.abs().sum((1, 2, 3)).mean()
    gradients = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return [torch.zeros(1) if g is None else g for g in gradients]


def compare(name: str, arguments) -> list[dict]:
    torch.manual_seed(0)
    net = create(name).train()
    for module in net.modules():  # or the two sides would draw different masks
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    net = net.to(memory_format=torch.channels_last)
    x = torch.rand(arguments.batch, 3, arguments.size, arguments.size)
    x, y = x.to(memory_format=torch.channels_last), torch.randint(0, 10, (arguments.batch,))
    nets = {"eager": net, "fastinterp": fastinterp.fuse(copy.deepcopy(net))}
    exact = (
        copy.deepcopy(n).double().to(memory_format=torch.contiguous_format) for n in nets.values()
    )
    before, after = (step(n, x[:4].double().contiguous(), y[:4], "fp64") for n in exact)
    check = gate.relative_error(after, before)
    case = f"{name} N={arguments.batch} {arguments.size}x{arguments.size} {arguments.dtype}"
    note = "" if check <= gate.FLOOR[torch.float64] else "WRONG"
    times = {side: [] for side in nets}
    for i in range(0 if note else arguments.steps + 1):
        for side, n in nets.items():
            start = time.perf_counter()
            step(n, x, y, arguments.dtype)
            if i > 0:
                times[side].append(time.perf_counter() - start)
    rows = []
    for side, seconds in times.items():
        row = {"benchmark": "fuse", "case": case, "side": side, "check": f"{check:.1e}"}
        if seconds:
            ratio = statistics.median(times["eager"]) / statistics.median(seconds)
            row |= {**record.quantiles(seconds), "ratio": f"{ratio:.2f}"}
        rows.append(row | {"note": note})
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fused_networks")
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    arguments = parser.parse_args(argv)
    record.require_core()
    for name in arguments.networks:
        rows = compare(name, arguments)
        cells = [[r["side"], r.get("ms_p50"), r.get("ratio"), r["check"], r["note"]] for r in rows]
        print(rows[0]["case"])
        print(tabulate(cells, ["side", "ms", "eager / side", "difference", ""]), flush=True)
        if arguments.csv:
            record.append(arguments.csv, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
