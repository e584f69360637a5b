"""Where SmolLM2-135M-Instruct stands on the suites for language models: able, and fallible, so that an effect can show."""

from __future__ import annotations

from typing import Any

import pytest
from reattend.evaluation import Subject, suite

# suite: (items, metric, lowest and highest value).
BANDS = {
    "choices": (30, "accuracy", 0.4, 0.8),
    "sentiment": (30, "accuracy", 0.5, 0.85),
    "highlight": (8, "on_top", 0.15, 0.6),
    "position-swap": (6, "accuracy", 0.35, 0.8),
    "key-values": (6, "accuracy", 0.1, 0.9),
    "needles": (6, "recall", 0.2, 0.95),
    "instructions": (12, "obeyed", 0.1, 0.8),
    "perplexity": (3, "perplexity_256", 8.0, 40.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BANDS)
def test_the_baseline_leaves_room_on_both_sides(name: str, smollm2: tuple[Any, Any]) -> None:
    count, metric, low, high = BANDS[name]
    asked = suite(name)
    assert asked.name == name
    items, records = asked.items(count, 0), []
    for start in range(0, len(items), asked.batch):
        records += asked.answer(Subject(*smollm2), items[start : start + asked.batch])
    value = asked.score(records)[metric]
    assert low <= value <= high, asked.score(records)
