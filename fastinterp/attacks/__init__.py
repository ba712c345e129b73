"""Inner maximisations and attacks on one batch."""

from fastinterp.attacks.pgd import maximise, pgd, random_start

__all__ = ["maximise", "pgd", "random_start"]
