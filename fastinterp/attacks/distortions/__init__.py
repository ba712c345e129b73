"""Distortions that an unforeseen attack searches in; each draws its random numbers once.

_distortion.py   what a distortion is
jpeg.py  elastic.py  fog.py  snow.py  gabor.py

Where they differ from the code of Kang et al.: a distortion of an image does not depend on the
other images of its batch (fog was scaled, and streaks of snow were drawn, by batch); the fractal of
the fog takes the points next to each other; the l1 ball of jpeg is cut by the box around the
image's own coefficients.
"""

from functools import partial

from fastinterp.attacks.distortions._distortion import Distortion
from fastinterp.attacks.distortions.elastic import elastic
from fastinterp.attacks.distortions.fog import fog
from fastinterp.attacks.distortions.gabor import gabor
from fastinterp.attacks.distortions.jpeg import jpeg
from fastinterp.attacks.distortions.snow import snow

DISTORTIONS = {
    **{f"jpeg_{norm.lower()}": partial(jpeg, norm=norm) for norm in ("Linf", "L2", "L1")},
    "elastic": elastic,
    "fog": fog,
    "snow": snow,
    "gabor": gabor,
}

__all__ = ["DISTORTIONS", "Distortion"]
