"""Inner maximisations and attacks on one batch."""

from fastinterp.attacks.losses import LOSSES, margin
from fastinterp.attacks.pgd import attacked, maximise, pgd, random_start

__all__ = ["LOSSES", "attacked", "margin", "maximise", "pgd", "random_start"]
