"""Predicted bytes of the GPU kernels against the floor, without a GPU.

    python -m benchmarks.traffic [--csv FILE]

The Triton launchers are called on meta tensors and each launch is noted instead of made; of the
CUDA C++ kernels, whose launches are in csrc, it is written here what they take. A kernel counts
every tensor it is given once; what it reads a second time comes from a cache. A is one tensor like
x. The floor is what the order has to read and write with one pass for its sums and one that uses
them: tensors like x and bits of masks, no partial sums and no values per channel.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from tabulate import tabulate

from benchmarks.resources import empty
from fastinterp import _native

BANDWIDTH = 3.35e12  # bytes a second of an H100


class Row(NamedTuple):
    case: str
    order: str
    kernel: str
    mb: float
    a: float
    floor_a: float | None  # of the whole order, in its last row
    us: float  # at BANDWIDTH


def _nbytes(arguments) -> int:
    total = 0
    for a in arguments:
        if isinstance(a, torch.Tensor):
            total += a.numel() * a.element_size()
        elif isinstance(a, tuple):
            total += _nbytes(a)
    return total


def _orders(case, x, orders) -> Iterator[Row]:
    """``orders``: (name, call of a launcher, floor in bytes)."""
    from triton.runtime.jit import JITFunction

    unit = _nbytes([x])
    for order, call, floor in orders:
        launches = []

        def note(kernel, *arguments, launches=launches, **_):
            launches.append((kernel.__name__, _nbytes(arguments)))

        with mock.patch.object(JITFunction, "run", note):
            call()
        launches.append(("together", sum(size for _, size in launches)))
        for i, (kernel, size) in enumerate(launches, 1):
            of_order = floor / unit if i == len(launches) else None
            yield Row(
                case, order, kernel, size / 1e6, size / unit, of_order, size / BANDWIDTH * 1e6
            )


def _batch_norm_relu(shape, dtype, channels_last, with_residual):
    from fastinterp.triton._batch_norm_act_second import batch_norm_act_backward_backward as second
    from fastinterp.triton.batch_norm_act import batch_norm_act_backward, batch_norm_act_forward

    x = empty(*shape, dtype=dtype, channels_last=channels_last)
    vector, nothing = empty(shape[1], dtype=torch.float32), (None, None)
    rows = importlib.import_module("fastinterp.ops.batch_norm_act")._rows(x)
    residual = mask = None
    if with_residual:
        residual, mask = x, empty(rows[0], -(-rows[1] // 8), dtype=torch.uint8)
    affine, kind = (vector,) * 4, (True, 1e-5, "relu", 0.0)
    given, a, bits = (x, None, mask), _nbytes([x]), _nbytes([mask])
    order = "channels_last" if channels_last else "NCHW"
    case = f"batch norm + relu{' + residual' * with_residual} {shape} {dtype} {order}"
    orders = (
        (
            "forward",
            lambda: batch_norm_act_forward(
                (x, residual, mask), affine, *nothing, x, vector, kind, rows
            ),
            (3 + with_residual) * a + bits,
        ),
        (
            "backward",
            lambda: batch_norm_act_backward(
                given, affine, x, None, x, residual, vector, vector, kind, rows
            ),
            (5 + with_residual) * a + 2 * bits,
        ),
        (
            "second",
            lambda: second(
                *(given, affine, x, (x, residual, None, None), (vector, vector), x, x),
                *(None, vector, vector, kind, rows),
            ),
            (8 + with_residual) * a + 2 * bits,
        ),
    )
    yield from _orders(case, x, orders)


def _cuda_orders(case, x, orders) -> Iterator[Row]:
    """``orders``: (name, {kernel: the tensors it reads and writes}, floor in bytes)."""
    unit = _nbytes([x])
    for order, kernels, floor in orders:
        sizes = {kernel: _nbytes(tensors) for kernel, tensors in kernels.items()}
        sizes["together"] = sum(sizes.values())
        for kernel, size in sizes.items():
            last = floor / unit if kernel == "together" else None
            case_row = f"{case} CUDA C++", order, kernel
            yield Row(*case_row, size / 1e6, size / unit, last, size / BANDWIDTH * 1e6)


def _cuda_batch_norm_relu(shape, dtype, channels_last, with_residual):
    """What csrc/cuda/batch_norm_act.cu launches; how it cuts the tensor is asked of the core."""
    op = importlib.import_module("fastinterp.ops.batch_norm_act")
    x = empty(*shape, dtype=dtype, channels_last=channels_last)
    vector, values = (empty(n * shape[1], dtype=torch.float32) for n in (1, 6))
    kind = True, 1e-5, "relu", 0.0
    scratch = _native.core.cuda_batch_norm_act_scratch_bytes(op._header(x, kind))
    partial = empty((scratch - _nbytes([values])) // 40, dtype=torch.float32)  # 4 bytes, 10 sums
    rows, mask, residual = op._rows(x), None, None
    if with_residual:
        residual, mask = x, empty(rows[0], -(-rows[1] // 8), dtype=torch.uint8)
    a, bits = _nbytes([x]), _nbytes([mask])
    order = "channels_last" if channels_last else "NCHW"
    case = f"batch norm + relu{' + residual' * with_residual} {shape} {dtype} {order}"
    affine, two, three = (vector,) * 4, (partial,) * 2, (partial,) * 3
    forward = {
        "statistics_kernel": (x, *two),
        "statistics_totals_kernel": (*two, vector, vector, vector),
        "forward_kernel": (x, residual, mask, x, *affine),
    }
    backward = {
        "backward_sums_kernel": (x, x, mask, *affine, *two),
        "backward_totals_kernel": (*two, vector, vector, vector, vector, vector, vector),
        "backward_kernel": (x, x, mask, *affine, vector, vector, x, residual),
    }
    second = {
        "second_sums_kernel": (x, x, x, mask, *affine, *three),
        "second_totals_kernel": (*three, values, *affine, vector, vector),
        "second_kernel": (x, x, x, residual, mask, *affine, values, x, x),
    }
    orders = (
        ("forward", forward, (3 + with_residual) * a + bits),
        ("backward", backward, (5 + with_residual) * a + 2 * bits),
        ("second", second, (8 + with_residual) * a + 2 * bits),
    )
    yield from _cuda_orders(case, x, orders)


def _cuda_attack_step(shape, dtype, norm):
    x, one = empty(*shape, dtype=dtype), empty(1, dtype=torch.float32)
    tensors = x, x, x, x, one, one  # an example of the L2 step stays in the caches
    kernels = {f"{norm.lower()}_kernel": tensors}
    orders = (("forward", kernels, 4 * _nbytes([x])),)
    yield from _cuda_orders(f"attack step {norm} {shape} {dtype}", x, orders)


def _cuda_kendall_tau(shape):
    a, tau = empty(*shape, dtype=torch.float32), empty(shape[0], dtype=torch.float64)
    partial = empty(_native.core.cuda_kendall_tau_scratch_bytes(*shape), dtype=torch.uint8)
    kernels = {"pairs_kernel": (a, a, tau)}
    if partial.numel():
        kernels = {"pairs_kernel": (a, a, partial), "totals_kernel": (partial, tau)}
    orders = (("forward", kernels, _nbytes([a, a, tau])),)
    yield from _cuda_orders(f"kendall tau {shape} {a.dtype}", a, orders)


def _activation(shape, dtype):
    from fastinterp.triton import activation as launch

    x = empty(*shape, dtype=dtype)
    a = _nbytes([x])
    orders = (
        ("forward", lambda: launch.activation_forward(x, "silu", 0.0, x), 2 * a),
        ("backward", lambda: launch.activation_backward(x, x, "silu", 0.0, x), 3 * a),
        (
            "second",
            lambda: launch.activation_backward_backward(x, x, x, "silu", 0.0, x, x),
            5 * a,
        ),
    )
    yield from _orders(f"silu {shape} {dtype}", x, orders)


def _max_pool2d(shape, dtype):
    from fastinterp.triton import max_pool2d as launch

    x, pooled = empty(*shape, dtype=dtype), (*shape[:2], shape[2] // 2, shape[3] // 2)
    y, offsets = empty(*pooled, dtype=dtype), empty(*pooled, dtype=torch.uint8)
    window = (2, 2), (2, 2), (0, 0), (1, 1)
    all_once = _nbytes([x, y, offsets])
    orders = (
        ("forward", lambda: launch.max_pool2d_forward(x, y, offsets, False, window), all_once),
        ("backward", lambda: launch.max_pool2d_scatter(y, offsets, x, False, window), all_once),
        ("second", lambda: launch.max_pool2d_gather(x, offsets, y, False, window), all_once),
    )
    yield from _orders(f"max pool 2x2 {shape} {dtype}", x, orders)


def _cross_entropy(shape, dtype):
    from fastinterp.triton import cross_entropy as launch

    z, target = empty(*shape, dtype=dtype), empty(shape[0], dtype=torch.int64)
    shift, losses = empty(shape[0], 2, dtype=torch.float32), empty(shape[0], dtype=torch.float32)
    one, how, a = empty(dtype=torch.float32), ("mean", 0.0, -100), _nbytes([z])
    saved = z, target, shift, one
    orders = (
        ("forward", lambda: launch.cross_entropy_forward(*saved, losses, one, how), a),
        ("backward", lambda: launch.cross_entropy_backward(one, *saved, z, how), 2 * a),
        (
            "second",
            lambda: launch.cross_entropy_backward_backward(z, one, *saved, losses, z, how),
            3 * a,
        ),
    )
    yield from _orders(f"cross entropy {shape} {dtype}", z, orders)


def _cuda_rows():
    bf16 = torch.bfloat16
    for shape in ((32, 64, 32, 32), (32, 512, 4, 4), (128, 64, 32, 32), (16, 256, 56, 56)):
        for channels_last in (False, True):
            yield from _cuda_batch_norm_relu(shape, bf16, channels_last, False)
    yield from _cuda_batch_norm_relu((32, 64, 32, 32), bf16, True, True)
    yield from _cuda_batch_norm_relu((32, 64, 32, 32), torch.float32, False, False)
    for norm in ("Linf", "L2"):
        yield from _cuda_attack_step((64, 3, 224, 224), torch.float32, norm)
    for shape in ((200, 49), (200, 1024)):
        yield from _cuda_kendall_tau(shape)


def rows() -> Iterator[Row]:
    bf16 = torch.bfloat16
    for shape in ((32, 64, 32, 32), (32, 512, 4, 4), (128, 64, 32, 32), (16, 256, 56, 56)):
        for channels_last in (False, True):
            yield from _batch_norm_relu(shape, bf16, channels_last, False)
    yield from _batch_norm_relu((32, 64, 32, 32), bf16, True, True)
    yield from _batch_norm_relu((32, 64, 32, 32), torch.float32, False, False)
    if getattr(_native.core, "cuda_architectures", None):
        yield from _cuda_rows()
    yield from _activation((32, 64, 32, 32), bf16)
    yield from _max_pool2d((50, 32, 28, 28), bf16)
    yield from _cross_entropy((256, 1000), bf16)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__)
    parser.add_argument("--csv", type=Path, help="also write the table here")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 interprets kernels instead of launching them; unset it")
    table = list(rows())
    print(tabulate(table, Row._fields, floatfmt=".2f"))
    if args.csv:
        with args.csv.open("w", newline="") as file:
            csv.writer(file).writerows([Row._fields, *table])
    return 0


if __name__ == "__main__":
    sys.exit(main())
