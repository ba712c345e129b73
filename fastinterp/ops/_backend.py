"""Which kernel runs: one rule for every op.

``FASTINTERP_BACKEND=auto|cpu|cuda|triton|reference`` (default ``auto``). The automatic choice falls
back to the plain torch reference with one warning; a backend asked for by name that cannot run
raises.
"""

from __future__ import annotations

import importlib.util
import os
import warnings

import torch

from fastinterp import _native

BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")
_ON_DEVICE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

# Codes of csrc/kernels.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": tuple(DTYPE_CODES),
    "triton": tuple(DTYPE_CODES),
}

# op name -> the backends that have a kernel for it, the preferred one of a device first; filled by
# the op files
KERNELS: dict[str, tuple[str, ...]] = {}

# what was decided for (op, device, dtype, FASTINTERP_BACKEND, core); a fallback warns once
_chosen: dict[tuple, str] = {}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every other floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def why_not(backend: str, op: str, device: str, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot run ``op`` on tensors of this device and dtype; None when it can."""
    if backend == "reference":
        return None
    if backend not in KERNELS[op]:
        return "there is no such kernel"
    if dtype not in _DTYPES[backend]:
        return f"there is no {dtype} kernel"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install triton"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device != "cuda" and not (device == "cpu" and interpreted):
            return f"{device} tensors need TRITON_INTERPRET=1, set before fastinterp is imported"
        return None
    if device != backend:
        return f"the tensors are on {device}"
    if _native.core is None:
        return _native.problem
    if backend == "cuda" and _native.core.cuda_architectures is None:
        return "fastinterp was built without nvcc: put it on PATH and reinstall"
    if backend == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        built = _native.core.cuda_architectures
        if 10 * major + minor < min(int(a.split("-")[0]) for a in built.split()):
            return f"this GPU is sm_{major}{minor}, older than the {built} it was built for"
    return None


def decide(op: str, device: str, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """The backend for ``op`` on such tensors, and why each preferred one before it cannot run.

    Raises:
        ValueError: FASTINTERP_BACKEND is not one of BACKENDS.
        RuntimeError: the backend it names cannot run this op on these tensors.
    """
    requested = os.environ.get("FASTINTERP_BACKEND", "auto")
    if requested not in BACKENDS:
        raise ValueError(
            f"FASTINTERP_BACKEND={requested!r} is not a backend; use one of {', '.join(BACKENDS)}"
        )
    if requested != "auto":
        reason = why_not(requested, op, device, dtype)
        if reason is not None:
            raise RuntimeError(
                f"FASTINTERP_BACKEND={requested} cannot run fastinterp::{op} on {device} {dtype}: "
                f"{reason}. Unset it to let fastinterp choose."
            )
        return requested, {}
    reasons = {}
    for backend in KERNELS[op]:
        if backend not in _ON_DEVICE.get(device, ()):
            continue
        reason = why_not(backend, op, device, dtype)
        if reason is None:
            return backend, reasons
        reasons[backend] = reason
    return "reference", reasons


def choose(op: str, tensor: torch.Tensor) -> str:
    """The backend for this call, see ``decide``; warns once where it falls back to plain torch."""
    device, dtype = tensor.device.type, tensor.dtype
    situation = op, device, dtype, os.environ.get("FASTINTERP_BACKEND"), _native.core
    backend = _chosen.get(situation)
    if backend is None:
        backend, reasons = decide(op, device, dtype)
        _chosen[situation] = backend
        if backend == "reference" and os.environ.get("FASTINTERP_BACKEND") != "reference":
            _warn(op, device, dtype, reasons)
    return backend


def run_cuda(kernel: str, device: torch.device, *arguments) -> None:
    """Launches the core's ``kernel`` on torch's current stream of ``device``."""
    with torch.cuda.device(device):
        getattr(_native.core, kernel)(*arguments, torch.cuda.current_stream().cuda_stream)


def is_small(x: torch.Tensor, below: int) -> bool:
    """Whether x is on a CPU with fewer than ``below`` elements and no backend was asked for.

    There dispatching an op can cost more than it saves, and plain torch is the better choice.
    """
    return (
        x.device.type == "cpu"
        and x.numel() < below
        and os.environ.get("FASTINTERP_BACKEND", "auto") == "auto"
    )


def addresses(*tensors: torch.Tensor | None) -> list[int]:
    """What the core takes: 0 for None and for empty tensors that stand for what nobody wants."""
    return [0 if t is None or not t.numel() else t.data_ptr() for t in tensors]


def or_none(*tensors: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """What a Triton launcher takes: None for the empty tensors that ``addresses`` makes 0."""
    return tuple(t if t.numel() else None for t in tensors)


def _warn(op: str, device: str, dtype: torch.dtype, reasons: dict[str, str]) -> None:
    because = "; ".join(f"{k}: {v}" for k, v in reasons.items()) or "no kernels for this device"
    warnings.warn(
        f"fastinterp::{op} runs as several plain torch kernels on {device} {dtype}, which is "
        f"slower and keeps more memory ({because})",
        RuntimeWarning,
        stacklevel=3,
    )
