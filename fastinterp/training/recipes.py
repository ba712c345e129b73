"""Named configurations: the paper's of every data set, network and method, and modern ones."""

from __future__ import annotations

from fastinterp.objectives import METHODS
from fastinterp.training.config import TrainConfig

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

# Networks of today as they are usually trained.
_MODERN = dict(
    compare=[],
    optimizer="sgd",
    lr_schedule="cosine",
    weight_decay=5e-4,
    amp="bf16",
    channels_last=True,
    fuse=True,
    flip=True,
    attack_steps=10,
    gamma=0.01,
    beta=6.0,
)
_MODERN_RUNS = {
    "cifar10-resnet18": {
        **_MODERN,
        "dataset": "cifar10",
        "model": "resnet18-cifar",
        "epochs": 60,
        "batch_size": 128,
        "lr": [0.1],
        "lr_warmup": 350,
        "crop_padding": 4,
        "eps": 8 / 255,
        "step_size": 2 / 255,
        "eval_eps": [2 / 255, 4 / 255, 8 / 255],
        "eval_step_size": 2 / 255,
    },
    "restricted-imagenet-resnet50": {
        **_MODERN,
        "dataset": "restricted-imagenet",
        "model": "torchvision:resnet50",
        "epochs": 35,
        "batch_size": 128,
        "lr": [0.05],
        "lr_warmup": 1000,
        "weight_decay": 1e-4,
        "attack_steps": 3,
        "eps": 4 / 255,
        "step_size": 2 / 255,
        "eval_eps": [1 / 255, 2 / 255, 4 / 255],
        "eval_step_size": 1 / 255,
    },
}

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
    **{
        f"{name}-{method}": {**settings, "method": method}
        for name, settings in _MODERN_RUNS.items()
        for method in METHODS
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
