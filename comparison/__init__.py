"""BEFORE / AFTER: run both, measure, draw, report."""

from .compare import compare
from .report import Report, write_page
from .wrap import Wrapped, wrap

__all__ = ["Report", "Wrapped", "compare", "wrap", "write_page"]
