"""Does an image encoder still see the same under a recipe: its features, and its class where it names one, beside those without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch.nn.functional import normalize

from ...zoo.worlds.drawing import picture
from ...zoo.worlds.shapes import World, sample_scene
from ..metrics.sums import Sums, ratio
from ..subject import Subject
from .base import Item, Suite


class Agreement(Suite):
    name: ClassVar[str] = "agreement"
    kind: ClassVar = "vision"
    does: ClassVar[str] = (
        "Shows pictures of coloured shapes to an image encoder, with and without the recipe: same class, near features."
    )
    shown: ClassVar[Sequence[str] | None] = ("found", "distance", "class")
    lower: ClassVar[Sequence[str]] = ("distance",)
    batch: ClassVar[int] = 32

    side: int = Field(224, ge=16, description="side of the pictures in pixels, before the encoder's own preparation")

    def items(self, count: int, seed: int) -> list[Item]:
        return [Item(f"{seed}-{number}", {"scene": [seed, number]}) for number in range(count)]

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        scenes = [sample_scene(np.random.default_rng(item.data["scene"]), World(), habits="kept") for item in items]
        pictures = [picture(scene, self.side) for scene in scenes]
        features, classes = subject.seen(pictures)
        with subject.untouched():
            plain, plain_classes = subject.seen(pictures)
        near = normalize(features, dim=1) @ normalize(plain, dim=1).T
        found = near.argmax(dim=1) == torch.arange(len(items))
        records = []
        for row in range(len(items)):
            records.append(
                {"found": float(found[row]), "distance": float(1 - near[row, row]), "classes": float(classes is not None)}
            )
            if classes is not None and plain_classes is not None:
                records[-1].update({"class": float(classes[row] == plain_classes[row]), "seen": int(classes[row])})
        return records

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        names = ("found", "distance", "classes", "class")
        return {"pictures": 1, **{name: record.get(name, 0.0) for name in names}}

    def metrics(self, sums: Sums) -> dict[str, Any]:
        """found: pictures whose features are nearest to their own without the recipe, of those of their batch; distance: 1 - cosine of the
        two; class: pictures with the same most likely class, of an encoder that names classes."""
        found = {name: ratio(sums[name], sums["pictures"]) for name in ("found", "distance")}
        return {**found, "class": ratio(sums["class"], sums["classes"])}
