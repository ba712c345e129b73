"""Attacks on one batch, and the ascent under every inner maximisation.

losses.py           what an attack on the classification raises
ascent.py           projected gradient ascent, under every inner maximisation
pgd.py              PGD
autoattack.py       AutoAttack, by the package pyautoattack
interpretation.py   against the map (AAI): top-k, centre of mass, towards a given map
unforeseen.py       beyond Lp norms (UAR); distortions/ has what is searched in
sneaking.py         another class, the same map (ISA): least eps, largest gamma
released.py         the random numbers of the paper's released evaluation
"""

from fastinterp.attacks.ascent import maximise, random_start
from fastinterp.attacks.autoattack import autoattack
from fastinterp.attacks.interpretation import InterpretationAttack, attack_interpretation
from fastinterp.attacks.losses import LOSSES, margin
from fastinterp.attacks.pgd import attacked, pgd
from fastinterp.attacks.released import released_draws
from fastinterp.attacks.sneaking import LeastEps, SneakingAttack, attack_sneaking, least_eps
from fastinterp.attacks.unforeseen import CALIBRATED, uar, unforeseen

__all__ = [
    "CALIBRATED",
    "LOSSES",
    "InterpretationAttack",
    "LeastEps",
    "SneakingAttack",
    "attack_interpretation",
    "attack_sneaking",
    "attacked",
    "autoattack",
    "least_eps",
    "margin",
    "maximise",
    "pgd",
    "random_start",
    "released_draws",
    "uar",
    "unforeseen",
]
