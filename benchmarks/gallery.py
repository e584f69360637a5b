"""Pictures without and with every method for image generation: docs/gallery/ and docs/gallery.md, made by one command from fixed seeds.

    python benchmarks/gallery.py                     # all of them, about ten minutes on one core
    python benchmarks/gallery.py --only seg nag

A method's example file may say how it is drawn (`GALLERY`, see `Grid`); a method that says nothing is drawn with its defaults.
"""

from __future__ import annotations

import argparse
import functools
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import methods
import reattend
import torch
from gallery_editing import found_in, put_in, taken_out
from PIL import Image, ImageDraw, ImageFont
from reattend.recipes import recipe_class
from reattend.recipes.kit.registry import registry

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, FOLDER = DOCS / "gallery.md", DOCS / "gallery"
# prompt, the thing that a negative text names, the words that a method is told to attend to
PROMPTS = (
    ("a red circle and a blue square", "a blue square", ["square"]),
    ("a green star and a yellow triangle", "a green star", ["triangle"]),
    ("a purple square , a red star and a green circle", "a red star", ["star"]),
    ("a blue triangle , a yellow circle and a red square", "a yellow circle", ["circle"]),
    ("a yellow star and a blue circle", "a blue circle", ["star"]),
    ("a red triangle , a green square and a purple circle", "a red triangle", ["square"]),
)


def boxes(prompt: str) -> dict[str, tuple[float, float, float, float]]:
    """{thing of a prompt: its box}: from left to right, by turns higher and lower."""
    things = re.findall(r"an? (\w+ \w+)", prompt)
    middles = [((number + 0.5) / len(things), (0.35, 0.65)[number % 2]) for number in range(len(things))]
    return {name: (x - 0.15, y - 0.15, x + 0.15, y + 0.15) for name, (x, y) in zip(things, middles, strict=True)}


def shapes(prompt: str) -> list[str]:
    return re.findall(r"an? \w+ (\w+)", prompt)


def columns(prompt: str) -> dict[str, tuple[float, float, float, float]]:
    """{thing of a prompt, as a prompt: its part of the canvas}, from left to right."""
    things = re.findall(r"an? \w+ \w+", prompt)
    return {name: (number / len(things), 0.0, (number + 1) / len(things), 1.0) for number, name in enumerate(things)}


TOLD = {
    "boxes": [boxes(prompt) for prompt, *_ in PROMPTS],
    "cells": [columns(prompt) for prompt, *_ in PROMPTS],
    "negative": [unwanted for _, unwanted, _ in PROMPTS],
    **dict.fromkeys(("words", "highlight"), [w for *_, w in PROMPTS]),
}
CELL, CAPTION, MARGIN, LABEL = 128, 62, 4, 92
LARGEST = 150_000
HEAD = """# Before and after

Written by `python benchmarks/gallery.py`; do not edit. Six prompts and seeds, the same for every method and chosen before anything was drawn:
the upper row without the method, the one below with it, all else equal; a pipeline's own negative prompt, in a third row, needs
guidance. The models are the zoo's small ones, whose pictures have 64 x 64
pixels (here enlarged) and which often draw what the prompt does not say. What such differences come to over hundreds of prompts:
[results](results.md).
"""


@dataclass(frozen=True)
class Grid:
    """How a method is drawn: `GALLERY = {field: value}` of its example.

    model: of the zoo. size: of the pictures, in pixels a side; None: the model's own. steps, guidance: the pipeline's. words: those that a
    method is told of, one shape of each prompt or all of them. look: what to look at.
    """

    model: str = "shapes-sd"
    parameters: dict[str, Any] = field(default_factory=dict)
    size: int | None = None
    steps: int = 20
    guidance: float = 2.0
    words: Literal["one", "shapes"] = "one"
    look: str = ""


def drawn() -> dict[str, Grid]:
    """{slug: how it is drawn} of every method for image generation."""
    slugs = [slug for slug, cls in registry().items() if cls.info.kinds[0] == "diffusion"]
    return {slug: Grid(**methods.said(slug, "GALLERY")) for slug in slugs}


def parameters(slug: str, grid: Grid) -> dict[str, Any]:
    """What is said of every prompt, and the method's own."""
    cls = recipe_class(slug)
    told = {name: TOLD[of] for of, name in {**cls.marks, **cls.beside, **cls.placed}.items() if of in TOLD}
    if "words" in cls.marks and grid.words == "shapes":
        told[cls.marks["words"]] = [shapes(prompt) for prompt, *_ in PROMPTS]
    return {**told, **grid.parameters}


@functools.cache
def pipeline(model: str) -> Any:
    pipe = reattend.zoo.load(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(grid: Grid, **more: Any) -> list[Image.Image]:
    """The pictures of all prompts, each from a seed of its own."""
    size = {} if grid.size is None else {"height": grid.size, "width": grid.size}
    return pipeline(grid.model)(
        [prompt for prompt, *_ in PROMPTS], num_inference_steps=grid.steps, guidance_scale=grid.guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))], **size, **more,
    ).images  # fmt: skip


def rows(slug: str, grid: Grid) -> dict[str, list[Image.Image]]:
    """{label: pictures}"""
    cls, pipe = recipe_class(slug), pipeline(grid.model)
    how = grid.steps, grid.guidance, grid.parameters
    if cls.areas:
        return taken_out(slug, pipe, draw(replace(grid, guidance=2.0)), *how)
    if "background" in cls.beside:
        return put_in(slug, pipe, len(PROMPTS), *how)
    if cls.info.reads:
        return found_in(slug, pipe, len(PROMPTS), *how)
    found = {"without": draw(grid)}
    with reattend.apply(pipe, slug, **parameters(slug, grid)):
        found[slug] = draw(grid)
    if "negative" in cls.beside:
        guided = replace(grid, guidance=max(grid.guidance, 2.0))
        found[f"negative prompt, guidance {guided.guidance:g}"] = draw(guided, negative_prompt=TOLD["negative"])
    return found


def picture(slug: str, found: dict[str, list[Image.Image]]) -> Image.Image:
    """The grid: a row for each label, a column for each prompt."""
    step = CELL + MARGIN
    sheet = Image.new("RGB", (LABEL + step * len(PROMPTS), CAPTION + step * len(found)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    cls = recipe_class(slug)
    negative = "negative" in cls.beside
    own = "background" in cls.beside or cls.info.reads
    for column, (prompt, unwanted, _) in enumerate(PROMPTS):
        text = f"scene {column}" if own else f"{prompt}{f'; not {unwanted}' if negative else ''} (seed {column})"
        pen.multiline_text((LABEL + column * step, 2), textwrap.fill(text, 25), "black", font, spacing=1)
    for row, (label, pictures) in enumerate(found.items()):
        top = CAPTION + row * step
        pen.multiline_text((2, top + CELL // 2 - 8), textwrap.fill(label, 15), "black", font, spacing=1)
        for column, one in enumerate(pictures):
            left = LABEL + column * step
            sheet.paste(one.resize((CELL, CELL), Image.Resampling.BICUBIC), (left, top))
            for box in TOLD[next(iter(cls.placed))][column].values() if cls.placed else ():
                pen.rectangle([(left, top)[i % 2] + round(side * CELL) for i, side in enumerate(box)], outline="white")
    return sheet.quantize(255)


def page(grids: dict[str, Grid]) -> str:
    lines = [HEAD.strip()]
    for slug, grid in grids.items():
        cls = recipe_class(slug)
        look = grid.look or cls.info.does
        own = ", ".join(f"{name}={value}" for name, value in grid.parameters.items()) or "its defaults"
        size = f"{grid.size} x {grid.size} pixels, " if grid.size else ""
        told = "; what is named stands in the captions" if "negative" in cls.beside else ""
        told = "; told of the boxes drawn" if cls.placed else told
        told = "; the empty prompt, and a box around the largest thing" if cls.areas else told
        told = "; scenes of its own, with a box and a mask of the thing" if "background" in cls.beside else told
        if cls.info.reads:
            told = "; scenes of its own, which are told of their shapes: red, green and blue in the order of the prompt"
        elif "words" in cls.marks:
            one = f"told of: {', '.join(word for *_, words in PROMPTS for word in words)}"
            told = f"; {'told of all shapes' if grid.words == 'shapes' else one}"
        lines += [
            f"## {slug}",
            look,
            f"![{slug}: pictures without and with it](gallery/{slug}.png)",
            f"{grid.model}, {size}{grid.steps} steps, guidance {grid.guidance:g}; {own}{told}.",
        ]
    return "\n\n".join(lines) + "\n"


def make(slugs: Sequence[str]) -> None:
    grids = drawn()
    FOLDER.mkdir(exist_ok=True)
    for slug in slugs or grids:
        file = FOLDER / f"{slug}.png"
        picture(slug, rows(slug, grids[slug])).save(file, optimize=True)
        size = file.stat().st_size
        print(f"{file.name}: {size} bytes{' (too many)' if size > LARGEST else ''}", flush=True)
    PAGE.write_text(page(grids), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(drawn()), default=[], metavar="METHOD")
    torch.set_num_threads(1)
    make(parser.parse_args().only)


if __name__ == "__main__":
    main()
