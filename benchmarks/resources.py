"""Registers, shared memory and spills of every GPU kernel, read without a GPU.

    python -m benchmarks.resources [--arch 80 90] [--csv FILE] [--sample 7]

The launchers in fastinterp.triton are called on meta tensors and Triton is told to compile and not
to launch, so tile sizes, argument types and alignment are those of a real call. The kernels of
csrc/cuda are read from the built core where it has them for that architecture; for others they are
compiled, which takes minutes, when nvcc is on PATH. The exit status is 1 when a kernel spills.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from fastinterp import _native

CUDA_SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Row(NamedTuple):
    kernel: str
    case: str
    arch: int
    registers: int
    shared_bytes: int
    spill_bytes: int  # stack frame and local memory


def empty(*shape, dtype, channels_last=False):
    """A tensor that has no data, to call launchers with."""
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor.to(memory_format=torch.channels_last) if channels_last else tensor


def _accumulation(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _attack_step(dtype, norm, per_example, shape):
    from fastinterp.triton.attack_step import attack_step

    x = empty(*shape, dtype=dtype)
    eps = empty(*shape[: int(per_example)], dtype=_accumulation(dtype))
    attack_step(x, x, x, eps, eps, norm, 0.0, 1.0, x)


def _cam_discrepancy(dtype, norm, shape, classes, channels_last):
    from fastinterp.triton import cam_discrepancy as launch

    def maps():
        return empty(*shape, dtype=dtype, channels_last=channels_last)

    acc = _accumulation(dtype)
    head = None if classes is None else empty(classes, shape[1], dtype=acc)
    per_class = empty(shape[0], shape[1] if classes is None else classes, dtype=acc)
    total = empty(shape[0], dtype=acc)
    launch.cam_discrepancy_forward(maps(), maps(), head, per_class, norm, total, per_class)
    launch.cam_discrepancy_backward(per_class, maps(), maps(), head, per_class, norm, maps(), head)


# Maps as networks have them: vectorised in NCHW, in part, not at all; several pixels a row or one
_MAPS = (
    ((32, 64, 32, 32), False),
    ((16, 256, 14, 14), False),
    ((64, 512, 7, 7), False),
    ((32, 16, 32, 32), True),
    ((32, 256, 8, 8), True),
    ((5, 10, 7, 7), True),
)


def _batch_norm_act(dtype, activation, shape, channels_last, with_residual, training):
    from fastinterp.triton._batch_norm_act_second import batch_norm_act_backward_backward
    from fastinterp.triton.batch_norm_act import batch_norm_act_backward, batch_norm_act_forward

    op = importlib.import_module("fastinterp.ops.batch_norm_act")
    x = empty(*shape, dtype=dtype, channels_last=channels_last)
    vector = empty(shape[1], dtype=_accumulation(dtype))
    residual, mask = x if with_residual else None, None
    if with_residual and activation in ("relu", "leaky_relu"):
        mask = empty(1, dtype=torch.uint8)
    affine = (vector,) * 4
    kind, rows = (training, 1e-5, activation, 1.0), op._rows(x)
    running = (None, None) if training else (vector, vector)
    batch_norm_act_forward((x, residual, mask), affine, *running, x, vector, kind, rows)
    given, smooth = (x, residual if mask is None else None, mask), activation in op.SMOOTH
    results = x, x if with_residual else None, vector, vector
    batch_norm_act_backward(given, affine, x, x, *results, kind, rows)
    cotangents = x, x if with_residual else None, vector, vector
    batch_norm_act_backward_backward(
        *(given, affine, x, cotangents, (vector, vector), x, x),
        *(x if smooth and with_residual else None, vector, vector, kind, rows),
    )


def _norm_act(dtype, activation, shape, groups, channels_last, with_residual):
    from fastinterp.triton import norm_act as launch

    x = empty(*shape, dtype=dtype, channels_last=channels_last)
    acc = _accumulation(dtype)
    vector, group = empty(shape[1], dtype=acc), empty(shape[0], groups, dtype=acc)
    residual = x if with_residual else None
    kind, last = (groups, 1e-5, activation, 1.0), channels_last or len(shape) == 2
    given, statistics = ((x, residual), (vector, vector)), (group, group)
    launch.norm_act_forward(*given, *statistics, x, kind, last)
    results = x, residual, vector, vector, *statistics
    launch.norm_act_backward(*given, statistics, x, x, results, kind, last)
    cotangents = x, residual, vector, vector
    k = x if activation == "gelu" and with_residual else None
    results = x, x, k, vector, vector
    launch.norm_act_backward_backward(
        *given, statistics, statistics, x, cotangents, results, kind, last
    )


# Maps and rows as networks have them: whole groups in a tile or not, several examples or groups
_GROUPS = (
    ((32, 64, 28, 28), 32, False),
    ((32, 64, 28, 28), 32, True),
    ((16, 256, 56, 56), 32, False),
    ((5, 48, 7, 7), 1, True),
    ((6272, 384), 1, False),
    ((64, 6000), 1, False),
)


def _activation(dtype, kind):
    from fastinterp.triton import activation as launch

    x = empty(50, 16, 14, 14, dtype=dtype)
    launch.activation_forward(x, kind, 1.0, x)
    launch.activation_backward(x, x, kind, 1.0, x)
    launch.activation_backward_backward(x, x, x, kind, 1.0, x, x)


def _max_pool2d(dtype, shape, channels_last, window):
    from fastinterp.ops._window import pooled_size
    from fastinterp.triton import max_pool2d as launch

    pooled = *shape[:2], *pooled_size(shape[2:], *window, False)
    x, y = (empty(*s, dtype=dtype, channels_last=channels_last) for s in (shape, pooled))
    offsets = empty(*pooled, dtype=torch.uint8, channels_last=channels_last)
    launch.max_pool2d_forward(x, y, offsets, channels_last, window)
    launch.max_pool2d_scatter(y, offsets, x, channels_last, window)
    launch.max_pool2d_gather(x, offsets, y, channels_last, window)


def _cross_entropy(dtype, shape, reduction, smoothing):
    from fastinterp.triton import cross_entropy as launch

    acc = _accumulation(dtype)
    logits, target = empty(*shape, dtype=dtype), empty(shape[0], dtype=torch.int64)
    losses, total = empty(shape[0], dtype=acc), empty(dtype=acc)
    shift, how = empty(shape[0], 2, dtype=acc), (reduction, smoothing, -100)
    total = None if reduction == "none" else total
    saved = logits, target, shift, losses
    launch.cross_entropy_forward(logits, target, shift, losses, losses, total, how)
    launch.cross_entropy_backward(losses, *saved, logits, how)
    launch.cross_entropy_backward_backward(logits, losses, *saved, losses, logits, how)


def _kendall_tau(dtype, shape):
    from fastinterp.triton.kendall_tau import kendall_tau

    a = empty(*shape, dtype=dtype)
    kendall_tau(a, a, empty(shape[0], dtype=torch.float64))


def triton_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """(description, call of a launcher on meta tensors); a new op adds its calls here."""
    for dtype, norm, per_example in itertools.product(DTYPES, ("Linf", "L2"), (False, True)):
        for shape in ((50, 1, 28, 28), (64, 3, 224, 224)) if norm == "L2" else ((50, 1, 28, 28),):
            case = f"{norm} {dtype} {shape} eps per {'example' if per_example else 'batch'}"
            yield case, lambda a=(dtype, norm, per_example, shape): _attack_step(*a)
    cam_shapes = (
        ((50, 100, 7, 7), 10, False),
        ((128, 640, 8, 8), 10, True),
        ((64, 2048, 7, 7), 1000, False),
        ((64, 2048, 7, 7), 1000, True),
        ((33, 513, 5, 7), 21, False),
        ((50, 10, 7, 7), None, False),
    )
    for dtype, norm, (shape, classes, channels_last) in itertools.product(
        DTYPES, ("l1", "l2"), cam_shapes
    ):
        case = f"{norm} {dtype} {shape} K={classes or shape[1]} {_order(channels_last)}"
        yield case, lambda a=(dtype, norm, shape, classes, channels_last): _cam_discrepancy(*a)
    for dtype, shape in itertools.product(DTYPES[:2], ((200, 49), (200, 1024))):
        yield f"{dtype} {shape}", lambda a=(dtype, shape): _kendall_tau(*a)
    yield from _network_cases()


def _norm_cases():
    """dtype, activation, map, residual, training: all that differs, not all of the product."""
    ends, others = (_MAPS[0], _MAPS[4]), (*_MAPS[1:4], _MAPS[5])
    bf16, two = torch.bfloat16, ("relu", "gelu")
    yield from itertools.product(
        (bf16,), ("identity", *two, "softplus", "silu"), ends, (False, True), (True,)
    )
    yield from itertools.product((torch.float32, torch.float64), two, ends, (False, True), (True,))
    yield from itertools.product((torch.float16,), ("relu",), ends, (False, True), (True,))
    yield from itertools.product((bf16, torch.float32), two, others, (True,), (True,))
    yield from itertools.product((bf16,), two, ends, (True,), (False,))


def _network_cases():
    for dtype, activation, (shape, last), residual, training in _norm_cases():
        case = f"{activation} {dtype} {shape} {_order(last)}"
        case += f"{' residual' * residual}{' eval' * (not training)}"
        arguments = dtype, activation, shape, last, residual, training
        yield case, lambda a=arguments: _batch_norm_act(*a)
    for dtype, activation, residual in (
        *((torch.float32, "gelu", True), (torch.bfloat16, "identity", False)),
        *((torch.bfloat16, "relu", True), (torch.float16, "gelu", False)),
        (torch.float64, "gelu", True),
    ):
        for shape, groups, last in _GROUPS:
            case = f"{activation} {dtype} {shape} / {groups} {_order(last)}{' residual' * residual}"
            yield case, lambda a=(dtype, activation, shape, groups, last, residual): _norm_act(*a)
    for dtype, kind in itertools.product(DTYPES, ("softplus", "silu", "gelu")):
        yield f"{kind} {dtype}", lambda a=(dtype, kind): _activation(*a)
    pools = (
        ((50, 32, 28, 28), ((2, 2), (2, 2), (0, 0), (1, 1))),
        ((64, 64, 112, 112), ((3, 3), (2, 2), (1, 1), (1, 1))),
        ((16, 192, 28, 28), ((3, 3), (1, 1), (1, 1), (1, 1))),
        ((2, 5, 31, 33), ((5, 4), (1, 3), (2, 0), (1, 2))),
    )
    for dtype, (shape, window), last in itertools.product(DTYPES, pools, (False, True)):
        case = f"{window[0]} {dtype} {shape} {_order(last)}"
        yield case, lambda a=(dtype, shape, last, window): _max_pool2d(*a)
    logits = ((50, 10), (256, 1000), (33, 50257))
    for dtype, shape, reduction, smoothing in itertools.product(
        DTYPES, logits, ("mean", "none"), (0.0, 0.1)
    ):
        case = f"{reduction} {dtype} {shape} smoothing {smoothing}"
        yield case, lambda a=(dtype, shape, reduction, smoothing): _cross_entropy(*a)


def _order(channels_last):
    return "channels_last" if channels_last else "NCHW"


def _cuobjdump() -> str:
    import triton

    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(shipped) if shipped.is_file() else shutil.which("cuobjdump")
    if tool is None:
        raise SystemExit("benchmarks.resources: no cuobjdump in triton or on PATH")
    return tool


def _resources(cubin: Path, *options: str) -> Iterator[tuple[str, dict[str, int]]]:
    """(function name, {"REG": ..., "STACK": ..., ...}) of each function in ``cubin``."""
    listing = subprocess.run(
        [_cuobjdump(), "--dump-resource-usage", *options, str(cubin)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name, usage in re.findall(r"Function (\S+):\s*\n\s*(.+)", listing):
        yield name, {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}


class _Driver:
    """All that Triton asks of a device in order to compile for it."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch  # the key of Triton's kernel caches

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def triton_rows(arch: int, folder: Path, sample: int = 1) -> Iterator[Row]:
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, warmup, **kwargs):
        compiled.append(run(self, *args, warmup=True, **kwargs))

    seen = set()
    driver.set_active(_Driver(arch))
    with mock.patch.object(JITFunction, "run", compile_only):
        for case, launch in itertools.islice(triton_cases(), 0, None, sample):
            compiled.clear()
            launch()
            for kernel in compiled:
                if kernel.hash in seen:
                    continue
                seen.add(kernel.hash)
                cubin = folder / "kernel.cubin"
                cubin.write_bytes(kernel.asm["cubin"])
                for name, usage in _resources(cubin):
                    spill = usage["STACK"] + usage["LOCAL"]
                    shared = kernel.metadata.shared  # dynamic, so not in the cubin
                    yield Row(name, case, arch, usage["REG"], shared, spill)


def built_architectures() -> list[int]:
    """Those that the installed core holds machine code for."""
    listed = getattr(_native.core, "cuda_architectures", None) or ""
    return [int(a.split("-")[0]) for a in listed.split() if "virtual" not in a]


def cuda_rows(arch: int, folder: Path) -> Iterator[Row]:
    if arch in built_architectures():
        yield from _cuda_rows(_native.core.__file__, "built core", arch)
        return
    if shutil.which("nvcc") is None:
        print(f"nvcc is not on PATH: csrc/cuda is left out for sm_{arch}", file=sys.stderr)
        return
    for source in sorted(CUDA_SOURCES.glob("*.cu")):
        cubin = folder / f"{source.stem}.cubin"
        command = ["nvcc", "-cubin", f"-arch=sm_{arch}", "-std=c++17", "-O3", "-o", str(cubin)]
        subprocess.run([*command, str(source)], check=True)
        yield from _cuda_rows(cubin, source.name, arch)


def _cuda_rows(binary, case: str, arch: int) -> Iterator[Row]:
    found = list(_resources(binary, "--gpu-architecture", f"sm_{arch}"))
    for name, (_, usage) in zip(_demangled([name for name, _ in found]), found, strict=True):
        spill = usage["STACK"] + usage["LOCAL"]
        yield Row(name, case, arch, usage["REG"], usage["SHARED"], spill)


def _demangled(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None or not names:
        return names
    readable = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    ).stdout.replace("(anonymous namespace)::", "")
    lines = re.sub(r"\(fastinterp::Activation\)", "activation ", readable).splitlines()
    matches = [re.search(r"(\w+(?:<.*?>)?)\(", line) for line in lines]
    return [m[1] if m else line for m, line in zip(matches, lines, strict=True)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="as in sm_90")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    parser.add_argument(
        "--sample",
        type=int,
        default=0,
        help="a look at another Triton: every so many of its cases, and nothing of csrc/cuda",
    )
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 interprets kernels instead of compiling them; unset it")

    rows = []
    with tempfile.TemporaryDirectory() as name:
        for arch in args.arch:
            rows += triton_rows(arch, Path(name), args.sample or 1)
            rows += () if args.sample else cuda_rows(arch, Path(name))

    table = [[field.replace("_", " ") for field in Row._fields], *[map(str, r) for r in rows]]
    table = [list(line) for line in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())
    if args.csv:
        with args.csv.open("w", newline="") as file:
            csv.writer(file).writerows([Row._fields, *rows])
    spilling = sum(row.spill_bytes > 0 for row in rows)
    print(f"{len(rows)} kernels, {spilling} spill")
    return int(spilling > 0)


if __name__ == "__main__":
    sys.exit(main())
