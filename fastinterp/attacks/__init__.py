"""Attacks on one batch, and the ascent under every inner maximisation.

losses.py           what an attack on the classification raises
pgd.py              projected gradient ascent, PGD
interpretation.py   against the map (AAI): top-k, centre of mass, towards a given map
unforeseen.py       beyond Lp norms (UAR); distortions/ has what is searched in
released.py         the random numbers of the paper's released evaluation
"""

from fastinterp.attacks.interpretation import InterpretationAttack, attack_interpretation
from fastinterp.attacks.losses import LOSSES, margin
from fastinterp.attacks.pgd import attacked, maximise, pgd, random_start
from fastinterp.attacks.released import released_draws
from fastinterp.attacks.unforeseen import CALIBRATED, uar, unforeseen

__all__ = [
    "CALIBRATED",
    "LOSSES",
    "InterpretationAttack",
    "attack_interpretation",
    "attacked",
    "margin",
    "maximise",
    "pgd",
    "random_start",
    "released_draws",
    "uar",
    "unforeseen",
]
