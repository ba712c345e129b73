"""Tiles of a tensor with channels, and sums over each of them; for NCHW and channels_last alike.

The dense tensor is seen as rows of elements that follow each other in memory, as the bit mask of
ops/batch_norm_act.py is: ``rows`` rows of ``length`` elements.

    last    a row is                    its lanes (columns of partial sums) are
    False   a plane of one channel      one for each channel
    True    the channels of a pixel     its elements; the channel of a lane is lane % channels

Rows are cut into octets, eight elements of which the last ones of a row may be missing: a byte of
the mask, one or two accesses of 16 bytes. A program has a block of lanes (one channel, or some
octets of every row) and a chunk of the items in it (octets, or rows); it goes over its chunk in
tiles of [a, b, 8] elements.
"""

from math import gcd
from typing import NamedTuple

import triton
import triton.language as tl

_PROGRAMS = 1024  # enough for the device; fixed, so that results do not depend on it
_LEAST_STEPS = 2  # tiles a program, where its partial sums are as wide as a row


class Cut(NamedTuple):
    """What a kernel must know when it is compiled."""

    divisor: int  # of the length, so that Triton sees which accesses are aligned
    folded: bool  # a row has several pixels
    last: bool
    a: int
    b: int


class Plan(NamedTuple):
    """How a tensor is cut."""

    sizes: tuple[int, int, int, int]  # items, length / divisor, channels, steps
    grid: tuple[int, int]  # blocks of lanes, chunks
    lanes: int
    cut: Cut

    @property
    def parts(self):
        """Rows of the (parts, channels) table that (chunks, lanes) partial sums are."""
        return self.grid[1] * self.lanes // self.sizes[2]


def plan(rows, length, channels, last, octets_per_tile):
    """The plan for a tensor of ``rows`` rows of ``length`` elements; channels > 0."""
    octets = max(triton.cdiv(length, 8), 1)
    if last:
        b = min(8, triton.next_power_of_2(octets))
        items, lanes, blocks = rows, length, triton.cdiv(octets, b)
    else:
        b, items, lanes, blocks = 1, rows // channels * octets, channels, channels
    a = octets_per_tile // b
    tiles = triton.cdiv(items, a) if length else 0
    chunks = max(_PROGRAMS // blocks, 1)
    steps = max(triton.cdiv(tiles, chunks), _LEAST_STEPS if last else 1)
    divisor = gcd(length, 8)
    return Plan(
        (items if length else 0, length // divisor, channels, steps),
        (blocks, max(triton.cdiv(tiles, steps), 1)),
        lanes,
        Cut(divisor, last and length > channels, last, a, b),
    )


# Below, sizes is Plan.sizes.


@triton.jit
def lanes_of(sizes, CUT: tl.constexpr):
    """Lanes of this program, whether they exist, their channels: [1, b, 8], or one number."""
    block = tl.program_id(0)
    if CUT.last:
        octet = block * CUT.b + tl.arange(0, CUT.b)
        lane = octet[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
        there = lane < sizes[1] * CUT.divisor
        channel = lane % sizes[2] if CUT.folded else lane
    else:
        lane = block
        there = lane < sizes[2]
        channel = lane
    return lane, there, channel


@triton.jit
def vector(pointer, channel, there, otherwise, acc: tl.constexpr):
    """Values per channel, ``otherwise`` where there is no vector."""
    if pointer is None:
        values = tl.full(channel.shape, otherwise, acc)
    else:
        values = tl.load(pointer + channel, there, 0.0).to(acc)
    return values


@triton.jit
def chunk_of(sizes, CUT: tl.constexpr):
    """First tile of this program and the one after its last."""
    begin = tl.program_id(1) * sizes[3]
    return begin, tl.minimum(begin + sizes[3], tl.cdiv(sizes[0], CUT.a))


@triton.jit
def tile(t, sizes, CUT: tl.constexpr):
    """(offset, inside) of the elements of tile t, [a, b, 8], then of its bytes of the mask."""
    block = tl.program_id(0)
    length = sizes[1] * CUT.divisor
    octets = tl.maximum(tl.cdiv(length, 8), 1)
    item = t * CUT.a + tl.arange(0, CUT.a)
    here = (item < sizes[0])[:, None]
    if CUT.last:
        row = item.to(tl.int64)[:, None]
        octet = (block * CUT.b + tl.arange(0, CUT.b))[None, :]
        here = here & (octet < octets)
    else:
        row = ((item // octets).to(tl.int64) * sizes[2] + block)[:, None]
        octet = (item % octets)[:, None]
    j = octet[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    inside = here[:, :, None] & (j < length)
    return row[:, :, None] * length + j, inside, row * octets + octet, here


@triton.jit
def elements(begin, end, sizes, CUT: tl.constexpr):
    """How many elements each lane has in the tiles from begin to end."""
    return _elements_until(end, sizes, CUT) - _elements_until(begin, sizes, CUT)


@triton.jit
def _elements_until(t, sizes, CUT: tl.constexpr):
    count = tl.minimum(t * CUT.a, sizes[0])
    if not CUT.last:
        length = sizes[1] * CUT.divisor
        octets = tl.maximum(tl.cdiv(length, 8), 1)
        count = count // octets * length + count % octets * 8  # only a row's last is incomplete
    return count


@triton.jit
def load(pointer, at, acc: tl.constexpr):
    """The elements of a tile in the accumulation type; zeros outside, and for None."""
    if pointer is None:
        values = tl.zeros(at[0].shape, acc)
    else:
        values = tl.load(pointer + at[0], at[1], 0.0).to(acc)
    return values


@triton.jit
def plus(values, pointer, at):
    """values + the elements of a tile, if there is a tensor."""
    if pointer is not None:
        values += load(pointer, at, values.dtype)
    return values


@triton.jit
def store(pointer, at, values):
    if pointer is not None:
        tl.store(pointer + at[0], values.to(pointer.dtype.element_ty), at[1])


@triton.jit
def load_bits(mask, at):
    """Whether the bit of each element is set."""
    byte = tl.load(mask + at[2], at[3], 0).to(tl.int32)
    return (byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1 != 0


@triton.jit
def store_bits(mask, at, bits):
    byte = tl.sum((bits & at[1]).to(tl.int32) << tl.arange(0, 8)[None, None, :], 2)
    tl.store(mask + at[2], byte.to(tl.uint8), at[3])


@triton.jit
def over_tile(values, CUT: tl.constexpr):
    """Sums of a tile for each lane."""
    if CUT.last:
        values = tl.sum(values, 0, keep_dims=True)
    else:
        values = tl.sum(tl.sum(tl.sum(values, 2), 1), 0)
    return values


@triton.jit
def store_part(partial, s, sizes, values, CUT: tl.constexpr):
    """Sum s of this program to ``partial``, (sums, chunks, lanes)."""
    lane, there, _ = lanes_of(sizes, CUT)
    lanes = sizes[1] * CUT.divisor if CUT.last else sizes[2]
    row = (s * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    tl.store(partial + row * lanes + lane, values, there)


@triton.jit
def totals(partial, parts, channels, c, SUMS: tl.constexpr, S: tl.constexpr, T: tl.constexpr):
    """The SUMS partial sums of channels c over all parts, [S >= SUMS, channels], in float64."""
    s = tl.arange(0, S)[:, None, None]
    sums = tl.zeros([S, c.shape[0]], tl.float64)
    for first in range(0, parts, T):
        t = (first + tl.arange(0, T))[None, :, None]
        inside = (s < SUMS) & (t < parts) & (c < channels)[None, None, :]
        row = (s * parts + t).to(tl.int64)
        sums += tl.sum(tl.load(partial + row * channels + c, inside, 0.0).to(tl.float64), 1)
    return sums


@triton.jit
def plane(k, channels):
    """Where vector k of a table of vectors begins; each is as wide as ``padded`` says."""
    return k * (tl.cdiv(channels, 8) * 8)


def padded(channels):
    """Width of a table of vectors, so that each is aligned."""
    return triton.cdiv(channels, 8) * 8


@triton.jit
def pick(sums, s):
    """Row s of what ``totals`` gives."""
    rows = tl.arange(0, sums.shape[0])[:, None]
    return tl.sum(tl.where(rows == s, sums, 0.0), 0)
