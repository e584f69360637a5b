"""Every door says what it gives, costs and refuses, and its example runs; docs/doors.md is what the command writes."""

from __future__ import annotations

import dataclasses

import doors_page
import pytest
from reattend import hooks


@pytest.mark.parametrize("door", doors_page.doors())
def test_a_door_says_what_it_gives_costs_and_refuses(door):
    said = doors_page.facts(door)
    assert list(said) == list(doors_page.FACTS) and all(len(text) > 30 for text in said.values())
    found = doors_page.steps(door)
    assert door.capitalize() in [cls.__name__ for cls in found], "a door's file, its name and its class are one word"
    for cls in found:
        assert dataclasses.is_dataclass(cls) and cls.__doc__ and getattr(hooks, cls.__name__) is cls
        assert cls.check is not hooks.Step.check and cls.install is not hooks.Step.install


@pytest.mark.parametrize("door", doors_page.doors())
def test_its_example_runs(door):
    doors_page.use(door)()


def test_the_page_is_what_the_command_writes():
    assert doors_page.PAGE.read_text(encoding="utf-8") == doors_page.page(), "run python benchmarks/doors_page.py"
