"""Kendall's tau-b as Triton kernels: the pairs of each row are compared in square tiles.

A tile on the diagonal counts its pairs i > j, a tile below it all of its pairs. Counts are
integers, so any order of the sums gives the same.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 32


@triton.jit
def _tiles_kernel(
    a,  # (N, M), as b
    b,
    partial,  # (N, tiles, 4): agreement, pairs that differ in a, in b, elements that are NaN
    columns,
    tiles,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    a += row * columns
    b += row * columns
    i = tile * BLOCK + tl.arange(0, BLOCK)
    ai = tl.load(a + i, i < columns, 0.0)
    bi = tl.load(b + i, i < columns, 0.0)
    zeros = tl.zeros([BLOCK, BLOCK], tl.int32)  # a place counts at most one pair a tile
    agreement, differ_a, differ_b = zeros, zeros, zeros
    for other in range(0, tile + 1):
        j = other * BLOCK + tl.arange(0, BLOCK)
        aj = tl.load(a + j, j < columns, 0.0)[None, :]
        bj = tl.load(b + j, j < columns, 0.0)[None, :]
        pair = (i[:, None] < columns) & (j[None, :] < i[:, None])
        sign_a = (ai[:, None] > aj).to(tl.int32) - (ai[:, None] < aj).to(tl.int32)
        sign_b = (bi[:, None] > bj).to(tl.int32) - (bi[:, None] < bj).to(tl.int32)
        agreement += tl.where(pair, sign_a * sign_b, 0)
        differ_a += tl.where(pair, sign_a * sign_a, 0)
        differ_b += tl.where(pair, sign_b * sign_b, 0)
    nans = (ai != ai).to(tl.int32) + (bi != bi).to(tl.int32)
    partial += (row * tiles + tile) * 4
    tl.store(partial, tl.sum(tl.sum(agreement, 1).to(tl.int64), 0))
    tl.store(partial + 1, tl.sum(tl.sum(differ_a, 1).to(tl.int64), 0))
    tl.store(partial + 2, tl.sum(tl.sum(differ_b, 1).to(tl.int64), 0))
    tl.store(partial + 3, tl.sum(nans.to(tl.int64), 0))


@triton.jit
def _totals_kernel(partial, tau, tiles, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    agreement = tl.zeros([BLOCK], tl.int64)
    differ_a, differ_b, nans = agreement, agreement, agreement
    for start in range(0, tiles, BLOCK):
        t = start + tl.arange(0, BLOCK)
        part = partial + (row * tiles + t) * 4
        agreement += tl.load(part, t < tiles, 0)
        differ_a += tl.load(part + 1, t < tiles, 0)
        differ_b += tl.load(part + 2, t < tiles, 0)
        nans += tl.load(part + 3, t < tiles, 0)
    pairs_a = tl.sum(differ_a, 0)
    pairs_b = tl.sum(differ_b, 0)
    known = (tl.sum(nans, 0) == 0) & (pairs_a > 0) & (pairs_b > 0)
    root_a = tl.sqrt(tl.where(known, pairs_a, 1).to(tl.float64))
    root_b = tl.sqrt(tl.where(known, pairs_b, 1).to(tl.float64))
    value = tl.sum(agreement, 0).to(tl.float64) / root_a / root_b
    value = tl.minimum(tl.maximum(value, -1.0), 1.0)
    tl.store(tau + row, tl.where(known, value, float("nan")))


def kendall_tau(a, b, tau):
    """Fills tau.

    Args:
        a, b: (N, M), contiguous, both float32 or both float64.
        tau: (N,) float64.
    """
    rows, columns = a.shape
    tiles = triton.cdiv(columns, _BLOCK)
    partial = torch.empty(rows, tiles, 4, dtype=torch.int64, device=a.device)
    with torch.cuda.device_of(a):  # Triton launches on the current device
        if tiles:
            _tiles_kernel[tiles, rows](a, b, partial, columns, tiles, BLOCK=_BLOCK, num_warps=4)
        _totals_kernel[(rows,)](partial, tau, tiles, BLOCK=64, num_warps=1)
