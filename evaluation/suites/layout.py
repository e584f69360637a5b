"""Does an image generator draw each thing of the prompt in the box that it was given, and the right thing at that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from ...zoo.worlds.language import listing
from ...zoo.worlds.reading import Seen, judge, read
from ...zoo.worlds.shapes import CLEAR, Thing, sample_scene
from ..metrics.images import box_iou
from ..metrics.sums import Sums, ratio
from ..subject import Subject
from .base import Item, Suite
from .binding import drawn, thing

# boxes that overlap by this share of their union are the same, as object detection counts it
SAME = 0.5
# places a side of the masks that a canvas is divided by
CELLS = 32
Box = tuple[float, float, float, float]


class Layout(Suite):
    name: ClassVar[str] = "layout"
    kind: ClassVar = "diffusion"
    does: ClassVar[str] = (
        "Draws prompts of coloured shapes with a box for each, which only a recipe is told: the right thing in its box, all there."
    )
    shown: ClassVar[Sequence[str] | None] = ("placed", "iou", "inside", "binding", "extra")
    lower: ClassVar[Sequence[str]] = ("extra",)
    marks: ClassVar[Sequence[str]] = ("boxes", "cells", "words")
    batch: ClassVar[int] = 16

    least: int = Field(2, ge=1, le=4, description="fewest things of a prompt")
    most: int = Field(3, ge=1, le=4, description="most things of a prompt")
    steps: int = Field(20, ge=1, description="steps of the sampler")
    guidance: float = Field(2.0, ge=0, description="guidance scale of the pipeline")
    side: int | None = Field(None, ge=16, description="side of the picture in pixels; None: the pipeline's own")
    pictures: int = Field(
        1,
        ge=1,
        le=64,
        description="pictures of every prompt, of which the one whose things lie best is kept, as one chooses without a recipe",
    )

    @model_validator(mode="after")
    def _some(self) -> Layout:
        if self.least > self.most:
            raise ValueError(f"least {self.least} must not lie above most {self.most}")
        return self

    def items(self, count: int, seed: int) -> list[Item]:
        """Scenes of different shapes, none of them over another, in an order that says nothing of their places."""
        rng = np.random.default_rng([seed, 406])
        items: list[Item] = []
        while len(items) < count:
            things = sample_scene(rng, CLEAR, habits="absent").things
            if self.least <= len(things) <= self.most:
                asked = [things[i] for i in rng.permutation(len(things))]
                data = {
                    "asked": [[t.colour, t.shape] for t in asked],
                    "boxes": [[round(side, 4) for side in t.box] for t in asked],
                    "noise": int(rng.integers(2**31)),
                }
                items.append(Item(f"{seed}-{len(items)}", data))
        return items

    @staticmethod
    def asked(item: Item) -> dict[str, tuple[Thing, Box]]:
        """{what the prompt says: the thing, and its box in shares of the picture}."""
        things = [thing(*pair) for pair in item.data["asked"]]
        return {t.name: (t, tuple(box)) for t, box in zip(things, item.data["boxes"])}  # type: ignore[misc]

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        asked = [self.asked(item) for item in items]
        prompts = [listing([one for one, _ in each.values()]) for each in asked]
        size = {} if self.side is None else {"height": self.side, "width": self.side}
        boxes = [{name: box for name, (_, box) in each.items()} for each in asked]
        told = {"boxes": boxes, "cells": [cells(each) for each in asked], "words": [list(each) for each in asked]}
        with subject.marked(**told):
            turns = [
                drawn(subject, prompts, [other_noise(item, turn) for item in items], self.steps, self.guidance, **size)
                for turn in range(self.pictures)
            ]
        records = []
        for each, prompt, images in zip(asked, prompts, zip(*turns)):
            judged = []
            for image in images:
                seen = read(image)
                right = judge([one for one, _ in each.values()], seen)
                judged.append({"seen": [s.name for s in seen], **located(each.values(), seen, image.size), **right})
            records.append(
                {"prompt": prompt, **max(judged, key=lambda found: (found["placed"], found["iou"], found["binding"]))}
            )
        return records

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        return {"pictures": 1, **{name: record[name] for name in ("placed", "iou", "inside", "binding", "extra")}}

    def metrics(self, sums: Sums) -> dict[str, Any]:
        """placed: mean share of things that are there with a box which overlaps theirs by half of both together (IoU 0.5); iou: mean
        overlap of their boxes, 0 for a thing that is not there; inside: share of things whose middle lies in their box; binding: share
        that is there at all, wherever; extra: things per picture that nobody asked for."""
        return {name: ratio(sums[name], sums["pictures"]) for name in ("placed", "iou", "inside", "binding", "extra")}


def other_noise(item: Item, turn: int) -> Item:
    """An item as it is drawn once more."""
    return replace(item, data={**item.data, "noise": item.data["noise"] + turn})


def cells(asked: Mapping[str, tuple[Thing, Box]]) -> dict[str, list[list[int]]]:
    """{a thing's own prompt: mask of the places that are nearer to the middle of its box than to any other}: they cover the canvas."""
    down, across = np.mgrid[0:CELLS, 0:CELLS] + 0.5
    middles = [((box[0] + box[2]) / 2 * CELLS, (box[1] + box[3]) / 2 * CELLS) for _, box in asked.values()]
    nearest = np.stack([np.hypot(across - x, down - y) for x, y in middles]).argmin(axis=0)
    return {listing([one]): (nearest == number).astype(int).tolist() for number, (one, _) in enumerate(asked.values())}


def located(asked: Iterable[tuple[Thing, Box]], seen: Sequence[Seen], size: tuple[int, int]) -> dict[str, float]:
    """Where the asked (thing, box) are among what is seen in a picture of this width and height: the best of several that are alike."""
    overlaps, inside = [], []
    for one, box in asked:
        alike = [tuple(side / size[i % 2] for i, side in enumerate(s.box)) for s in seen if s.name == one.name]
        overlaps.append(max((box_iou(box, other) for other in alike), default=0.0))
        middles = [((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in alike]
        inside.append(any(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in middles))
    return {
        "placed": float(np.mean([each >= SAME for each in overlaps])),
        "iou": float(np.mean(overlaps)),
        "inside": float(np.mean(inside)),
    }
