"""fastinterp info: versions, processor features, and which op runs on which backend and why."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform

import torch
from jsonargparse import ArgumentParser
from tabulate import tabulate

import fastinterp
from fastinterp import _native
from fastinterp.ops import _backend

HELP = "versions, processor features and the backend of every op"
PACKAGES = ("torch", "torchvision", "triton", "numpy", "safetensors", "pyautoattack")


def parser(argv: list[str]) -> ArgumentParser:
    info = ArgumentParser(description=__doc__)
    info.add_argument("--json", action="store_true", help="print JSON")
    return info


def collect() -> dict:
    """Everything the command prints, as plain values."""
    return {
        "versions": {
            "fastinterp": fastinterp.__version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
        },
        "cpu": {
            "machine": platform.machine(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "gpu": _gpu(),
        "core": _core(),
        "requested_backend": os.environ.get("FASTINTERP_BACKEND", "auto"),
        "ops": _ops(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return {"name": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}


def _core() -> dict:
    if _native.core is None:
        return {"problem": _native.problem}
    return {
        "compiler": _native.core.compiler,
        "instruction_set": _native.core.instruction_set,
        "cuda_architectures": _native.core.cuda_architectures,
    }


def _ops() -> list[dict]:
    """One row per op and device: the backend that float32 tensors get, and what the others lack."""
    rows = []
    for op in sorted(_backend.KERNELS):
        for device in ("cpu", "cuda"):
            try:
                backend, lacking = _backend.decide(op, device, torch.float32)
            except RuntimeError as error:
                backend, lacking = "error", {"requested": str(error)}
            rows.append({"op": op, "device": device, "backend": backend, "lacking": lacking})
    return rows


def run(arguments) -> int:
    facts = collect()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    flat = [[name, value or "not installed"] for name, value in facts["versions"].items()]
    flat += [[f"cpu {name}", value] for name, value in facts["cpu"].items()]
    gpu = facts["gpu"]
    flat.append(["gpu", f"{gpu['name']} ({gpu['capability']})" if gpu else "none"])
    flat += [[f"core {name}", value or "none"] for name, value in facts["core"].items()]
    flat.append(["FASTINTERP_BACKEND", facts["requested_backend"]])
    print(tabulate(flat, tablefmt="plain", disable_numparse=True))
    print()
    rows = [
        [
            row["op"],
            row["device"],
            row["backend"],
            "; ".join(f"{backend}: {reason}" for backend, reason in row["lacking"].items()),
        ]
        for row in facts["ops"]
    ]
    print(tabulate(rows, ["op", "device", "backend", "why not a preferred one"]))
    return 0
