"""BEFORE / AFTER: run both, measure, draw, report."""

from .wrap import Wrapped, wrap

__all__ = ["Wrapped", "wrap"]
