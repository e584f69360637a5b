"""What several variants on one input did, as data: the untouched run, a column per variant, and what was measured of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..interventions import ReattendError
from .forms import finite
from .outcome import Side


@dataclass
class Measure:
    """A number that every variant has. key: its name in `Column.effect`. short: a heading. title, explains: what it is, for a chart.

    untouched: its value of the untouched run, None where there is none. form: "percent" for shares, else "number".
    """

    key: str
    short: str
    title: str
    explains: str
    untouched: float | None = 0.0
    form: str = "number"


@dataclass
class Column:
    """One variant. differing: {parameter: value} of what tells it from the others. side: its output, as in a `Report`.

    same: whether the output equals the untouched one, for pictures bit for bit. first_difference: of texts, the first token that differs,
    counted from 0 (`first_difference_token` in the JSON), where pages and terminal say "differs from token 1 on".
    effect: {measure: value}, None where it could not be measured. stats: as a session's. notes: what a reader must know of it.
    """

    label: str
    recipes: list[dict[str, Any]]
    differing: dict[str, Any]
    side: Side = field(default_factory=Side)
    same: bool = False
    first_difference: int | None = None
    effect: dict[str, float | None] = field(default_factory=dict)
    stats: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def applied(self) -> int:
        """How often attention was changed in the run."""
        return sum(sum(sites.values()) for sites in self.stats.values())

    def as_dict(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "recipes": [{"name": r["name"], "parameters": r["parameters"], "chosen": r["chosen"]} for r in self.recipes],
            "differing": self.differing,
            **self.side.output_as_dict(),
            "same_as_untouched": self.same,
            "first_difference_token": self.first_difference,
            "effect": self.effect,
            "edits_applied": self.applied,
            "stats": self.stats,
            "notes": self.notes,
        }


@dataclass
class SweepOutcome:
    """Several variants beside the untouched run, on one input and seed.

    kind: "text", "prediction" or "image". columns: one per variant, in the order given. measures: what `Column.effect` holds.
    """

    kind: str
    title: str
    model: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    untouched: Side = field(default_factory=Side)
    columns: list[Column] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def outputs(self) -> dict[str, Any]:
        """{"untouched": ..., label: ...}: texts, lists of pictures, or lists of (label, probability)."""
        return {"untouched": self.untouched.output, **{column.label: column.side.output for column in self.columns}}

    def column(self, label: str) -> Column:
        """The column of a variant. Raises ReattendError for a label that no variant has."""
        for column in self.columns:
            if column.label == label:
                return column
        known = ", ".join(column.label for column in self.columns)
        raise ReattendError(f"this report has no variant {label!r}; it has: {known}")

    def as_dict(self) -> dict[str, Any]:
        """Everything but the pictures, as JSON values."""
        return finite(
            {
                "kind": self.kind,
                "title": self.title,
                "model": self.model,
                "request": self.request,
                "seed": self.seed,
                "untouched": self.untouched.output_as_dict(),
                "variants": [column.as_dict() for column in self.columns],
                "measures": [vars(measure) for measure in self.measures],
                "notes": self.notes,
                "environment": self.environment,
            }
        )

    def json(self, indent: int | None = 2) -> str:
        """`as_dict()` as a JSON text. Infinite numbers are null."""
        return json.dumps(self.as_dict(), indent=indent, ensure_ascii=False)


def summary(sweep: SweepOutcome) -> str:
    """One or two sentences on what changed."""
    what = {"text": "text", "prediction": "prediction", "image": "picture"}[sweep.kind]
    count = len(sweep.columns)
    changed = [column for column in sweep.columns if not column.same]
    if not changed:
        return f"No variant changes the {what}." if count > 1 else f"The variant does not change the {what}."
    lead = f"{len(changed)} of {count} variants change{'s' if len(changed) == 1 else ''} the {what}"
    return f"{lead}{_most(sweep, changed)}."


def _most(sweep: SweepOutcome, changed: Sequence[Column]) -> str:
    """Which variant moved the first measure most, where several did."""
    if not sweep.measures or len(changed) < 2:
        return ""
    measure = sweep.measures[0]
    values = [(abs(value), c.label) for c in changed if (value := c.effect.get(measure.key)) is not None]
    if not values:
        return ""
    return f"; most by {measure.short}: {max(values)[1]}"
