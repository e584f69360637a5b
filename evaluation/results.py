"""What an evaluation found in its forms: a table in the terminal, JSON, files in a folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..comparison.forms import finite
from ..recipes.kit.checks import check_folder, check_output, writing
from .answers import FOLDER as ANSWERS
from .answers import digest
from .cells import Measured

FILE = "results.json"


@dataclass
class Evaluation(Measured):
    """Metrics of a model on suites, plain and under recipes. Shows itself in a terminal (`print()`) and as `json()`.

    batch: items at once where that was asked for. kept: where `save` put results of other settings that stood in its place.
    """

    batch: int | None = None
    kept: Path | None = None

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
        return finite(data)

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
