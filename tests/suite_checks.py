"""What every suite for language models is asked in its test, on a random model of a few thousand weights."""

from __future__ import annotations

import json
from typing import Any

import reattend
import tiny_language
from reattend.evaluation import Item, Subject, Suite
from reattend.evaluation.steering import Steering


def subject(template: str | None = tiny_language.CHATML, **changes: Any) -> Subject:
    """A fresh view of the tiny model; without a template prompts are plain text."""
    return Subject(tiny_language.language_model(max_position_embeddings=2048, **changes), tiny_language.tokenizer(template))


def check_items(suite: Suite, count: int = 12) -> list[Item]:
    """Items are JSON, the same for the same seed, others for another seed, with ids of their own and as many groups as asked."""
    items = suite.items(count, 0)
    assert items == suite.items(count, 0)
    assert [item.data for item in items] != [item.data for item in suite.items(count, 1)]
    assert len({item.id for item in items}) == len(items)
    assert len({item.group for item in items}) == count
    for item in items:
        assert json.loads(json.dumps(item.data)) is not None
    return items


def ask(suite: Suite, items: list[Item], recipes: list[Any] | None = None, chat: bool = True) -> list[dict[str, Any]]:
    """The records of all items in one batch, plain or under recipes that must act; the model is left as it was."""
    asked = subject(tiny_language.CHATML if chat else None)
    with Steering(asked, recipes or [], suite.marks) as steering:
        records = suite.answer(asked, items)
    assert len(records) == len(items)
    if recipes:
        assert steering.applied > 0 and set(steering.stats) == {
            reattend.recipes.kit.registry.read_choice(r)[0].slug for r in recipes
        }
    metrics = suite.score(json.loads(json.dumps(records)))
    assert all(value == value for value in metrics.values())
    assert set(suite.shown or metrics) <= set(metrics)
    return records
