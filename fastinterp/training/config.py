"""What a training run is made of: one flat dataclass in groups, checked in one place."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields

import torch

from fastinterp._checks import check_attack
from fastinterp.data import DATASETS, Augmentation, Dataset
from fastinterp.models import MODELS, PAPER_MODELS, check_model
from fastinterp.objectives import IG_WEIGHTINGS, METHODS
from fastinterp.regularizers import MAPS
from fastinterp.training.optimizer import OPTIMIZERS
from fastinterp.training.rng import RNGS

AMP = ("off", "bf16")
LR_SCHEDULES = ("steps", "cosine")


def _option(group, default, help):
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {}
    metadata = {"group": group, "help": help}
    return field(**(factory or {"default": default}), metadata=metadata)


@dataclass
class TrainConfig:
    """Everything that the weights at the end of a run depend on, and how they are evaluated."""

    dataset: str = _option("data", "digits", ", ".join(DATASETS))
    epochs: int = _option("data", 10, "passes over the training split")
    batch_size: int = _option(
        "data", 50, "of all processes together; an epoch's last incomplete batch is dropped"
    )
    accumulate: int = _option("data", 1, "parts in which a batch is computed, to save memory")
    crop_padding: int = _option("data", 0, "random crops of images padded by so many pixels")
    flip: bool = _option("data", False, "mirror half of the images")
    cutout: int = _option("data", 0, "side of a square of zeros somewhere in each image")

    model: str = _option("network", "small", ", ".join(MODELS) + ", torchvision:NAME or timm:NAME")
    fuse: bool = _option("network", False, "fuse the network: pays for norms with input gradients")
    channels_last: bool = _option("network", False, "keep weights and images channels_last")
    sync_bn: bool = _option("network", False, "batch norm over all processes' images, on GPUs")
    amp: str = _option("network", "off", "off, or bf16: autocast around the loss, fp32 weights")

    method: str = _option("objective", "int", "training objective: " + ", ".join(METHODS))
    compare: list[str] = _option("objective", ["normal"], "methods also trained, for the table")
    map: str = _option("objective", "cam", "of the int family: " + ", ".join(MAPS))
    softplus_beta: float = _option(
        "objective", 0.0, "ReLUs are softplus of this during their attack; 0: stay ReLUs"
    )
    eps: float = _option("objective", 0.3, "radius of the attack, images in [0,1]")
    eps_warmup: list[int] = _option(
        "objective", [], "two steps: eps is 0 until the first, full at the second"
    )
    attack_steps: int = _option("objective", 40, "steps of the inner maximisation")
    restarts: int = _option("objective", 1, "its starts, of which each image keeps the worst end")
    step_size: float = _option("objective", 0.01, "size of one such step")
    gamma: float = _option("objective", 0.01, "weight of the discrepancy")
    beta: float = _option("objective", 1.0, "weight of trades' divergence")
    ig_weight: float = _option("objective", 1.0, "weight of ig-norm's integrated gradients")
    ig_steps: int = _option("objective", 5, "points of the path of integrated gradients")
    ig_weighting: str = _option(
        "objective", "sum", "of the loss they are of: sum, or batch-mean as released"
    )
    label_smoothing: float = _option("objective", 0.0, "of the minimised cross-entropy")

    optimizer: str = _option("optimizer", "adam", ", ".join(OPTIMIZERS) + "; adam as released")
    lr: list[float] = _option("optimizer", [1e-4], "learning rates, one more than lr-steps")
    lr_steps: list[int] = _option("optimizer", [], "steps after which the next one holds")
    lr_schedule: str = _option(
        "optimizer", "steps", "steps, or cosine: from lr down to 0 at the last step"
    )
    lr_warmup: int = _option("optimizer", 0, "steps in which the learning rate rises from 0")
    weight_decay: float = _option(
        "optimizer", 0.0, "for adamw and sgd; not of biases and norms, nor anything else 1-D"
    )
    momentum: float = _option("optimizer", 0.9, "of sgd")
    clip_grad_norm: float = _option("optimizer", 0.0, "largest norm of the gradient; 0 for any")
    ema: float = _option("optimizer", 0.0, "decay of an average of the weights; 0 for none")

    seed: int = _option("randomness", 99, "of initialisation, order and random starts")
    rng: str = _option("randomness", "torch", "torch, or paper: the released code's numpy one")

    eval_eps: list[float] = _option("evaluation", [0.1, 0.2, 0.3], "PGD radii of the table")
    eval_steps: int = _option("evaluation", 200, "PGD steps of that table")
    eval_step_size: float = _option("evaluation", 0.01, "PGD step size of that table")
    eval_examples: int = _option("evaluation", 200, "test images of that table; 0 for all")

    def check(self, data: Dataset | None = None) -> None:
        """Raises ValueError that names the option, what was seen and what is allowed.

        Args:
            data: also check the sizes that depend on it.
        """
        for name, value, allowed in (
            ("dataset", self.dataset, DATASETS),
            ("method", self.method, METHODS),
            *(("compare", method, METHODS) for method in self.compare),
            ("rng", self.rng, RNGS),
            ("ig_weighting", self.ig_weighting, IG_WEIGHTINGS),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("lr_schedule", self.lr_schedule, LR_SCHEDULES),
            ("amp", self.amp, AMP),
            ("map", self.map, MAPS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        check_model(self.model)
        for name, least in (
            *((name, 1) for name in ("epochs", "batch_size", "accumulate")),
            *((name, 1) for name in ("eval_steps", "ig_steps", "restarts")),
            *((name, 0) for name in ("eval_examples", "lr_warmup", "crop_padding", "cutout")),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in (
            *("gamma", "beta", "ig_weight", "softplus_beta"),
            *("weight_decay", "clip_grad_norm"),
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}")
        for name in ("label_smoothing", "momentum", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32 - 1:
            raise ValueError(f"seed must be between 0 and {2**32 - 2}, got {self.seed}")
        check_attack(self.eps, self.step_size, self.attack_steps)
        for eps in self.eval_eps:
            check_attack(eps, self.eval_step_size, self.eval_steps)
        self._check_schedules()
        self._check_combinations()
        if data is not None:
            self._check_sizes(data)

    def _check_schedules(self) -> None:
        if len(self.lr) != len(self.lr_steps) + 1 or not all(0 < lr < math.inf for lr in self.lr):
            raise ValueError(
                f"lr needs one positive value more than lr_steps, got {self.lr} and {self.lr_steps}"
            )
        if self.lr_steps != sorted(self.lr_steps):
            raise ValueError(f"lr_steps must increase, got {self.lr_steps}")
        if self.lr_schedule == "cosine" and self.lr_steps:
            raise ValueError(f"lr_steps must be empty with lr_schedule cosine, got {self.lr_steps}")
        if self.eps_warmup and not (
            len(self.eps_warmup) == 2 and 0 <= self.eps_warmup[0] < self.eps_warmup[1]
        ):
            raise ValueError(
                f"eps_warmup must be empty or two increasing steps, got {self.eps_warmup}"
            )

    def _check_combinations(self) -> None:
        if self.rng == "paper" and self.model not in PAPER_MODELS:
            raise ValueError(
                f"rng paper draws the weights of {', '.join(PAPER_MODELS)} only, got model "
                f"{self.model!r}; use rng torch"
            )
        if self.weight_decay and self.optimizer == "adam":
            raise ValueError(
                f"weight_decay must be 0 with optimizer adam, got {self.weight_decay}; use adamw"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate must divide batch_size {self.batch_size}, got {self.accumulate}"
            )
        if self.accumulate > 1 and self.ig_weighting == "batch-mean":
            raise ValueError(
                "ig_weighting batch-mean needs a batch in one part: its weight is one over the "
                f"size of that; got accumulate {self.accumulate}"
            )

    def check_world(self, processes: int, device: torch.device) -> None:
        """Raises ValueError where so many processes, on such a device, cannot share the work."""
        if self.batch_size % (processes * self.accumulate):
            raise ValueError(
                f"batch_size must be a multiple of {processes} processes x accumulate "
                f"{self.accumulate}, got {self.batch_size}"
            )
        if processes > 1 and self.ig_weighting == "batch-mean":
            raise ValueError(
                "ig_weighting batch-mean needs a batch in one part: its weight is one over the "
                f"size of that; got {processes} processes"
            )
        if self.sync_bn and device.type != "cuda":
            raise ValueError(f"sync_bn needs GPUs, as torch's SyncBatchNorm does; got {device}")

    def _check_sizes(self, data: Dataset) -> None:
        if self.batch_size > len(data.train):
            raise ValueError(
                f"batch_size must be at most the {len(data.train)} training images, got "
                f"{self.batch_size}"
            )
        if self.eval_examples > len(data.test):
            raise ValueError(
                f"eval_examples must be at most the {len(data.test)} test images (0 for all), got "
                f"{self.eval_examples}"
            )

    @property
    def methods(self) -> list[str]:
        """Every method to train, each once, the compared ones first."""
        return [m for m in dict.fromkeys(self.compare) if m != self.method] + [self.method]

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(self.crop_padding, self.flip, self.cutout)

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of step 0, 1, ... of ``total``."""
        warmth = min((step + 1) / self.lr_warmup, 1.0) if self.lr_warmup else 1.0
        if self.lr_schedule == "steps":
            return warmth * self.lr[sum(step >= boundary for boundary in self.lr_steps)]
        done = max(step - self.lr_warmup, 0) / max(total - self.lr_warmup, 1)
        return warmth * self.lr[0] * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def eps_at(self, step: int) -> float:
        """Attack radius of step 0, 1, ..."""
        if not self.eps_warmup:
            return self.eps
        begin, end = self.eps_warmup
        return self.eps * min(max((step - begin) / (end - begin), 0.0), 1.0)

    def to_dict(self) -> dict:
        return asdict(self)


OPTIONS = fields(TrainConfig)
