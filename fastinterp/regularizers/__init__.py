"""Drop-in losses for anybody's training loop."""

from fastinterp.regularizers.interpretation import MAPS, Aux, InterpretationRegularizer

__all__ = ["MAPS", "Aux", "InterpretationRegularizer"]
