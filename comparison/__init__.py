"""BEFORE / AFTER: run both, measure, draw, report."""

from .compare import compare
from .report import Check, Report, write_page
from .sweep import Column, Sweep
from .wrap import Wrapped, wrap

__all__ = ["Check", "Column", "Report", "Sweep", "Wrapped", "compare", "wrap", "write_page"]
