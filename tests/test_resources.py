"""Every GPU kernel compiles without a GPU, and none spills registers."""

import ast
import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.resources import built_architectures

ROOT = Path(__file__).parents[1]

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)


def run(*arguments, module="benchmarks.resources", **environment):
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
    )


def triton_kernels():
    """Functions of fastinterp.triton that are launched: those named *_kernel."""
    for file in (ROOT / "fastinterp" / "triton").glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                yield node.name


def cuda_kernels():
    for file in (ROOT / "csrc" / "cuda").glob("*.cu"):
        yield from re.findall(r"__global__[^;{]*?(\w+_kernel)\(", file.read_text())


@pytest.mark.timeout(1800)  # hundreds of kernels, one after the other
@pytest.mark.parametrize(
    "arch", [90, *(pytest.param(a, marks=pytest.mark.slow) for a in (80, 100))], ids="sm_{}".format
)
def test_no_kernel_spills(tmp_path, arch):
    table = tmp_path / "resources.csv"
    result = run("--arch", str(arch), "--csv", str(table))
    assert result.returncode == 0, result.stdout + result.stderr
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = set(triton_kernels())
    if arch in built_architectures() or shutil.which("nvcc"):
        expected |= set(cuda_kernels())
    missing = {name for name in expected if not any(name in row["kernel"] for row in rows)}
    assert not missing, f"add a case to benchmarks/resources.py for {missing}"
    for row in rows:
        assert row["spill_bytes"] == "0"
        assert 0 < int(row["registers"]) <= 255
        assert row["arch"] == str(arch)


def test_predicted_traffic_is_near_the_floor(tmp_path):
    table = tmp_path / "traffic.csv"
    result = run("--csv", str(table), module="benchmarks.traffic")
    assert result.returncode == 0, result.stdout + result.stderr
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    totals = [row for row in rows if row["kernel"] == "together"]
    assert {row["order"] for row in totals} == {"forward", "backward", "second"}
    for row in totals:  # beyond the floor: partial sums and values per channel
        assert 1 <= float(row["a"]) / float(row["floor_a"]) < 1.1, row


@pytest.mark.parametrize("module", ["benchmarks.resources", "benchmarks.traffic"])
def test_interpreted_kernels_are_refused(module):
    result = run(module=module, TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "TRITON_INTERPRET=1" in result.stderr
