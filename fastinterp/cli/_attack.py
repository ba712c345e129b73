"""The options of an attack, shared by eval, attack and explain."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from fastinterp._checks import check_attack
from fastinterp.attacks.losses import LOSSES

_NORMS = ("Linf", "L2")


def add_pgd(parser: ArgumentParser) -> None:
    """The options of PGD but its radius."""
    parser.add_argument("--steps", type=int, default=200, help="attack steps")
    parser.add_argument("--step-size", type=float, default=0.01, help="size of one step")
    parser.add_argument(
        "--final-step-size",
        type=float | None,
        default=None,
        help="the step size falls linearly to this (default: it stays)",
    )
    parser.add_argument("--norm", default="Linf", help=", ".join(_NORMS))
    parser.add_argument("--loss", default="ce", help=", ".join(LOSSES))
    parser.add_argument(
        "--random-start", action="store_true", help="start at a random point of the ball, not at x"
    )
    parser.add_argument("--restarts", type=int, default=1, help="attacks per image, the worst kept")
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
    for eps in radii:
        check_attack(eps, arguments.step_size, arguments.steps)
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
    names = ("steps", "step_size", "final_step_size", "norm", "loss", "random_start", "restarts")
    return {name: arguments[name] for name in (*names, "early_stop")}
