"""Decode steps over key lengths that a process sees for the first time, and for the second, with sessions and without."""

from __future__ import annotations

import functools
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import reattend
from gpu_models import SHAPES, Recipe, fitting, llama, prompt, recipes
from gpu_parts import Part, Table
from timing import Answer


def measure(part: Part) -> None:
    """Steps over key lengths of which the process has seen none: a library that plans by length shows as first times far above second ones."""
    shapes = [shape._replace(layers=min(shape.layers, 8)) for shape in SHAPES[1:]]
    shape = fitting(part, shapes)
    model, steps, start = llama(shape, part), 4 if part.dry else 16, 48 if part.dry else 2500
    part.say(
        f"{shape}. {steps} tokens after a prompt, each row at lengths of its own; then the same prompt and lengths again. Milliseconds of a "
        "step, median and largest; `extra`: what the first time took more than the second, in all."
    )
    table = part.table("", ["first, median", "first, largest", "second, median", "second, largest", "extra"])
    with tempfile.TemporaryDirectory(prefix="reattend-gpu-profiles-") as folder:
        chosen = recipes(model, Path(folder), part.dry)
        # what a first pass loads is not what is asked here: one prompt of another length before
        for i, (label, recipe) in enumerate({"untouched": None, **chosen}.items()):
            if not part.reached(label, 0.0 if part.dry else 0.5):
                continue
            length = start + (4 * steps if part.dry else 64) * i
            part.attempt(table, label, functools.partial(first_and_second, part, table, model, label, recipe, length, steps))


def first_and_second(part: Part, table: Table, model: Any, label: str, recipe: Recipe | None, length: int, steps: int) -> None:
    warm, inputs = prompt(model, 1, length // 2), prompt(model, 1, length)
    taken = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with nullcontext() if recipe is None else reattend.apply(model, recipe.slug, **recipe.given(length // 2)):
            before = Answer(model, warm)
            before.start()
            before.step()
        with nullcontext() if recipe is None else reattend.apply(model, recipe.slug, **recipe.given(length)):
            for _ in range(2):
                answer = Answer(model, inputs)
                answer.start()
                taken.append([1e3 * part.device.seconds(answer.step) for _ in range(steps)])
    first, second = taken
    cells = {
        "first, median": median(first),
        "first, largest": max(first),
        "second, median": median(second),
        "second, largest": max(second),
    }
    part.set(
        table, label, {**{name: f"{value:.2f}" for name, value in cells.items()}, "extra": f"{sum(first) - sum(second):.1f}"}
    )
