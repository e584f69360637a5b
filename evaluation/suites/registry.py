"""Finds suites by name. Every module of this folder that defines a `Suite` with a name is one; there is no list to keep."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from pathlib import Path
from typing import Any

from ...interventions import ReattendError
from .base import Suite


@functools.cache
def registry() -> dict[str, type[Suite]]:
    """{name: suite class}, sorted by name."""
    found: dict[str, type[Suite]] = {}
    package = __name__.rsplit(".", 1)[0]
    for item in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = importlib.import_module(f"{package}.{item.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Suite) and value.name and value.__module__ == module.__name__:
                found[value.name] = value
    return dict(sorted(found.items()))


def suite_class(name: str) -> type[Suite]:
    """The class of a suite. Raises ReattendError with the nearest names for an unknown one."""
    known = registry()
    wanted = name.strip().lower().replace("_", "-")
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known suites: {', '.join(known)}"
        raise ReattendError(f"unknown suite {name!r}: {hint}")
    return known[wanted]


def suite(name: str, **parameters: Any) -> Suite:
    """A suite with its parameters, checked; "name:argument" where a suite takes one, as "lm-eval:arc_easy".

    Raises ReattendError for an unknown name or a parameter out of range.
    """
    head, colon, argument = name.partition(":")
    cls = suite_class(head)
    if not colon:
        return cls(**parameters)
    if not cls.argument:
        raise ReattendError(f"suite {head!r} takes nothing after a colon but key=value pairs, got {argument!r}")
    return cls.named(argument)(**{cls.argument: argument, **parameters})


def list_suites(kind: str | None = None) -> dict[str, str]:
    """{name: what it does} of all suites, or of those for a kind of model."""
    return {name: cls.does for name, cls in registry().items() if kind is None or cls.kind == kind}
