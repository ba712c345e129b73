import subprocess
import sys
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
