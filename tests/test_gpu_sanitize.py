"""Every CUDA kernel and one of Triton's, on tensors small enough for compute-sanitizer."""

import pytest
import torch
from network_checks import LAST, NCHW, check_activation, check_batch_norm_act
from test_activation import SMOOTH
from test_attack_step import inputs as step_inputs
from test_kendall_tau import assert_same, scipy_tau
from test_kendall_tau import inputs as rows_inputs

from fastinterp.ops import attack_step, kendall_tau

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def cuda_backend(monkeypatch):
    monkeypatch.setenv("FASTINTERP_BACKEND", "cuda")


@pytest.mark.parametrize("kind", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw", "channels_last"])
def test_batch_norm_act(cuda_backend, layout, dtype, kind):
    for size in ((4, 16, 8, 8), (3, 5, 7, 3)):  # whole pieces and not
        check_batch_norm_act((size, layout, True, True), dtype, kind, True, device="cuda")


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1024), (3, 37)], ids=str)
def test_attack_step(cuda_backend, shape, dtype, norm):
    tensors = [t.cuda() for t in step_inputs(shape, dtype)]
    assert attack_step(*tensors, eps=0.2, step_size=0.1, norm=norm).isfinite().all()


def test_kendall_tau(cuda_backend):
    for size in ((3, 49), (2, 257)):
        a, b = rows_inputs(size, torch.float32, 9)
        assert_same(kendall_tau(a.cuda(), b.cuda()).cpu(), scipy_tau(a, b))


def test_triton_activation(monkeypatch):
    monkeypatch.setenv("FASTINTERP_BACKEND", "triton")
    check_activation((37, 5), torch.float32, SMOOTH[0], device="cuda")
