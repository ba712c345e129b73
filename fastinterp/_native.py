"""The compiled core, or the reason it is absent. torch is imported first so that both share its
OpenMP runtime."""

from __future__ import annotations

import torch  # noqa: F401  (must be loaded before the core)

try:
    from fastinterp import _core as core

    problem = None
except ImportError as error:
    core = None
    problem = f"fastinterp._core could not be imported ({error}); reinstall with 'pip install .'"
