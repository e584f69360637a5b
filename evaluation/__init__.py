"""HOW MUCH: suites of questions, metrics with intervals, and a runner that asks them before and after recipes."""

from .cells import Cell
from .results import Evaluation
from .runner import evaluate
from .subject import Subject
from .suites import Item, Suite, list_suites, suite

__all__ = ["Cell", "Evaluation", "Item", "Subject", "Suite", "evaluate", "list_suites", "suite"]
