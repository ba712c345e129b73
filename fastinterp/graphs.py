"""A whole training step as one CUDA graph, so that the host is out of its way.

A small network's step is thousands of launches of a few microseconds each, and the host is what it
waits for: forty attack steps of MNIST Small are all launches. Captured once, the step is a single
launch.

    step = GraphedStep(take_step)            # take_step(x, y, eps): forward, backward, optimizer
    for x, y in loader:
        loss = step(x, y, eps)               # eps: a tensor on the device, or a number that stays

The first calls of every kind of inputs run as they are, on a side stream: they allocate what the
optimizer keeps, choose algorithms and compile. The next is captured and replayed. So every call
takes exactly one step, the very one that would be taken without a graph.
"""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MODES = ("auto", "on", "off")
_KINDS = 8  # of inputs; each has a graph, and copies of its inputs

_WAITING = {
    torch.ops.aten._local_scalar_dense.default: "reads a value (item(), float(), if tensor: ...)",
    torch.ops.aten.nonzero.default: "makes a tensor whose size depends on values (nonzero)",
    torch.ops.aten.masked_select.default: "makes a tensor whose size depends on values (a mask)",
    torch.ops.aten._unique2.default: "makes a tensor whose size depends on values (unique)",
    torch.ops.aten.equal.default: "compares values on the host (torch.equal)",
    torch.ops.aten.is_nonzero.default: "reads a value (bool())",
}


class Waits(TorchDispatchMode):
    """Inside, notes where an operation makes the host wait for a device; also for CPU tensors.

    What is noted cannot be captured in a CUDA graph. ``found`` has a line for every such operation.

    Example:
        >>> with Waits() as waits:
        ...     step(x, y)
        >>> assert not waits.found
    """

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        why = _WAITING.get(func)
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default) and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            why = "indexes with a mask"
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cuda":
            device = (kwargs or {}).get("device")
            if device is not None and torch.device(device).type == "cpu":
                why = "copies to the CPU"
        if why is not None:
            self.found.append(f"{func} {why}, {_caller()}")
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """File and line outside torch that called the operation."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        if os.path.dirname(torch.__file__) not in frame.filename and frame.filename != __file__:
            return f"{frame.filename}:{frame.lineno}"
    return "inside torch"


class GraphedStep:
    """A function of tensors that from its fourth call on is replayed as a CUDA graph.

    There is a graph for each kind of inputs: shapes, dtypes and the values of what is no tensor. So
    a last, smaller batch runs as it is until it too has been seen often enough, and a number, such
    as an eps of 0, may decide a branch; one that changes every step must be a tensor.

    The function must keep what it changes in tensors (an optimizer's ``step`` and ``lr`` too: see
    EpsilonHatAdam and torch's ``capturable=True``), allocate its gradients anew
    (``zero_grad(set_to_none=True)``), and use torch.autocast inside itself. Where it cannot be
    captured it runs as it is, with one warning that says why; where its inputs are on a CPU,
    silently.

    Args:
        step: called with the same arguments; returns tensors, or tuples, lists or dicts of them.
        mode: "auto"; "on", which raises where "auto" falls back; "off", never a graph.
        generators: torch.Generators that ``step`` draws from, beside the device's default one.
        warmup: calls of each kind of inputs before it is captured.

    Attributes:
        reason: why steps run without a graph; None where they do not, or are not known to.
        graphs: how many kinds of inputs have been captured.
    """

    def __init__(
        self,
        step: Callable,
        *,
        mode: str = "auto",
        generators: Sequence[torch.Generator] = (),
        warmup: int = 3,
    ):
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if warmup < 1:
            raise ValueError(f"warmup must be at least 1, got {warmup}")
        self.step, self.mode, self.generators, self.warmup = step, mode, tuple(generators), warmup
        self.reason = "mode is off" if mode == "off" else None
        self._seen: dict[Hashable, int] = {}
        self._captured: dict[Hashable, _Captured] = {}
        self._stream = self._pool = None

    @property
    def graphs(self) -> int:
        return len(self._captured)

    def __call__(self, *inputs: Any) -> Any:
        """One step.

        Args:
            inputs: tensors on one CUDA device, copied to where the graph reads them; numbers,
                strings and None.

        Returns:
            What ``step`` returns. Of a graph: its own tensors, which the next call overwrites.

        Raises:
            RuntimeError: mode is "on" and the step cannot be captured.
        """
        if self.reason is None:
            self._decide(inputs)
        if self.reason is not None or torch.cuda.is_current_stream_capturing():
            return self.step(*inputs)
        kind = tuple(map(_kind, inputs))
        captured = self._captured.get(kind)
        if captured is not None:
            return captured.replay(inputs)
        calls = self._seen.get(kind, 0)
        if calls == 0 and len(self._seen) >= _KINDS:
            self._give_up(
                f"it was called with more than {_KINDS} kinds of inputs; pass numbers that change "
                "as tensors on the device"
            )
            return self.step(*inputs)
        self._seen[kind] = calls + 1
        if calls < self.warmup:
            return self._warm_up(inputs, look=calls == 0)
        captured = self._capture(inputs)
        if captured is None:
            return self.step(*inputs)
        self._captured[kind] = captured
        return captured.replay(inputs)

    def _decide(self, inputs) -> None:
        """Gives up where no graph is possible on this device."""
        devices = {i.device for i in inputs if isinstance(i, torch.Tensor)}
        if len(devices) == 1 and next(iter(devices)).type == "cuda":
            return
        seen = ", ".join(sorted(map(str, devices))) or "not there"
        self._give_up(f"its tensor inputs are {seen}, not on one CUDA device", quietly=True)

    def _give_up(self, reason: str, quietly: bool = False) -> None:
        self.reason = reason
        self._captured.clear()
        if self.mode == "on":
            raise RuntimeError(f"the step cannot be captured in a CUDA graph: {reason}")
        if not quietly:
            warnings.warn(
                f"the step runs without a CUDA graph, launch by launch: {reason}",
                RuntimeWarning,
                stacklevel=4,
            )

    def _warm_up(self, inputs, look: bool):
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            if look:
                with Waits() as waits:
                    outputs = self.step(*inputs)
            else:
                outputs = self.step(*inputs)
        current.wait_stream(self._stream)
        if look and waits.found:
            self._give_up(f"it waits for the device: {waits.found[0]}")
        return outputs

    def _capture(self, inputs) -> _Captured | None:
        if self._pool is None:
            # Of all kinds: only one of them runs at a time.
            self._pool = torch.cuda.graph_pool_handle()
        static = [i.detach().clone() if isinstance(i, torch.Tensor) else i for i in inputs]
        graph = self._new_graph()
        try:
            with self._capturing(graph):
                outputs = self.step(*static)
        except Exception as error:
            # A capture that broke off leaves the generators waiting for the end of one.
            with suppress(RuntimeError), self._capturing(self._new_graph()):
                torch.zeros((), device=self._stream.device)
            told = str(error).strip().partition("\n")[0]
            self._give_up(f"{type(error).__name__}: {told}")
            return None
        return _Captured(graph, static, outputs)

    def _new_graph(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        return graph

    def _capturing(self, graph):
        # Other threads (a loader that pins memory) may call CUDA meanwhile.
        return torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )


class _Captured:
    def __init__(self, graph: torch.cuda.CUDAGraph, static: list, outputs: Any):
        self.graph, self.static, self.outputs = graph, static, outputs

    def replay(self, inputs) -> Any:
        for to, value in zip(self.static, inputs, strict=True):
            if isinstance(to, torch.Tensor):
                to.copy_(value, non_blocking=True)
        self.graph.replay()
        return self.outputs


def _kind(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return type(value), value
