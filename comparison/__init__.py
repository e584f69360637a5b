"""BEFORE / AFTER: run both, measure, draw, report."""

from .compare import compare
from .outcome import Check
from .report import Report, write_page
from .sweep import Sweep
from .sweep_outcome import Column
from .wrap import Wrapped, wrap

__all__ = ["Check", "Column", "Report", "Sweep", "Wrapped", "compare", "wrap", "write_page"]
