"""What the methods' example files say for the benchmarks, and what holds for a method that says nothing.

A file of tests/recipes/examples may set, each by kind of model or group of sections:

    TIMED = {label: parameters}                    rows of docs/costs.md, the first one for docs/results.md; parameters may be a function
                                                   of the `Subject` that is timed, or, for pictures, of the sites of their pipeline.
                                                   Default: one row with what the method marks.
    FLOORS = {label: (why, floor)}                 passes that the method needs by its definition: see FLOORS of subjects.py; of pictures
                                                   the reason alone, where it is no branch: (why, "")
    TRIED = {"highlight": [variant, ...]}          variants of effects.py, from weak to strong; {}: none. Default: those of `Info.sweep`
    PAPER = {"highlight": text}                    what the paper reports there
    PROFILED = {option: value}                     options of its profiling run; samples="scenes": questions on scenes of the zoo;
                                                   scenes=n: so many prompts of the zoo's pictures, and its judge as objective
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path += [str(f) for f in (TESTS, TESTS / "recipes", TESTS.parent / "examples") if str(f) not in sys.path]

from example import modules  # noqa: E402
from reattend.recipes import recipe_class  # noqa: E402
from reattend.recipes.kit.registry import registry  # noqa: E402

# which tables ask a method, by what it is for
PROBLEMS = {
    "highlight": "my instruction is overlooked",
    "order": "the answer depends on the order of the documents",
    "calibration": "answers to classification questions are poor",
    "copying": "a fact in a long prompt is not found",
    "tasks": "demonstrations make every prompt long",
    "images": "the model describes what is not there",
    "pictures": "the picture ignores a word",
}


def said(slug: str, name: str) -> dict[str, Any]:
    return getattr(modules()[slug], name, {})


def timed(kind: str, marks: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """{label: (slug, parameters)} of the methods whose first kind of model is this one. marks: {kind of passage, text, picture or box: the
    ones that a method is told of}."""
    found: dict[str, tuple[str, Any]] = {}
    for slug in registry():
        cls = recipe_class(slug)
        if cls.info.kinds[0] != kind:
            continue
        told = {**cls.marks, **cls.beside, **cls.placed, **cls.areas}
        marked = {parameter: marks[of] for of, parameter in told.items() if of in marks}
        rows = said(slug, "TIMED") or {slug: marked}
        found |= {label: (slug, given) for label, given in rows.items()}
    return found


def floors(kind: str) -> dict[str, tuple[str, str]]:
    """{label: (why, name of a floor)}"""
    return {
        label: floor
        for slug, cls in registry().items()
        if cls.info.kinds[0] == kind
        for label, floor in said(slug, "FLOORS").items()
    }


def shown(slug: str) -> str:
    """The row of docs/costs.md that docs/results.md shows."""
    return next(iter(said(slug, "TIMED")), slug)


def tried(group: str) -> dict[str, list[str]]:
    """{slug: variants} of the methods that a group of sections asks."""
    found = {}
    for slug, cls in registry().items():
        known = getattr(modules()[slug], "TRIED", None)
        if group in (known or ()):
            found[slug] = list(known[group])
        elif known is None and PROBLEMS.get(group) in cls.info.problems:
            needed = cls.info.profiling and not cls.info.profiling.startswith("optional")
            own = f"{slug}:profile_path={{{slug}}}" if needed else slug
            found[slug] = [own, *(f"{own}:{name}={value}" for name, values in cls.info.sweep.items() for value in values)]
    return found


def paper(group: str) -> dict[str, str]:
    """{slug: what it reports, on its models}"""
    return {slug: said(slug, "PAPER")[group] for slug in registry() if group in said(slug, "PAPER")}


def profiled(slug: str) -> dict[str, Any]:
    return dict(said(slug, "PROFILED"))
