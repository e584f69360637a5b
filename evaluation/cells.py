"""What was measured, as data: one cell per suite and variant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..hooks import Plan
from ..recipes.kit.registry import registry
from .metrics.intervals import Interval
from .suites import Suite


@dataclass
class Cell:
    """One suite under one variant. metrics: with intervals. groups: how many scenes or texts were drawn from.

    changes: of the metrics against the plain model on the same items; None for the plain model itself, or where it was not run.
    applied: how often edits were applied. seconds: median per item. time_ratio: median of a batch's time over that of the plain model;
    one run each, so take it as an indication; None for fewer than three batches. records: the answers.
    """

    suite: Suite
    recipe: str
    recipes: list[dict[str, Any]]
    metrics: dict[str, Interval]
    groups: int
    changes: dict[str, Interval] | None = None
    applied: int = 0
    seconds: float = 0.0
    time_ratio: float | None = None
    records: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def as_dict(self) -> dict[str, Any]:
        return {
            "suite": self.suite.name,
            "recipe": self.recipe,
            "recipes": self.recipes,
            "items": len(self.records),
            "groups": self.groups,
            "metrics": {name: one.as_dict() for name, one in self.metrics.items()},
            "changes": None if self.changes is None else {name: one.as_dict() for name, one in self.changes.items()},
            "less_is_better": [name for name in self.metrics if name in self.suite.lower],
            "edits_applied": self.applied,
            "cost": {"seconds_per_item": self.seconds, "time_ratio": self.time_ratio, "indicative": True},
        }

    @property
    def shown(self) -> Sequence[str]:
        return list(self.metrics) if self.suite.shown is None else [n for n in self.suite.shown if n in self.metrics]


@dataclass
class Measured:
    """Metrics of a model on suites, plain and under recipes, with intervals of this level over so many resamples."""

    model: dict[str, Any]
    cells: list[Cell]
    suites: list[dict[str, Any]]
    seed: int
    count: int
    resamples: int
    level: float = 0.95
    environment: dict[str, Any] = field(default_factory=dict)

    def cell(self, suite: str, recipe: str = "none") -> Cell:
        """The cell of a suite's name and a variant's label. Raises KeyError."""
        return next((c for c in self.cells if (c.suite.name, c.recipe) == (suite, recipe)), None) or _unknown(
            self, suite, recipe
        )

    @property
    def notes(self) -> list[str]:
        """What a reader must know."""
        known = registry()

        def reads(one: Any) -> bool:
            return one["name"] in known and known[one["name"]].info.reads

        idle = {c.recipe: c.recipes for c in self.cells if c.recipes and not c.applied and not all(map(reads, c.recipes))}
        return [
            f"{label!r} never acted, so nothing was changed: "
            f"{'; '.join(dict.fromkeys(getattr(known.get(one['name']), 'idle', Plan.idle) for one in recipes))}."
            for label, recipes in idle.items()
        ]


def _unknown(result: Measured, suite: str, recipe: str) -> Cell:
    known = ", ".join(f"{c.suite.name} / {c.recipe}" for c in result.cells)
    raise KeyError(f"no cell {suite} / {recipe}; there are: {known}")
