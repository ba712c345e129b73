"""The options of an attack, shared by eval, attack and explain."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jsonargparse import ArgumentParser

from fastinterp._checks import check_attack
from fastinterp.attacks import CALIBRATED, attack_sneaking, autoattack, pgd, unforeseen
from fastinterp.attacks.autoattack import autoattack_version
from fastinterp.attacks.losses import LOSSES
from fastinterp.attacks.unforeseen import other_classes

ATTACKS = ("pgd", "autoattack", "isa", *CALIBRATED)
_NORMS = ("Linf", "L2")
_PGD = dict(eps=0.3, step_size=0.01)
_DEFAULTS = dict(steps=200, step_size=None, final_step_size=None, norm="Linf", loss="ce")
_DEFAULTS |= dict(random_start=False, restarts=1, early_stop=False)
# The options of attacks that do not take all.
_UNFORESEEN = ("steps", "step_size", "loss", "early_stop")
_TAKEN = {"autoattack": ("norm",), "isa": ()}


def add_attack(parser: ArgumentParser, examples: int) -> None:
    """The options of one attack at one radius, on ``examples`` images."""
    parser.add_argument("--attack", default="pgd", help=", ".join(ATTACKS))
    parser.add_argument(
        "--eps",
        type=float | None,
        default=None,
        help=f"radius, images in [0,1] (default: {_PGD['eps']}); of an unforeseen attack its size, "
        "in units of its own",
    )
    add_pgd(parser)
    add_examples(parser, examples)


def add_pgd(parser: ArgumentParser) -> None:
    """The options of PGD but its radius."""
    parser.add_argument("--steps", type=int, default=_DEFAULTS["steps"], help="attack steps")
    parser.add_argument(
        "--step-size",
        type=float | None,
        default=None,
        help=f"size of one step (default: {_PGD['step_size']}; of an unforeseen attack "
        "that of its authors)",
    )
    parser.add_argument(
        "--final-step-size",
        type=float | None,
        default=None,
        help="the step size falls linearly to this (default: it stays)",
    )
    parser.add_argument("--norm", default=_DEFAULTS["norm"], help=", ".join(_NORMS))
    parser.add_argument("--loss", default=_DEFAULTS["loss"], help=", ".join(LOSSES))
    parser.add_argument(
        "--random-start", action="store_true", help="start at a random point of the ball, not at x"
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=_DEFAULTS["restarts"],
        help="attacks per image, the worst kept",
    )
    parser.add_argument(
        "--early-stop", action="store_true", help="an image that is beaten takes no more steps"
    )


def add_examples(parser: ArgumentParser, examples: int) -> None:
    parser.add_argument(
        "--examples", type=int, default=examples, help="test images, chosen by --seed; 0 for all"
    )
    parser.add_argument(
        "--seed", type=int, default=99, help="of the choice of images and of random starts"
    )
    parser.add_argument("--batch-size", type=int, default=500, help="images at a time")


def pgd_settings(arguments, radii: list[float]) -> dict:
    """The options as arguments of attacks.pgd, but for eps.

    Raises:
        ValueError: an option is out of its range; also if it is one of ``radii``.
    """
    step_size = _PGD["step_size"] if arguments.step_size is None else arguments.step_size
    for eps in radii:
        check_attack(eps, step_size, arguments.steps)
    for name, allowed in (("norm", _NORMS), ("loss", LOSSES)):
        if arguments[name] not in allowed:
            raise ValueError(
                f"--{name} must be one of {', '.join(allowed)}, got {arguments[name]!r}"
            )
    for name in ("restarts", "batch_size"):
        if arguments[name] < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be at least 1, got {arguments[name]}")
    if arguments.final_step_size is not None and not arguments.final_step_size > 0:
        raise ValueError(f"--final-step-size must be > 0, got {arguments.final_step_size}")
    return {name: arguments[name] for name in _DEFAULTS} | {"step_size": step_size}


def chosen_attack(arguments) -> tuple[Callable[..., torch.Tensor], dict]:
    """The function (model, x, y, generator, ...) -> x' and its keyword arguments.

    Raises:
        ImportError: a package that the attack needs is not installed.
        ValueError: an option is out of its range, or not for this attack.
    """
    name, eps = arguments.attack, arguments.eps
    if name not in ATTACKS:
        raise ValueError(f"--attack must be one of {', '.join(ATTACKS)}, got {name!r}")
    if eps is None and name in CALIBRATED:
        known = "; ".join(
            f"{' '.join(f'{e:g}' for e in sizes.eps)} ({dataset})"
            for dataset, sizes in CALIBRATED[name].items()
        )
        raise ValueError(f"--attack {name} needs --eps; published sizes are {known}")
    eps = _PGD["eps"] if eps is None else eps
    settings = pgd_settings(arguments, [eps])
    if name == "pgd":
        return pgd, {"eps": eps, **settings}
    taken = _TAKEN.get(name, _UNFORESEEN)
    for option, default in _DEFAULTS.items():
        if option not in taken and arguments[option] != default:
            raise ValueError(f"--{option.replace('_', '-')} is not for --attack {name}")
    given = {"eps": eps} | {option: arguments[option] for option in taken}
    if name == "autoattack":
        autoattack_version()
        return autoattack, given
    if name == "isa":
        return _sneak, given
    return unforeseen, {"kind": name, **given}


def _sneak(model, x, y, *, eps, generator):
    with torch.no_grad():
        target = other_classes(y, model(x[:1]).shape[1], generator)
    return attack_sneaking(model, x, y, target, eps=eps).x_adv
