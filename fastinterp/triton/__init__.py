"""Triton kernels, one file per op: no autograd, no choice of backend, checked inputs only."""
