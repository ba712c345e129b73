"""What a training run is made of: one flat dataclass, named recipes on top, checks in one place."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

from fastinterp._checks import check_attack
from fastinterp.data import DATASETS, Dataset
from fastinterp.models import MODELS
from fastinterp.objectives import IG_WEIGHTINGS, METHODS
from fastinterp.training.rng import RNGS


def _option(default, help):
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {}
    return field(**(factory or {"default": default}), metadata={"help": help})


@dataclass
class TrainConfig:
    dataset: str = _option("digits", ", ".join(DATASETS))
    model: str = _option("small", "small, pool or wresnet")
    method: str = _option("int", "training objective: " + ", ".join(METHODS))
    compare: list[str] = _option(["normal"], "methods also trained, for the table at the end")
    epochs: int = _option(10, "passes over the training split")
    batch_size: int = _option(50, "the last incomplete batch of an epoch is dropped")
    lr: list[float] = _option([1e-4], "learning rates, one more than lr-steps")
    lr_steps: list[int] = _option([], "steps after which the next learning rate holds")
    eps: float = _option(0.3, "radius of the attack, images in [0,1]")
    eps_warmup: list[int] = _option([], "two steps: eps is 0 until the first, full at the second")
    attack_steps: int = _option(40, "steps of the inner maximisation")
    step_size: float = _option(0.01, "size of one such step")
    gamma: float = _option(0.01, "weight of the discrepancy")
    beta: float = _option(1.0, "weight of trades' divergence")
    ig_weight: float = _option(1.0, "weight of the norm of the integrated gradients, ig-norm")
    ig_steps: int = _option(5, "points of their path")
    ig_weighting: str = _option("sum", "of the loss they are of: sum, or batch-mean as released")
    seed: int = _option(99, "of initialisation, order and random starts")
    rng: str = _option("torch", "torch, or paper: the released code's numpy generator")
    eval_eps: list[float] = _option([0.1, 0.2, 0.3], "PGD radii of the table at the end")
    eval_steps: int = _option(200, "PGD steps of that table")
    eval_step_size: float = _option(0.01, "PGD step size of that table")
    eval_examples: int = _option(200, "test images of that table; 0 for all")

    def check(self, data: Dataset | None = None) -> None:
        """Raises ValueError that names the option, what was seen and what is allowed.

        Args:
            data: also check the sizes that depend on it.
        """
        for name, value, allowed in (
            ("dataset", self.dataset, DATASETS),
            ("model", self.model, MODELS),
            ("method", self.method, METHODS),
            *(("compare", method, METHODS) for method in self.compare),
            ("rng", self.rng, RNGS),
            ("ig_weighting", self.ig_weighting, IG_WEIGHTINGS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if not 0 <= self.seed < 2**32 - 1:
            raise ValueError(f"seed must be between 0 and {2**32 - 2}, got {self.seed}")
        for name in ("epochs", "batch_size", "eval_steps", "ig_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_attack(self.eps, self.step_size, self.attack_steps)
        for eps in self.eval_eps:
            check_attack(eps, self.eval_step_size, self.eval_steps)
        if self.eval_examples < 0:
            raise ValueError(f"eval_examples must be >= 0, got {self.eval_examples}")
        if len(self.lr) != len(self.lr_steps) + 1 or min(self.lr) <= 0:
            raise ValueError(
                f"lr needs one positive value more than lr_steps, got {self.lr} and {self.lr_steps}"
            )
        if self.lr_steps != sorted(self.lr_steps):
            raise ValueError(f"lr_steps must increase, got {self.lr_steps}")
        if self.eps_warmup and not (
            len(self.eps_warmup) == 2 and 0 <= self.eps_warmup[0] < self.eps_warmup[1]
        ):
            raise ValueError(
                f"eps_warmup must be empty or two increasing steps, got {self.eps_warmup}"
            )
        for name in ("gamma", "beta", "ig_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if data is not None and self.batch_size > len(data.train):
            raise ValueError(
                f"batch_size must be at most the {len(data.train)} training images, got "
                f"{self.batch_size}"
            )
        if data is not None and self.eval_examples > len(data.test):
            raise ValueError(
                f"eval_examples must be at most the {len(data.test)} test images (0 for all), got "
                f"{self.eval_examples}"
            )

    @property
    def methods(self) -> list[str]:
        """Every method to train, each once, the compared ones first."""
        return [m for m in dict.fromkeys(self.compare) if m != self.method] + [self.method]

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        return self.lr[sum(step >= boundary for boundary in self.lr_steps)]

    def eps_at(self, step: int) -> float:
        """Attack radius of step 0, 1, ..."""
        if not self.eps_warmup:
            return self.eps
        begin, end = self.eps_warmup
        return self.eps * min(max((step - begin) / (end - begin), 0.0), 1.0)

    def to_dict(self) -> dict:
        return asdict(self)


# The settings of the released code.
_PAPER = {
    "mnist": dict(
        compare=[],
        epochs=100,
        batch_size=50,
        lr=[1e-4],
        eps=0.3,
        eps_warmup=[2000, 10000],
        attack_steps=40,
        step_size=0.01,
        gamma=0.01,
        eval_eps=[0.1, 0.2, 0.3],
    ),
    "cifar10": dict(
        compare=[],
        epochs=200,
        batch_size=128,
        lr=[1e-3, 1e-4, 1e-5],
        lr_steps=[40_000, 60_000],
        eps=8 / 255,
        eps_warmup=[5000, 70_000],
        attack_steps=10,
        step_size=2 / 255,
        gamma=0.01,
        eval_eps=[2 / 255, 4 / 255, 8 / 255],
    ),
    "restricted-imagenet": dict(
        compare=[],
        epochs=35,
        batch_size=64,
        lr=[1e-3, 1e-4, 1e-5],
        lr_steps=[8000, 16_000],
        eps=0.003,
        eps_warmup=[5000, 10_000],
        attack_steps=7,
        step_size=0.1,
        gamma=0.01,
        eval_eps=[0.003],
    ),
}
_NETWORKS = {
    "mnist": ("small", "pool"),
    "cifar10": ("small", "wresnet"),
    "restricted-imagenet": ("wresnet",),
}
# The released timing runs: one epoch at lr 1e-4 and the full, constant eps.
_ONE_EPOCH = dict(epochs=1, eps_warmup=[], lr=[1e-4], lr_steps=[])

RECIPES: dict[str, dict] = {
    "digits-small-int": dict(
        dataset="digits",
        model="small",
        method="int",
        compare=["normal"],
        epochs=30,
        batch_size=50,
        lr=[1e-3],
        eps=0.2,
        eps_warmup=[100, 400],
        attack_steps=10,
        step_size=0.04,
        gamma=0.01,
        eval_eps=[0.05, 0.1, 0.15, 0.2],
        eval_steps=100,
    ),
    **{
        f"{dataset}-{model}-{method}{suffix}": {
            **settings,
            "dataset": dataset,
            "model": model,
            "method": method,
            **extra,
        }
        for dataset, settings in _PAPER.items()
        for model in _NETWORKS[dataset]
        for method in METHODS
        for suffix, extra in (("", {}), ("-1epoch", _ONE_EPOCH))
    },
}

DEFAULT_RECIPE = "digits-small-int"


def recipe(name: str) -> TrainConfig:
    """The configuration of a named recipe.

    Raises:
        ValueError: unknown name.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; use one of {', '.join(RECIPES)}")
    return TrainConfig(**RECIPES[name])


OPTIONS = fields(TrainConfig)
