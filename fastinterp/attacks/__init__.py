"""Inner maximisations and attacks on one batch."""

from fastinterp.attacks.pgd import attacked, maximise, pgd, random_start

__all__ = ["attacked", "maximise", "pgd", "random_start"]
