"""The CUDA kernels without a GPU: compiled for the CPU, a fiber for every thread."""

import contextlib
import importlib.util
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accuracy_rule import assert_as_accurate
from network_checks import LAST, NCHW, NORM_CASES, NORM_SHAPES, check_batch_norm_act
from test_attack_step import inputs as step_inputs
from test_attack_step import plain as plain_step
from test_batch_norm_act import ACTIVATIONS
from test_kendall_tau import SIZES as ROWS
from test_kendall_tau import assert_same, scipy_tau
from test_kendall_tau import inputs as rows_inputs

from fastinterp.ops import _backend, attack_step, kendall_tau

BUILD = Path(__file__).parent / "cuda_emulation" / "build.py"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The module that tests/cuda_emulation makes; EMULATED_CUDA names one that was built before."""
    folder = os.environ.get("EMULATED_CUDA")
    if folder is None:
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            pytest.skip("needs a C++ compiler")
        folder = tmp_path_factory.mktemp("cuda")
        done = subprocess.run([sys.executable, BUILD, folder], capture_output=True, text=True)
        if "no cuda_runtime.h" in done.stderr:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
    (file,) = Path(folder).glob("_emulated*.so")
    spec = importlib.util.spec_from_file_location("_emulated", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _cuda_on_the_cpu(emulated, monkeypatch):
    """CPU tensors go where CUDA tensors would."""
    launched = []

    def run_cuda(kernel, device, *arguments):
        launched.append(kernel)
        getattr(emulated, kernel)(*arguments, 0)

    monkeypatch.setattr(_backend._native, "core", emulated)
    monkeypatch.setattr(_backend, "choose", lambda op, tensor: "cuda")
    monkeypatch.setattr(_backend, "run_cuda", run_cuda)
    # Buffers that a kernel should fill hold NaN before.
    empty_like, empty = torch.empty_like, torch.empty

    def poisoned(t):
        with contextlib.suppress(RuntimeError):
            t.fill_(math.nan) if t.is_floating_point() else t.fill_(85)
        return t

    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    yield
    assert launched


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", NORM_CASES, ids=str)
def test_batch_norm_act_activations(case, activation, training):
    check_batch_norm_act(case, torch.float32, activation, training)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_batch_norm_act_dtypes(dtype, activation):
    for case in (*NORM_CASES, *NORM_SHAPES[-3:]):
        check_batch_norm_act(case, dtype, activation, True)
        check_batch_norm_act(case, dtype, activation, False)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("case", NORM_SHAPES, ids=str)
def test_batch_norm_act_sizes(case, activation):
    check_batch_norm_act(case, torch.float32, activation, True)


# Whole pieces at 16-byte addresses, in both layouts, and chunks of more than one tile.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw", "channels_last"])
def test_batch_norm_act_aligned(layout, dtype):
    for size in ((8, 16, 16, 16), (4, 128, 8, 8)):
        check_batch_norm_act((size, layout, True, True), dtype, "relu", True)


@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_batch_norm_act_with_a_mean_of_a_thousand_standard_deviations(activation, layout):
    case = (8, 16, 9, 7), layout, True, True
    check_batch_norm_act(case, torch.float32, activation, True, shift=2e3)


@pytest.mark.parametrize("levels", [None, 5], ids=["distinct", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kendall_tau(dtype, levels):
    for size in (*ROWS[2:], (2, 256), (2, 257), (1, 512), (1, 700)):
        a, b = rows_inputs(size, dtype, levels)
        assert_same(kendall_tau(a, b), scipy_tau(a, b))
    a[0, 3] = math.nan
    assert kendall_tau(a, b)[0].isnan()


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (4, 1, 28, 28), (3, 3, 37, 41)], ids=str)
def test_attack_step(shape, dtype, norm, per_example):
    tensors = step_inputs(shape, dtype)
    eps, step = (0.15, 0.05) if norm == "Linf" else (0.8, 0.5)
    if per_example:
        eps = eps * (torch.arange(shape[0], dtype=torch.float64) + 0.5)
    value = attack_step(*tensors, eps=eps, step_size=step, norm=norm, clip=(0.1, 0.9))
    eps = torch.as_tensor(eps, dtype=torch.float64).reshape((-1,) + (1,) * (len(shape) - 1))
    exact = plain_step(*(t.double() for t in tensors), eps, step, norm, (0.1, 0.9))
    plain = plain_step(*tensors, eps.to(dtype), step, norm, (0.1, 0.9))
    assert_as_accurate(value, plain, exact, factor=2)
