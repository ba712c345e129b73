"""Kendall's tau-b against scipy's, with the compiled kernel, plain torch and interpreted Triton."""

import importlib.util
import math
import os

import pytest
import scipy.stats
import torch

from fastinterp import _native
from fastinterp.ops import kendall_tau

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Nothing, one column, one pair, a map of 7x7, and rows in more than one tile
SIZES = [(0, 5), (3, 0), (3, 1), (4, 2), (5, 3), (9, 49), (3, 64), (2, 97)]


def scipy_tau(a, b):
    tau = [
        scipy.stats.kendalltau(p, q, variant="b").statistic if len(p) > 1 else math.nan
        for p, q in zip(a.double().numpy(), b.double().numpy(), strict=True)
    ]
    return torch.tensor(tau, dtype=torch.float64)


def inputs(size, dtype=torch.float32, levels=None):
    """Two correlated matrices; with ``levels`` of integers and so with many ties."""
    a = torch.randn(size, dtype=torch.float64)
    b = 0.5 * a + torch.randn(size, dtype=torch.float64)
    if levels is not None:
        a, b = (t.mul(levels / 4).round() for t in (a, b))
    return a.to(dtype), b.to(dtype)


def assert_same(value, expected):
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected, rtol=0, atol=4e-16, equal_nan=True)


@pytest.fixture(params=["cpu", "reference", "triton"])
def backend(request, monkeypatch):
    if request.param == "triton" and (
        importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1"
    ):
        pytest.skip("needs triton and TRITON_INTERPRET=1; on a GPU run tests/test_gpu.py")
    monkeypatch.setenv("FASTINTERP_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("levels", [None, 2, 9], ids=["distinct", "two levels", "nine levels"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_scipy(backend, dtype, levels):
    for size in SIZES:
        a, b = inputs(size, dtype, levels)
        assert_same(kendall_tau(a, b), scipy_tau(a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [511, 512, 1024, 2051, 5000])
def test_long_rows(monkeypatch, columns, dtype):
    """Counted, or sorted: whichever the kernel takes."""
    monkeypatch.setenv("FASTINTERP_BACKEND", "cpu")
    for levels in (None, 3, 200):
        a, b = inputs((2, columns), dtype, levels)
        assert_same(kendall_tau(a, b), scipy_tau(a, b))


def test_hand_written_values(backend):
    a = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 1, 2, 2], [0.0, -0.0, 1, 2]])
    b = torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1], [1, 2, 1, 2], [5, 6, 7, 8]])
    # In the last row the zeros are one tie of six pairs: 5 / sqrt(5 * 6).
    expected = torch.tensor([1.0, -1.0, 0.0, math.sqrt(5 / 6)], dtype=torch.float64)
    assert_same(kendall_tau(a, b), expected)


def test_constant_rows_and_nans_are_nan_and_infinities_are_values(backend):
    inf, nan = math.inf, math.nan
    a = torch.tensor(
        [[1.0, 1, 1], [1, 2, 3], [nan, 1, 2], [1, 2, 3], [-inf, 0, inf], [inf, inf, 1]]
    )
    b = torch.tensor([[1.0, 2, 3], [2, 2, 2], [1, 2, 3], [1, 2, nan], [-9, inf, inf], [1, 2, 0]])
    value = kendall_tau(a, b)
    assert value[:4].isnan().all() and value[4:].isfinite().all()
    assert_same(value, scipy_tau(a, b))
    if backend == "cpu":  # also where long rows are sorted
        a, b = a.repeat(1, 700), b.repeat(1, 700)
        assert_same(kendall_tau(a, b), scipy_tau(a, b))


def test_close_float64_values_are_no_ties(backend):
    a = 1 + torch.finfo(torch.float64).eps * torch.tensor([[0.0, 1, 2, 3]], dtype=torch.float64)
    b = torch.tensor([[1.0, 2, 3, 4]])
    assert kendall_tau(a, b) == 1 and kendall_tau(b, a) == 1


def test_views(backend):
    a, b = inputs((6, 12), torch.float64)
    expected = scipy_tau(a[::2, 1::3], b[1::2, ::3])
    assert_same(kendall_tau(a[::2, 1::3], b[1::2, ::3]), expected)
    assert_same(kendall_tau(a[:1].expand(6, 12), b), scipy_tau(a[:1].expand(6, 12), b))
    assert_same(kendall_tau(a.t(), b.t()), scipy_tau(a.t(), b.t()))


def test_same_with_any_number_of_threads(monkeypatch):
    monkeypatch.setenv("FASTINTERP_BACKEND", "cpu")
    threads = torch.get_num_threads()
    try:
        for columns in (49, 3000):
            a, b = inputs((37, columns))
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(kendall_tau(a, b))
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(threads)


def test_every_result_is_written():
    a, b = inputs((9, 33))
    tau = torch.full((11,), math.nan, dtype=torch.float64)
    _native.core.cpu_kendall_tau(0, 9, 33, a.data_ptr(), b.data_ptr(), tau[1:].data_ptr(), 1)
    assert tau[1:-1].isfinite().all() and tau[[0, -1]].isnan().all()


def test_opcheck(backend):
    a, b = inputs((3, 8))
    torch.library.opcheck(torch.ops.fastinterp.kendall_tau.default, (a, b))


def test_vmap(backend):
    a, b = inputs((5, 2, 9), levels=4)
    expected = torch.stack([scipy_tau(p, q) for p, q in zip(a, b, strict=True)])
    assert_same(torch.vmap(kendall_tau)(a, b), expected)
    expected = torch.stack([scipy_tau(p, b[0]) for p in a])
    assert_same(torch.vmap(kendall_tau, in_dims=(0, None))(a, b[0]), expected)


def test_has_no_derivative(backend):
    a, b = inputs((3, 8))
    tau = kendall_tau(a.requires_grad_(), b)
    with pytest.raises(NotImplementedError, match="kendall_tau has no derivative"):
        tau.sum().backward()


@pytest.mark.parametrize(
    ("a", "b", "error", "match"),
    [
        (torch.rand(3), torch.rand(3), ValueError, r"must both be \(N, M\), got \(3,\)"),
        (torch.rand(2, 3), torch.rand(2, 4), ValueError, r"got \(2, 3\) and \(2, 4\); flatten"),
        (torch.zeros(2, 3).long(), torch.rand(2, 3), TypeError, "a must be a floating point"),
        (torch.rand(2, 3), torch.zeros(2, 3).bool(), TypeError, "b must be .* got torch.bool"),
        (torch.rand(2, 3), torch.rand(2, 3, device="meta"), ValueError, "b must be on cpu like a"),
    ],
)
def test_bad_input(a, b, error, match):
    with pytest.raises(error, match=match):
        kendall_tau(a, b)
