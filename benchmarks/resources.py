"""Registers, shared memory and spills of every GPU kernel, read without a GPU.

    python -m benchmarks.resources [--arch 80 90] [--csv FILE]

The launchers in fastinterp.triton are called on meta tensors and Triton is told to compile and not
to launch, so tile sizes, argument types and alignment are those of a real call. csrc/cuda is
compiled when nvcc is on PATH. The exit status is 1 when a kernel spills.
"""

from __future__ import annotations

import argparse
import csv
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

CUDA_SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Row(NamedTuple):
    kernel: str
    case: str
    arch: int
    registers: int
    shared_bytes: int
    spill_bytes: int  # stack frame and local memory


def _empty(*shape, dtype, channels_last=False):
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor.to(memory_format=torch.channels_last) if channels_last else tensor


def _accumulation(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _attack_step(dtype, norm, per_example, shape):
    from fastinterp.triton.attack_step import attack_step

    x = _empty(*shape, dtype=dtype)
    eps = _empty(*shape[: int(per_example)], dtype=_accumulation(dtype))
    attack_step(x, x, x, eps, eps, norm, 0.0, 1.0, x)


def _cam_discrepancy(dtype, norm, shape, classes, channels_last):
    from fastinterp.triton import cam_discrepancy as launch

    def maps():
        return _empty(*shape, dtype=dtype, channels_last=channels_last)

    acc = _accumulation(dtype)
    head = None if classes is None else _empty(classes, shape[1], dtype=acc)
    per_class = _empty(shape[0], shape[1] if classes is None else classes, dtype=acc)
    total = _empty(shape[0], dtype=acc)
    launch.cam_discrepancy_forward(maps(), maps(), head, per_class, norm, total, per_class)
    launch.cam_discrepancy_backward(per_class, maps(), maps(), head, per_class, norm, maps(), head)


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
        order = "channels_last" if channels_last else "NCHW"
        case = f"{norm} {dtype} {shape} K={classes or shape[1]} {order}"
        yield case, lambda a=(dtype, norm, shape, classes, channels_last): _cam_discrepancy(*a)


def _cuobjdump() -> str:
    import triton

    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(shipped) if shipped.is_file() else shutil.which("cuobjdump")
    if tool is None:
        raise SystemExit("benchmarks.resources: no cuobjdump in triton or on PATH")
    return tool


def _resources(cubin: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """(function name, {"REG": ..., "STACK": ..., ...}) of each function in ``cubin``."""
    listing = subprocess.run(
        [_cuobjdump(), "--dump-resource-usage", str(cubin)],
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


def triton_rows(arch: int, folder: Path) -> Iterator[Row]:
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, warmup, **kwargs):
        compiled.append(run(self, *args, warmup=True, **kwargs))

    seen = set()
    driver.set_active(_Driver(arch))
    with mock.patch.object(JITFunction, "run", compile_only):
        for case, launch in triton_cases():
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


def cuda_rows(arch: int, folder: Path) -> Iterator[Row]:
    for source in sorted(CUDA_SOURCES.glob("*.cu")):
        cubin = folder / f"{source.stem}.cubin"
        command = ["nvcc", "-cubin", f"-arch=sm_{arch}", "-std=c++17", "-O3", "-o", str(cubin)]
        subprocess.run([*command, str(source)], check=True)
        for name, usage in _resources(cubin):
            spill = usage["STACK"] + usage["LOCAL"]
            yield Row(_demangle(name), source.name, arch, usage["REG"], usage["SHARED"], spill)


def _demangle(name: str) -> str:
    if shutil.which("c++filt") is None:
        return name
    readable = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout
    match = re.search(r"(\w+<.*?>)\(", readable.replace("(anonymous namespace)::", ""))
    return match[1] if match else readable.strip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="as in sm_90")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 interprets kernels instead of compiling them; unset it")

    rows = []
    with tempfile.TemporaryDirectory() as name:
        for arch in args.arch:
            rows += triton_rows(arch, Path(name))
            if shutil.which("nvcc"):
                rows += cuda_rows(arch, Path(name))
    if not shutil.which("nvcc"):
        print("nvcc is not on PATH: csrc/cuda is left out", file=sys.stderr)

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
