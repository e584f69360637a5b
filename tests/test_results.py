"""The pages of docs that scripts write are what the recorded figures say."""

from __future__ import annotations

import json

import effects
import summary


def test_summary_is_made_of_the_recorded_figures():
    page = (summary.DOCS / "results.md").read_text(encoding="utf-8")
    assert summary.BEGIN + summary.table() + summary.END in page, "run python benchmarks/summary.py"


def test_effects_page_is_made_of_the_recorded_figures():
    found = json.loads((summary.DOCS / "effects.json").read_text(encoding="utf-8"))
    assert (summary.DOCS / "effects.md").read_text(encoding="utf-8") == effects.page(found)
