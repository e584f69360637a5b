"""HOW MUCH: suites of questions, metrics with intervals, and a runner that asks them before and after recipes."""

from .subject import Subject
from .suites import Item, Suite, list_suites, suite

__all__ = ["Item", "Subject", "Suite", "list_suites", "suite"]
