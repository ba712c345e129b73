"""Where the time of an Int training step goes, and one attack step with and without folding.

    python -m benchmarks.step_time --nets small wresnet resnet18-cifar --steps 5 --csv FILE

The parts are timed one by one on the same batch: data (indexing uint8 images), one attack step's
forward and backward pass times the steps, and the outer passes. CAM needs no second derivative, so
there is no double backward pass. What a whole step takes beyond them is "the rest": preparing the
attack, its sign steps, and Python. Beside them stand the convolutions alone, as the network is
written and torch computes them, each pass timed by itself: F + D for an attack step, 2 (F + D + W)
for x and x'. A step may take less: attacks run the network in another form.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F

from benchmarks import networks, record
from fastinterp import fuse
from fastinterp.data import Split
from fastinterp.discrepancy import discrepancy
from fastinterp.maps import CamNetwork
from fastinterp.objectives import METHODS
from fastinterp.regularizers._explained import RELEASED, ExplainedByCam
from fastinterp.training.optimizer import create_optimizer

EPS, STEP_SIZE, GAMMA = 8 / 255, 2 / 255, 0.01


class Step:
    """An Int step of one network and its parts; channels_last, autocast for bf16."""

    def __init__(self, name: str, steps: int, dtype: str, batch: int | None):
        network = networks.NETWORKS[name]
        self.n, self.steps, self.dtype = batch or network.batch, steps, dtype
        self.net = fuse(networks.build(name)).to(memory_format=torch.channels_last)
        size = (10 * self.n, network.channels, network.size, network.size)
        images = torch.randint(256, size, dtype=torch.uint8)
        self.split = Split(images, torch.randint(10, (len(images),)))
        self.x, self.y = self.data()
        self.start = EPS * (2 * torch.rand_like(self.x) - 1)
        self.objective = METHODS["int"](self.net, step_size=STEP_SIZE, steps=steps, gamma=GAMMA)
        self.optimizer = create_optimizer(
            "adam", self.net.parameters(), lr=1e-6, weight_decay=0.0, momentum=0.0
        )
        self.network = CamNetwork(self.net, self.x)

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bf16")

    def data(self):
        x, y = self.split.batch(torch.randint(len(self.split), (self.n,)))
        return x.contiguous(memory_format=torch.channels_last), y

    def whole(self) -> None:
        x, y = self.data()
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss, _ = self.objective(x, y, EPS, self.start)
        loss.backward()
        self.optimizer.step()

    def attack_steps(self, seconds: dict[str, list[float]], fold: bool) -> None:
        """Forward and backward passes of the attack's gradient, without preparing it."""
        os.environ["FASTINTERP_FOLD"] = "on" if fold else "off"
        try:
            explained = ExplainedByCam(RELEASED, None, self.net, self.x, self.y)
            with self.autocast(), explained.attacked(None) as at:
                for _ in range(3):
                    z = (self.x + self.start).requires_grad_()
                    begin = time.perf_counter()
                    distance, _ = at(z)
                    value = distance().sum()
                    middle = time.perf_counter()
                    torch.autograd.grad(value, z)
                    seconds["forward"].append(middle - begin)
                    seconds["backward"].append(time.perf_counter() - middle)
        finally:
            del os.environ["FASTINTERP_FOLD"]

    def outer(self, seconds: dict[str, list[float]]) -> None:
        x, x_adv = self.x, (self.x + self.start).clamp(0, 1)
        self.optimizer.zero_grad(set_to_none=True)
        begin = time.perf_counter()
        with self.autocast():
            (features, logits), (moved, logits_adv) = self.network(x), self.network(x_adv)
            d = discrepancy(features, moved, self.network.head.weight, logits_adv, self.y).mean()
            loss = F.cross_entropy(logits, self.y) + GAMMA * d
        middle = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        self.optimizer.step()
        seconds["outer forward"].append(middle - begin)
        seconds["outer backward"].append(end - middle)
        seconds["optimizer"].append(time.perf_counter() - end)

    def floor(self) -> float:
        """Seconds of the step's convolution passes, each convolution run alone."""
        calls, kind = [], torch.bfloat16 if self.dtype == "bf16" else torch.float32
        hooks = [
            m.register_forward_hook(lambda m, args, out: calls.append((m, args[0])))
            for m in self.net.modules()
            if isinstance(m, nn.Conv2d)
        ]
        with torch.no_grad():
            self.net(self.x)
        for hook in hooks:
            hook.remove()
        units = 0.0
        for i, (conv, x) in enumerate(calls):
            # Copied, as the strides of a one-channel weight do not tell its format.
            weight = torch.empty_like(
                conv.weight, dtype=kind, memory_format=torch.channels_last
            ).copy_(conv.weight.detach())
            side = (conv.kernel_size[0] - 1) // 2
            x = x.detach().to(kind).contiguous(memory_format=torch.channels_last)
            how = (conv.stride, (side, side), conv.dilation, conv.groups)
            y = torch.ones_like(F.conv2d(x, weight, None, *how))

            def backward(mask, x=x, y=y, weight=weight, how=how):
                return torch.ops.aten.convolution_backward(
                    y, x, weight, None, *how[:3], False, [0, 0], how[3], mask
                )

            f = least(lambda x=x, weight=weight, how=how: F.conv2d(x, weight, None, *how))
            d = least(lambda: backward([True, False, False]))
            w = least(lambda: backward([False, True, False]))
            units += self.steps * (f + d) + 2 * (f + w + (d if i else 0))
        return units


def least(function: Callable, repeats: int = 4) -> float:
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def measure(name: str, steps: int, dtype: str, batch: int | None, repeats: int) -> list[dict]:
    step = Step(name, steps, dtype, batch)
    whole, data, outer = [], [], {k: [] for k in ("outer forward", "outer backward", "optimizer")}
    attack = {fold: {"forward": [], "backward": []} for fold in (True, False)}
    for i in range(repeats + 1):
        for seconds, function in ((whole, step.whole), (data, step.data)):
            begin = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - begin)
        step.outer(outer)
        for fold, seconds in attack.items():
            step.attack_steps(seconds, fold)
        if i == 0:  # warm now
            for each in (
                whole,
                data,
                *outer.values(),
                *(v for a in attack.values() for v in a.values()),
            ):
                each.clear()
    case = f"{name} int N={step.n} {dtype} channels_last"
    total = statistics.median(whole)
    parts = {
        "attack forward": [steps * s for s in attack[True]["forward"]],
        "attack backward": [steps * s for s in attack[True]["backward"]],
        **outer,
        "data": data,
    }
    rest = total - sum(map(statistics.median, parts.values()))
    parts |= {"the rest": [rest, rest], "convolutions alone": [floor := step.floor(), floor]}
    rows = [
        {
            "benchmark": "step_time",
            "case": f"{case}, {steps} attack steps, {part}",
            "side": "fastinterp",
            **record.quantiles(seconds),
            "note": f"{100 * statistics.median(seconds) / total:.1f} % of the step",
        }
        for part, seconds in {"the whole step": whole, **parts}.items()
    ]
    sums = {k: [sum(p) for p in zip(*v.values(), strict=True)] for k, v in attack.items()}
    medians = {fold: statistics.median(seconds) for fold, seconds in sums.items()}
    rows += [
        {
            "benchmark": "attack_fold",
            "case": f"{case}, gradient of one attack step",
            "side": "fastinterp" if fold else "as written",
            **record.quantiles(sums[fold]),
            "ratio": f"{medians[False] / medians[fold]:.3g}",
        }
        for fold in (True, False)
    ]
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    nets = ("small", "wresnet", "resnet18-cifar")
    parser.add_argument("--nets", nargs="+", choices=nets, default=list(nets))
    parser.add_argument("--steps", type=int, default=10, help="of the attack")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, help="default: as the network is trained")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    args = record.parse_with_repeats(parser, argv)
    record.require_core()
    for name in args.nets:
        rows = measure(name, args.steps, args.dtype, args.batch, args.repeats)
        shown = [[r["case"], r["side"], r["ms_p50"], r.get("ratio", r.get("note"))] for r in rows]
        print(tabulate(shown, ["case", "side", "ms", "share, or speed-up"]), flush=True)
        if args.csv:
            record.append(args.csv, rows)


if __name__ == "__main__":
    main()
