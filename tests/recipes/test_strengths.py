"""The strength to try first and the range to sweep, which every recipe's help states, are values that the recipe takes."""

from __future__ import annotations

from typing import Any

import pytest
from example import modules
from reattend import ReattendError
from reattend.recipes.kit.registry import recipe_class, registry


def marked(cls: Any) -> dict[str, Any]:
    """What a recipe cannot be made without: passages, where it takes any, or what its first example says."""
    given: dict[str, Any] = {parameter: ["a passage", "another"] for parameter in cls.marks.values()}
    try:
        cls(**given)
    except ReattendError:
        given = dict(next(iter(modules()[cls.slug].EXAMPLES.values())).parameters)
    return given


@pytest.mark.parametrize("slug", registry())
def test_strengths_are_values_that_the_recipe_takes(slug):
    cls = recipe_class(slug)
    info = cls.info
    strengths = {name for name, value in info.try_first.items() if not isinstance(value, str)}
    assert strengths <= set(info.sweep), "what is tried first lies in what is swept"
    cls(**{**marked(cls), **info.try_first})
    for name, values in info.sweep.items():
        assert len(set(values)) == len(values) >= 2 and list(values) in (sorted(values), sorted(values, reverse=True))
        assert info.try_first.get(name, values[0]) in values
        for value in values:
            assert getattr(cls(**{**marked(cls), name: value}), name) == value
