import subprocess
import sys
import types
import warnings

import pytest
import torch

from fastinterp.ops import _backend, attack_step


def step(dtype=torch.float32):
    x = torch.rand(2, 4).to(dtype)
    return attack_step(x, x, x, eps=0.1, step_size=0.1)


def test_automatic_choice_is_the_compiled_kernel(monkeypatch):
    monkeypatch.delenv("FASTINTERP_BACKEND", raising=False)
    assert _backend.choose("attack_step", torch.zeros(1)) == "cpu"


def test_automatic_choice_falls_back_with_one_warning(monkeypatch):
    monkeypatch.delenv("FASTINTERP_BACKEND", raising=False)
    monkeypatch.setattr(_backend, "_chosen", {})
    with pytest.warns(RuntimeWarning, match=r"slower .* there is no torch.float16 kernel"):
        step(torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(torch.float16)


def test_a_backend_asked_for_by_name_must_run(monkeypatch):
    monkeypatch.setenv("FASTINTERP_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="FASTINTERP_BACKEND=cuda cannot run .* are on cpu"):
        step()
    monkeypatch.setenv("FASTINTERP_BACKEND", "fastest")
    with pytest.raises(ValueError, match="'fastest' is not a backend; use one of auto"):
        step()


def test_without_the_compiled_core(monkeypatch):
    monkeypatch.setattr(_backend._native, "core", None)
    monkeypatch.setattr(_backend._native, "problem", "it was not built")
    monkeypatch.setattr(_backend, "_chosen", {})
    with pytest.warns(RuntimeWarning, match="it was not built"):
        step()


NO_TRITON = "triton is not installed: pip install triton"
NO_NVCC = "fastinterp was built without nvcc: put it on PATH and reinstall"
ON_CPU = "the tensors are on cpu"
ON_GPU = "the tensors are on cuda"
NO_KERNEL = "there is no such kernel"


@pytest.fixture
def installed(monkeypatch):
    """installed(nvcc=..., triton=...): what the choice finds here."""

    def arrange(nvcc, triton):
        core = types.ModuleType("core")
        core.cuda_architectures = "80-real 90" if nvcc else None
        monkeypatch.setattr(_backend._native, "core", core)
        monkeypatch.setattr(_backend, "_chosen", {})
        found = object() if triton else None
        monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: found)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    return arrange


@pytest.mark.parametrize(
    ("op", "nvcc", "triton", "chosen", "reasons"),
    [
        ("batch_norm_act", True, True, "cuda", {}),
        ("batch_norm_act", False, True, "triton", {"cuda": NO_NVCC}),
        ("batch_norm_act", False, False, "reference", {"cuda": NO_NVCC, "triton": NO_TRITON}),
        ("batch_norm_act", True, False, "cuda", {}),
        ("max_pool2d", True, True, "triton", {}),  # which has no CUDA C++ kernel
        ("max_pool2d", True, False, "reference", {"triton": NO_TRITON}),
    ],
)
def test_a_gpu_tensor_goes_to_cuda_then_triton_then_the_reference(
    monkeypatch, installed, op, nvcc, triton, chosen, reasons
):
    monkeypatch.delenv("FASTINTERP_BACKEND", raising=False)
    installed(nvcc, triton)
    assert _backend.decide(op, "cuda", torch.float32) == (chosen, reasons)
    gpu = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [_backend.choose(op, gpu) for _ in range(3)] == [chosen] * 3
    assert len(caught) == (chosen == "reference")
    assert all(reason in str(caught[0].message) for reason in reasons.values() if caught)


@pytest.mark.parametrize(
    ("name", "device", "nvcc", "triton", "problem"),
    [
        ("cpu", "cpu", True, True, None),
        ("cpu", "cuda", True, True, ON_GPU),
        ("cuda", "cuda", True, True, None),
        ("cuda", "cpu", True, True, ON_CPU),
        ("cuda", "cuda", False, True, NO_NVCC),
        ("triton", "cuda", True, True, None),
        ("triton", "cuda", True, False, NO_TRITON),
        ("triton", "cpu", True, True, "cpu tensors need TRITON_INTERPRET=1"),
        ("reference", "cpu", False, False, None),
        ("reference", "cuda", False, False, None),
    ],
)
def test_a_backend_by_name_runs_or_raises(
    monkeypatch, installed, name, device, nvcc, triton, problem
):
    installed(nvcc, triton)
    monkeypatch.setenv("FASTINTERP_BACKEND", name)
    if problem is None:
        assert _backend.decide("attack_step", device, torch.float32) == (name, {})
        return
    message = f"FASTINTERP_BACKEND={name} cannot run fastinterp::attack_step .*{problem}"
    with pytest.raises(RuntimeError, match=message):
        _backend.decide("attack_step", device, torch.float32)
    monkeypatch.setenv("FASTINTERP_BACKEND", "auto")  # and off again
    assert _backend.decide("attack_step", device, torch.float32)[0] != name


def test_a_backend_by_name_without_a_kernel_of_the_op(monkeypatch, installed):
    installed(True, True)
    monkeypatch.setenv("FASTINTERP_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=f"fastinterp::max_pool2d .*{NO_KERNEL}"):
        _backend.decide("max_pool2d", "cuda", torch.float32)


def test_a_gpu_older_than_the_build_goes_to_triton(monkeypatch, installed):
    monkeypatch.delenv("FASTINTERP_BACKEND", raising=False)
    installed(True, True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    chosen, reasons = _backend.decide("attack_step", "cuda", torch.float32)
    assert chosen == "triton" and "this GPU is sm_75, older" in reasons["cuda"]


def test_import_needs_neither_torchvision_nor_triton_nor_sklearn():
    code = (
        "import sys, fastinterp, fastinterp.cli.train;"
        "print([m for m in ('torchvision', 'triton', 'sklearn', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_core_is_free_of_torch():
    from pathlib import Path

    sources = [p for p in (Path(__file__).parents[1] / "csrc").rglob("*") if p.is_file()]
    assert sources
    for path in sources:
        text = path.read_text()
        assert not any(word in text for word in ("torch/", "ATen", "c10/")), path
