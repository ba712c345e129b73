"""The training loop of one method, and the run of several side by side."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from fastinterp.data import Dataset
from fastinterp.models import create_model
from fastinterp.objectives import METHODS
from fastinterp.training import checkpoint
from fastinterp.training.config import TrainConfig
from fastinterp.training.metrics import MetricsLog
from fastinterp.training.optimizer import EpsilonHatAdam
from fastinterp.training.rng import RNGS

LOG_EVERY = 10  # steps; also how often a GPU run waits for its device


class Interrupted(Exception):
    """The run was asked to stop; its last finished step is saved."""


class TrainingDiverged(RuntimeError):
    """The loss or the weights are NaN or infinite; the last checkpoint is from before."""


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a flag that the loop reads between steps."""

    def __init__(self):
        self.requested = False

    def _handle(self, signum, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def check(self, doing: str) -> None:
        """Raises Interrupted, saying what was going on, when a stop was requested."""
        if self.requested:
            raise Interrupted(f"stopped {doing}")

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


class Trainer:
    """Trains one method and keeps its checkpoints and metrics below ``folder``.

    Args:
        config: checked.
        method: one of METHODS.
        data: training images stay on the CPU or are moved whole to ``device``.
        folder: of this method in the run; an unfinished run there is continued.
        device: where to train.
        checkpoint_seconds: how much work a killed process may lose; an exception or a request to
            stop loses at most the current step.
    """

    def __init__(
        self,
        config: TrainConfig,
        method: str,
        data: Dataset,
        folder: Path,
        device: torch.device,
        checkpoint_seconds: float = 10.0,
    ):
        self.config, self.method, self.folder, self.device = config, method, folder, device
        self.checkpoint_seconds = checkpoint_seconds
        self.train = data.train.to(device)
        self.rng = RNGS[config.rng](config.seed)
        self.model = create_model(config.model, data.train.images.shape[1], data.num_classes)
        self.rng.initialise(self.model)
        self.model.to(device)
        self.objective = METHODS[method](
            self.model,
            step_size=config.step_size,
            steps=config.attack_steps,
            gamma=config.gamma,
            beta=config.beta,
            ig_weight=config.ig_weight,
            ig_steps=config.ig_steps,
            ig_weighting=config.ig_weighting,
        )
        self.optimizer = EpsilonHatAdam(self.model.parameters(), lr=config.lr[0])
        self.steps_per_epoch = len(self.train) // config.batch_size
        self.total_steps = config.epochs * self.steps_per_epoch
        self.step = 0
        self.seconds = 0.0  # spent training, interruptions left out
        self.order: torch.Tensor | None = None
        self._rng_after_step = self.rng.state_dict()
        self._updating = False
        self._began = time.perf_counter()

    def resume(self) -> bool:
        """Continues from the newest checkpoint, if there is one."""
        newest = checkpoint.latest(self.folder / "checkpoints")
        if newest is None:
            return False
        state = checkpoint.load(newest, self.model)
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.load_state_dict(state["rng"])
        self.step, self.order, self.seconds = state["step"], state["order"], state["seconds"]
        self._rng_after_step = state["rng"]
        return True

    def save(self) -> None:
        """Writes a checkpoint of the finished steps.

        Raises:
            TrainingDiverged: a weight is not finite; nothing is written.
        """
        if not all(torch.isfinite(p).all() for p in self.model.parameters()):
            raise self._diverged("weights", "not finite")
        state = {
            "step": self.step,
            "order": self.order,
            "seconds": self.seconds + time.perf_counter() - self._began,
            "optimizer": self.optimizer.state_dict(),
            # Of the last finished step: one that raised has drawn numbers but can be taken again.
            "rng": self._rng_after_step,
        }
        checkpoint.save(self.folder / "checkpoints", self.step, self.model, state)

    def run(self, stop: StopRequest, quiet: bool = False) -> nn.Module:
        """Trains to the end.

        Returns:
            The trained model, also written to ``folder/model.safetensors``.

        Raises:
            Interrupted: ``stop`` was requested; the last step is saved.
            TrainingDiverged: the loss is not finite.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._began = time.perf_counter()
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            desc=self.method,
            unit="step",
            disable=True if quiet else None,  # None: only on a terminal
            mininterval=0.5,
        )
        saved_at = time.monotonic()
        with bar, MetricsLog(self.folder, after_step=self.step) as log:
            timer = _Timer(self.step)
            try:
                while self.step < self.total_steps and not stop.requested:
                    loss, parts = self._step()
                    bar.update(1)
                    if self.step % LOG_EVERY == 0 or self.step == self.total_steps:
                        row = self._row(loss, parts, timer)
                        log.write(row)
                        bar.set_postfix(_postfix(row))
                    if time.monotonic() - saved_at >= self.checkpoint_seconds:
                        self.save()
                        saved_at = time.monotonic()
            except TrainingDiverged:
                raise
            except BaseException:
                if not self._updating:  # else the weights are between two steps
                    self.save()
                raise
            self.save()
        self.seconds += time.perf_counter() - self._began
        if self.step < self.total_steps:
            stop.check(f"{self.method} after step {self.step}")
        checkpoint.save_model(self.model, self.folder / "model.safetensors")
        return self.model

    def _step(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config, position = self.config, self.step % self.steps_per_epoch
        if position == 0:
            self.order = self.rng.permutation(len(self.train))
        batch = config.batch_size
        index = self.order[position * batch : (position + 1) * batch]
        x, y = self.train.batch(index.to(self.device))
        eps = config.eps_at(self.step)
        start = self.rng.start(x, eps) if eps > 0 and self.method != "normal" else None
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(self.step)
        loss, parts = self.objective(x, y, eps, start)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._updating = True
        self.optimizer.step()
        self.step += 1
        self._rng_after_step = self.rng.state_dict()
        self._updating = False
        return loss.detach(), parts

    def _diverged(self, what: str, value) -> TrainingDiverged:
        return TrainingDiverged(
            f"{what} of {self.method}: {value} at step {self.step}; lower lr or gamma. The last "
            f"good checkpoint is in {self.folder / 'checkpoints'}"
        )

    def _row(self, loss, parts, timer: _Timer) -> dict:
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged("loss", value)
        return {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "loss": value,
            **{name: value.item() for name, value in parts.items()},
            "lr": self.config.lr_at(self.step - 1),
            "eps": self.config.eps_at(self.step - 1),
            "images_per_second": timer.rate(self.step) * self.config.batch_size,
        }


class _Timer:
    def __init__(self, step: int):
        self.step, self.time = step, time.perf_counter()

    def rate(self, step: int) -> float:
        """Steps per second since the last call."""
        now = time.perf_counter()
        rate = (step - self.step) / max(now - self.time, 1e-9)
        self.step, self.time = step, now
        return rate


def _postfix(row: dict) -> dict[str, str]:
    shown = {"loss": f"{row['loss']:.3f}"}
    if "discrepancy" in row:
        shown["D"] = f"{row['discrepancy']:.2f}"
    return {**shown, "img/s": f"{row['images_per_second']:.0f}"}
