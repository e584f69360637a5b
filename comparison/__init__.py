"""BEFORE / AFTER: run both, measure, draw, report."""

from .compare import compare
from .report import Check, Report, write_page
from .wrap import Wrapped, wrap

__all__ = ["Check", "Report", "Wrapped", "compare", "wrap", "write_page"]
