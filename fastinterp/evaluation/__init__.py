"""Evaluation: accuracy, clean and under PGD."""

from fastinterp.evaluation.accuracy import accuracy, choose_examples, evaluate_pgd

__all__ = ["accuracy", "choose_examples", "evaluate_pgd"]
