"""Fixtures shared by the tests. Real data and released weights lie beside the repository."""

import os
import sys
from pathlib import Path

# The workers of pytest-xdist share the cores, and the processes that tests start inherit it.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import torch

if not torch.cuda.is_available():
    # Triton kernels are decorated at import and must know by then that they are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
sys.path.append(str(ROOT))  # for benchmarks; last, so that fastinterp is the installed one


def pytest_collection_modifyitems(items):
    # The longest by far goes first, so that no worker is left alone with it at the end.
    items.sort(key=lambda item: item.path.name != "test_resources.py")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", "reference"])
def backend(request, monkeypatch):
    """Runs a test once with the compiled CPU kernels and once with the plain torch reference."""
    monkeypatch.setenv("FASTINTERP_BACKEND", request.param)
    return request.param


@pytest.fixture(scope="session")
def data_dir():
    folder = SHARED / "data"
    if not (folder / "mnist").is_dir():
        pytest.skip(f"MNIST is not in {folder}")
    return folder


@pytest.fixture(scope="session")
def released():
    """Folder of the networks that the paper's authors released."""
    folder = SHARED / "reference"
    if not folder.is_dir():
        pytest.skip(f"the released weights are not in {folder}")
    return folder


@pytest.fixture
def small_net():
    from fastinterp.models import create_model, init_paper

    net = create_model("small", 1, 10)
    init_paper(net, np.random.RandomState(99))
    return net


@pytest.fixture
def saved_net(tmp_path, monkeypatch):
    """An untrained Small whose weights are net.safetensors in the current folder, a new one."""
    from safetensors.torch import save_file

    from fastinterp.models import create_model

    monkeypatch.chdir(tmp_path)
    net = create_model("small", 1, 10)
    save_file(net.state_dict(), "net.safetensors")
    return net


@pytest.fixture
def batch():
    """Eight 28x28 images in [0,1] and labels."""
    return torch.rand(8, 1, 28, 28), torch.randint(0, 10, (8,))
