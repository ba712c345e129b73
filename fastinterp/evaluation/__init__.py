"""Evaluation: accuracy under attack, the paper's protocol, a stronger one, and their report.

accuracy.py     which images, clean accuracy, PGD, attacked batches
protocol.py     what is run with what settings
pieces.py       a protocol in pieces, each kept on disk by results.py, computed by measure.py and
                measure_maps.py
summary.py      results as numbers with names; findings.py says in words what to doubt
overlays.py     maps over images; figures.py the other figures
report.py       tables and figures in order; page.py writes them as HTML and Markdown
"""

from fastinterp.evaluation.accuracy import (
    accuracy,
    attacked_batches,
    choose_examples,
    evaluate_pgd,
)

__all__ = ["accuracy", "attacked_batches", "choose_examples", "evaluate_pgd"]
