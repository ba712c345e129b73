"""AutoAttack, an ensemble without parameters to tune, through the package pyautoattack.

    standard    APGD on the cross-entropy, targeted APGD on the DLR loss, targeted FAB, Square
    apgd        the first two of these: about a fifth of the cost, for a CPU

Each image is attacked by one after the other until it is misclassified.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks" (2020).
"""

from __future__ import annotations

import sys
from importlib.metadata import version as package_version

import torch
from torch import nn

from fastinterp._checks import check_attack, check_images, check_labels
from fastinterp.attacks.pgd import attacked

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "apgd": ("apgd-ce", "apgd-t"),
}
_TARGETS = 9  # classes that a targeted attack tries, at most


def autoattack_version() -> str:
    """The version of pyautoattack.

    Raises:
        ImportError: it is not installed.
    """
    return package_version(_package().__name__)


def _package():
    try:
        import pyautoattack
    except ImportError as error:
        raise ImportError("AutoAttack needs a package: pip install pyautoattack") from error
    return pyautoattack


def autoattack(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    eps: float,
    version: str = "standard",
    norm: str = "Linf",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Images that AutoAttack changed where it found one of another class, and x elsewhere.

    The model is attacked in evaluation mode and is left as it was, as are the global random
    numbers.

    Args:
        model: images (N, C, H, W) -> logits (N, K), K at least 4.
        x: images in [0,1].
        y: true classes, int64 (N,).
        eps: radius in units of x.
        version: one of VERSIONS.
        norm: "Linf", "L2" or "L1".
        generator: of the seed; by default torch's global one.

    Returns:
        x', (N, C, H, W), detached.

    Raises:
        ImportError: pyautoattack is not installed.
        TypeError, ValueError: an argument is out of its range.
    """
    package = _package()
    check_attack(eps, 1.0, 1)
    check_images(x, bounds=(0.0, 1.0))
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}")
    if norm not in ("Linf", "L2", "L1"):
        raise ValueError(f"norm must be Linf, L2 or L1, got {norm!r}")
    x = x.detach()
    if len(x) == 0:
        return x.clone()
    seed = int(torch.randint(2**31, (), generator=generator))
    with attacked(model, x) as logits:
        with torch.no_grad():
            classes = logits(x[:1]).shape[1]
        check_labels(y, len(x), classes)
        if classes < 4:
            raise ValueError(f"AutoAttack needs a model of at least 4 classes, this has {classes}")
        ensemble = package.AutoAttack(
            logits,
            attacks=list(VERSIONS[version]),
            device=x.device,
            eps=eps,
            norm=norm,
            seed=seed,
            version="custom",
        )
        # What its own "standard" sets; that of fewer classes would warn and try what is not there.
        for attack in (ensemble.apgd, ensemble.apgd_targeted, ensemble.fab):
            attack.n_restarts = 1
        ensemble.apgd_targeted.n_target_classes = min(_TARGETS, classes - 1)
        ensemble.fab.n_target_classes = min(_TARGETS, classes - 1)
        trace = sys.gettrace()  # its check for dynamic defences ends anybody's tracing
        try:
            with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
                x_adv, _ = ensemble.run_standard_evaluation(x, y, batch_size=len(x))
        finally:
            sys.settrace(trace)
    return x_adv.detach()
