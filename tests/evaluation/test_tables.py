"""The tables of an evaluation in a terminal of 80 columns."""

from __future__ import annotations

import io
import re

from reattend.evaluation import Cell, Evaluation, suite
from reattend.evaluation.metrics.intervals import Interval
from reattend.evaluation.tables import renderable
from rich.console import Console

LABELS = ["none", 'seka(profile_path="seka.safetensors", gain=0.4)', 'seka(profile_path="seka.safetensors", gain=1.6)']


def test_variants_can_be_told_apart_in_80_columns():
    found = {name: Interval(0.5, 0.4, 0.6) for name in ("followed", "on_top", "lead")}
    cells = [Cell(suite("highlight"), label, [], found, 40, None if label == "none" else found) for label in LABELS]
    console = Console(width=80, file=io.StringIO())
    console.print(renderable(Evaluation({"name": "smollm2"}, cells, [], 0, 40, 2000)))
    said = "".join(re.split(r"\s{2,}", line.strip())[0] for line in console.file.getvalue().splitlines())
    for label in LABELS:
        assert label.replace(" ", "") in said.replace(" ", "")
