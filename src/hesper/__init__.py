"""Hesper: Hessian-guided pruning for edge runtimes."""

__version__ = "0.1.0"
