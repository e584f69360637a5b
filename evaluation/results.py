"""What an evaluation found, and its forms: a table in the terminal, JSON, files in a folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..recipes.kit.files import check_folder, check_output, writing
from .answers import FOLDER as ANSWERS
from .answers import digest
from .metrics.intervals import Interval
from .suites import Suite

FILE = "results.json"


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
class Evaluation:
    """Metrics of a model on suites, plain and under recipes. Shows itself in a terminal (`print()`) and as `json()`.

    batch: items at once where that was asked for. kept: where `save` put results of other settings that stood in its place.
    """

    model: dict[str, Any]
    cells: list[Cell]
    suites: list[dict[str, Any]]
    seed: int
    count: int
    resamples: int
    level: float = 0.95
    environment: dict[str, Any] = field(default_factory=dict)
    batch: int | None = None
    kept: Path | None = None

    def cell(self, suite: str, recipe: str = "none") -> Cell:
        """The cell of a suite's name and a variant's label. Raises KeyError."""
        return next((c for c in self.cells if (c.suite.name, c.recipe) == (suite, recipe)), None) or _unknown(
            self, suite, recipe
        )

    @property
    def notes(self) -> list[str]:
        """What a reader must know."""
        idle = dict.fromkeys(c.recipe for c in self.cells if c.recipes and not c.applied)
        return [f"{label!r} never acted: no call met its conditions, so nothing was changed." for label in idle]

    def as_dict(self) -> dict[str, Any]:
        """Everything but the answers, as JSON values."""
        data = {
            "model": self.model,
            "suites": self.suites,
            "seed": self.seed,
            "count": self.count,
            "batch": self.batch,
            "intervals": {"level": self.level, "resamples": self.resamples, "method": "percentile bootstrap over groups"},
            "cells": [cell.as_dict() for cell in self.cells],
            "notes": self.notes,
            "environment": self.environment,
        }
        return _finite(data)

    def json(self, indent: int | None = 2) -> str:
        return json.dumps(self.as_dict(), indent=indent, ensure_ascii=False)

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes results.json into a folder, all or nothing.

        Results that stand there already are written over where they answer the same question, of the same model with the same
        settings; others are kept as results.<fingerprint>.json.
        """
        file = output_folder(folder) / FILE
        draft = file.with_suffix(".part")
        with writing(file, "out"):
            draft.write_text(self.json(), encoding="utf-8")
            earlier = _question(file)
            if earlier is not None and earlier != _fingerprint(self.as_dict()):
                self.kept = file.with_suffix(f".{earlier}.json")
                file.replace(self.kept)
            draft.replace(file)
        return file

    def print(self) -> None:
        """Shows the tables in the terminal."""
        from rich.console import Console

        Console().print(self)

    def __rich__(self) -> Any:
        from .tables import renderable

        return renderable(self)


def output_folder(out: Any) -> Path:
    """The folder for answers and results. Raises ReattendError before any work where they cannot be written into it."""
    folder = check_folder(out, "out")
    check_folder(folder / ANSWERS, "out")
    check_output(folder / FILE, "out")
    return folder


def _question(file: Path) -> str | None:
    """The fingerprint of what the results in a file answer; None where there is no file."""
    if not file.exists():
        return None
    try:
        return _fingerprint(json.loads(file.read_bytes()))
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return digest(file.read_bytes().hex())[:8]  # not ours, or broken: kept as it is


def _fingerprint(data: dict[str, Any]) -> str:
    """Of everything that results depend on: model, suites, recipes, seed, count, batch, intervals, version."""
    asked = {name: data.get(name) for name in ("model", "suites", "seed", "count", "batch", "intervals")}
    cells = [[cell["suite"], cell["recipe"], cell["recipes"]] for cell in data["cells"]]
    return digest([asked, cells, data["environment"].get("reattend")])[:8]


def _unknown(result: Evaluation, suite: str, recipe: str) -> Cell:
    known = ", ".join(f"{c.suite.name} / {c.recipe}" for c in result.cells)
    raise KeyError(f"no cell {suite} / {recipe}; there are: {known}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
