"""Suites: what a model is asked, and how its answers are scored. One file each, found by name."""

from ..metrics.sums import Sums, ratio
from .base import Item, Suite
from .registry import list_suites, suite, suite_class

__all__ = ["Item", "Suite", "Sums", "list_suites", "ratio", "suite", "suite_class"]
