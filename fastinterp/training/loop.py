"""The training loop of one method."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from fastinterp._files import write_atomically
from fastinterp.data import DataError, Dataset, DataWorkerDied
from fastinterp.fusion import fuse
from fastinterp.models import create_model
from fastinterp.objectives import METHODS, Objective
from fastinterp.training import checkpoint
from fastinterp.training.config import TrainConfig
from fastinterp.training.distributed import RankFailed, World
from fastinterp.training.meter import Meter, peak_memory, postfix, profiler
from fastinterp.training.metrics import MetricsLog
from fastinterp.training.optimizer import create_optimizer, set_lr
from fastinterp.training.options import Interrupted, RunOptions, StopRequest, TrainingDiverged
from fastinterp.training.rng import RNGS
from fastinterp.training.threads import choose_threads
from fastinterp.training.update import Batch, GraphedUpdate, Update

LOG_EVERY = 10  # steps


def create_objective(config: TrainConfig, method: str, model: nn.Module) -> Objective:
    """The loss of a method with the settings of ``config``."""
    return METHODS[method](
        model,
        step_size=config.step_size,
        steps=config.attack_steps,
        restarts=config.restarts,
        gamma=config.gamma,
        beta=config.beta,
        ig_weight=config.ig_weight,
        ig_steps=config.ig_steps,
        ig_weighting=config.ig_weighting,
        label_smoothing=config.label_smoothing,
        map=config.map,
        softplus_beta=config.softplus_beta or None,
    )


class Trainer:
    """Trains one method and keeps its checkpoints and metrics below ``folder``.

    Every process of a job has one: each computes its part of the batches, all hold the same
    weights, rank 0 writes.

    Args:
        config: checked.
        method: one of METHODS.
        data: its training images are moved whole to ``device``, or batch by batch where they are
            read from disk.
        folder: of this method in the run; an unfinished run there is continued.
        device: where to train.
        options: how to run.
        world: the processes of the job.

    Raises:
        ValueError: the batch cannot be divided among the processes, or SyncBN or a CUDA graph is
            not possible.
    """

    def __init__(
        self,
        config: TrainConfig,
        method: str,
        data: Dataset,
        folder: Path,
        device: torch.device,
        options: RunOptions | None = None,
        world: World | None = None,
    ):
        self.config, self.method, self.folder, self.device = config, method, folder, device
        self.options, self.world = options or RunOptions(), world or World()
        for settings in (config, self.options):
            settings.check_world(self.world.size, device)
        self.train = data.train.to(device)
        self._augmentation = config.augmentation
        self.rng = RNGS[config.rng](config.seed)
        channels = data.train.image_shape[0]
        self.model = self.rng.create(lambda: create_model(config.model, channels, data.num_classes))
        self.model.to(device)
        self._format = torch.channels_last if config.channels_last else torch.preserve_format
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if config.sync_bn and self.world.size > 1:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.ema: AveragedModel | None = None
        if config.ema:
            average = get_ema_multi_avg_fn(config.ema)
            self.ema = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        if config.fuse:
            fuse(self.model)
        self.objective = create_objective(config, method, self.model)
        module = self.objective
        if self.world.size > 1:
            # Without the broadcast: a loss runs the model several times, and the running
            # statistics must not be overwritten in between.
            module = DistributedDataParallel(module, broadcast_buffers=False)
        self.optimizer = create_optimizer(
            config.optimizer,
            self.model.parameters(),
            lr=config.lr[0],
            weight_decay=config.weight_decay,
            momentum=config.momentum,
        )
        self.update = Update(config, module, self.optimizer, device)
        self._graphed = GraphedUpdate(self.update) if self.options.cuda_graph else None
        self.steps_per_epoch = len(self.train) // config.batch_size
        self.total_steps = config.epochs * self.steps_per_epoch
        self.last_step = min(self.total_steps, self.options.limit_steps or self.total_steps)
        self.step = 0
        self.seconds = 0.0  # spent training, interruptions left out
        self.order: torch.Tensor | None = None
        self._batches: Generator | None = None
        self._rng_after_step = self.rng.state_dict()
        self._updating = False
        self._began = time.perf_counter()

    def resume(self) -> bool:
        """Continues from the newest checkpoint, if there is one; of any number of processes."""
        newest = self.world.from_first(checkpoint.latest(self.folder / "checkpoints"))
        if newest is None:
            return False
        state = checkpoint.load(newest, self.model)
        self.world.wait()  # nobody goes on, and replaces the checkpoint, before all have read it
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.load_state_dict(state["rng"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.step, self.order, self.seconds = state["step"], state["order"], state["seconds"]
        self._rng_after_step = state["rng"]
        if self.options.choose_threads:
            every = torch.get_num_threads()  # which runs of earlier versions took
            torch.set_num_threads(min(state.get("threads", every), every))
        return True

    def choose_threads(self) -> None:
        """Sets the number of threads that a part of a batch is fastest with."""
        x, y = self.train.batch(slice(self.config.batch_size // self.config.accumulate))
        choose_threads(self.model, self._laid_out(x), y, self.config.amp)

    def save(self) -> None:
        """Writes a checkpoint of the finished steps, if this is rank 0; waits for nobody.

        Raises:
            TrainingDiverged: a weight is not finite; nothing is written. Or the host had not looked
                yet at a step that was not, see RunOptions.
        """
        self._look()
        if not all(torch.isfinite(p).all() for p in self.model.parameters()):
            raise self._diverged("weights", "not finite")
        if self.world.rank > 0:
            return
        state = {
            "step": self.step,
            "order": self.order,
            "seconds": self.seconds + time.perf_counter() - self._began,
            "optimizer": self.optimizer.state_dict(),
            # Of the last finished step: one that raised has drawn numbers but can be taken again.
            "rng": self._rng_after_step,
            "threads": torch.get_num_threads(),
        }
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        checkpoint.save(self.folder / "checkpoints", self.step, self.model, state)

    def run(self, stop: StopRequest, quiet: bool = False) -> nn.Module:
        """Trains to the end.

        Returns:
            The trained model, also written to ``folder/model.safetensors``; the average of its
            weights, where there is one, is in ``ema`` and in ``folder/ema.safetensors``.

        Raises:
            Interrupted: ``stop`` was requested in any process; the last step is saved.
            TrainingDiverged: a loss or gradient is not finite; the batch is saved.
            DataError, DataWorkerDied: an image could not be read, or a process that reads them was
                killed.
            RankFailed: in a job of several processes, any other exception.
        """
        first = self.world.rank == 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._began = time.perf_counter()
        bar = tqdm(
            total=self.last_step,
            initial=self.step,
            desc=self.method,
            unit="step",
            disable=True if quiet or not first else None,  # None: only on a terminal
            mininterval=0.5,
        )
        log = MetricsLog(self.folder, self.step, self.options.wandb) if first else None
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            bar,
            log or contextlib.nullcontext(),
            torch.random.fork_rng(devices=devices),
            profiler(self.options.profile if first else 0, self.folder / "trace.json") as profile,
        ):
            try:
                self._train(stop, bar, log, profile)
            except TrainingDiverged:
                raise
            except BaseException as error:
                if not self._updating:  # else the weights are between two steps
                    self.save()
                if stop.requested and isinstance(error, DataWorkerDied):
                    # A signal to the whole job has reached the workers too.
                    raise Interrupted(self._stopped()) from error
                go_on = f"Finished steps are saved; go on with --resume {self.folder.parent}"
                if self.world.size > 1 and isinstance(error, Exception):
                    raise RankFailed(
                        f"process {self.world.rank} of {self.world.size} stopped after step "
                        f"{self.step} of {self.method}: {error}. If it lost a connection, another "
                        f"process has died. {go_on}"
                    ) from error
                if isinstance(error, (DataError, DataWorkerDied)):
                    raise type(error)(f"{error}. {go_on}") from error
                raise
            finally:
                if self._batches is not None:
                    self._batches.close()
                    self._batches = None
            self.save()
        self.seconds += time.perf_counter() - self._began
        if self.step < self.last_step:
            raise Interrupted(self._stopped())
        if first:
            checkpoint.save_model(self.model, self.folder / "model.safetensors")
            if self.ema is not None:
                checkpoint.save_model(self.ema.module, self.folder / "ema.safetensors")
        return self.model

    def _stopped(self) -> str:
        return f"stopped {self.method} after step {self.step}"

    def _train(self, stop: StopRequest, bar: tqdm, log: MetricsLog | None, profile) -> None:
        saved_at = time.monotonic()
        meter = Meter(self.step, self.device)
        (stopping,) = self.world.any(stop.requested)
        while self.step < self.last_step and not stopping:
            with meter.clock.running():
                values, stopping = self._step(stop)
            bar.update(1)
            profile.step()
            if self.step % LOG_EVERY == 0 or self.step == self.last_step:
                self._look()
                row = self._row(values, meter)
                if log is not None:
                    log.write(row)
                    bar.set_postfix(postfix(row))
            if time.monotonic() - saved_at >= self.options.checkpoint_seconds:
                self.save()
                saved_at = time.monotonic()

    def _step(self, stop: StopRequest | None = None) -> tuple[dict[str, torch.Tensor], bool]:
        """One update.

        Returns:
            What is logged, detached scalars of this process; and whether a stop was requested.
        """
        batch = self._draw()
        set_lr(self.optimizer, self.config.lr_at(self.step, self.total_steps))
        self._seed_step()
        stopping = stop is not None and stop.requested
        if self._graphed is None:
            values = self.update.gradients(*batch.inputs)
            finite = math.isfinite(values["loss"] + values["grad_norm"])
            stopping, diverged = self.world.any(stopping, not finite)
            if diverged:
                self._diverge(values["loss"].item(), None if finite else batch)
            self._updating = True
            self.optimizer.step()
        else:
            self._updating = True
            values = self._graphed(batch)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.step += 1
        self._rng_after_step = self.rng.state_dict()
        self._updating = False
        return values, stopping

    def _draw(self) -> Batch:
        x, y = self._next_batch()
        eps = self.config.eps_at(self.step)
        start = self._start(x, eps) if eps > 0 and self.method != "normal" else None
        return Batch(self.step, x, y, eps, start, self.order, self._rng_after_step)

    def _look(self) -> None:
        """Raises TrainingDiverged where a graphed step since the last look was not finite."""
        stopped = self._graphed and self._graphed.first_not_finite()
        if stopped:
            batch, loss = stopped
            self.step, self.order, self._rng_after_step = batch.step, batch.order, batch.rng
            self._diverge(loss, batch)

    def _diverge(self, loss: float, batch: Batch | None) -> None:
        """Saves the steps before this one, and its batch, if it is this process's; raises."""
        where = None if batch is None else self._save_batch(batch)
        self.save()
        raise self._diverged("loss", loss, where)

    def _next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """This process's part of the images and labels of the step."""
        position = self.step % self.steps_per_epoch
        if position == 0:
            self.order = self.rng.permutation(len(self.train))
        if position == 0 or self._batches is None:
            size, part = self.config.batch_size, self.world.part(self.config.batch_size)
            indices = self.order[: self.steps_per_epoch * size].view(-1, size)[position:, part]
            self._batches = self.train.batches(indices)
        x, y = next(self._batches)
        if self._augmentation:
            size = self.config.batch_size
            x = self._augmentation(x, (self.config.seed, self.step), self.world.part(size), size)
        return self._laid_out(x), y

    def _laid_out(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous(memory_format=self._format) if self.config.channels_last else x

    def _start(self, x: torch.Tensor, eps: float) -> torch.Tensor:
        """This process's part of the random start of the whole batch, so like in any world."""
        if self.world.size == 1:
            return self.rng.start(x, eps)
        whole = torch.empty_like(x[:1]).expand(self.config.batch_size, -1, -1, -1)
        drawn = self.rng.start(torch.empty_like(whole, memory_format=self._format), eps)
        return drawn[self.world.part(len(drawn))]

    def _seed_step(self) -> None:
        """What the model itself draws, as dropout does, follows from the step alone."""
        words = np.random.SeedSequence((self.config.seed, self.step, self.world.rank))
        torch.manual_seed(int(words.generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def _save_batch(self, batch: Batch) -> Path:
        rank = f"-rank{self.world.rank}" if self.world.size > 1 else ""
        path = self.folder / f"diverged-step-{batch.step:08d}{rank}.pt"
        kept = {name: getattr(batch, name) for name in ("step", "x", "y", "eps", "start")}
        write_atomically(path, lambda temporary: torch.save(kept, temporary))
        return path

    def _diverged(self, what: str, value, batch: Path | None = None) -> TrainingDiverged:
        saved = f" Its batch is in {batch}." if batch is not None else ""
        return TrainingDiverged(
            f"{what} of {self.method}: {value}, or a gradient not finite, at step {self.step}; "
            f"lower lr or gamma.{saved} The last good checkpoint is in "
            f"{self.folder / 'checkpoints'}"
        )

    def _row(self, values: dict[str, torch.Tensor], meter: Meter) -> dict:
        """What is logged of the last steps, means over the processes."""
        means = self.world.mean(torch.stack([value.float() for value in values.values()]))
        steps, seconds, attack = meter.take(self.step)
        # Parts of a replayed step cannot be timed.
        share = {} if self._graphed else {"attack_share": attack / seconds}
        return {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            **dict(zip(values, means.tolist(), strict=True)),
            "lr": self.config.lr_at(self.step - 1, self.total_steps),
            "eps": self.config.eps_at(self.step - 1),
            "images_per_second": steps * self.config.batch_size / seconds,
            **share,
            "memory_mb": peak_memory(self.device) / 1e6,
            "threads": torch.get_num_threads(),
        }
