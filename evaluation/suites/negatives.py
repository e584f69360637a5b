"""Does what a negative prompt names stay out of a picture, and is the rest still there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from ...zoo.worlds.language import listing
from ...zoo.worlds.reading import judge, read
from ...zoo.worlds.shapes import CLEAR, Thing, sample_scene
from ..metrics.sums import Sums, ratio
from ..subject import Subject
from .base import Item, Suite
from .binding import OWN, drawn, drawn_as_meant, thing


class Negatives(Suite):
    name: ClassVar[str] = "negatives"
    kind: ClassVar = "diffusion"
    does: ClassVar[str] = (
        "Draws prompts that make a thing likely which a negative text names: how often it stays out, and what is drawn of the rest."
    )
    shown: ClassVar[Sequence[str] | None] = ("right", "kept_out", "rest", "count")
    marks: ClassVar[Sequence[str]] = ("negative",)
    batch: ClassVar[int] = 16

    naming: Literal["thing", "shape", "colour"] = Field(
        "thing", description='what the negative text says of the thing: "a green star", "star" or "green"'
    )
    by: Literal["none", "pipeline"] = Field(
        "none",
        description="who is told of it: the pipeline, as its negative_prompt, which needs guidance; or nobody but a recipe that takes one",
    )
    things: int = Field(3, ge=2, le=4, description="things of a prompt, one of which is to stay out")
    steps: int = Field(20, ge=1, description="steps of the sampler" + OWN)
    guidance: float = Field(2.0, ge=0, description="guidance scale of the pipeline" + OWN)

    @model_validator(mode="after")
    def _heard(self) -> Negatives:
        if self.by == "pipeline" and self.guidance <= 1:
            raise ValueError(
                f'by "pipeline" needs a guidance above 1, got {self.guidance}: without guidance nobody reads negative_prompt'
            )
        return self

    def asked_of(self, subject: Subject) -> Suite:
        return drawn_as_meant(self, subject)

    def items(self, count: int, seed: int) -> list[Item]:
        """Prompts of different shapes, among them one thing whose colour no other has."""
        rng = np.random.default_rng([seed, 405])
        items: list[Item] = []
        while len(items) < count:
            held = sample_scene(rng, CLEAR, habits="absent").things
            if len(held) != self.things:
                continue
            asked = [[held[i].colour, held[i].shape] for i in rng.permutation(len(held))]
            colours = [colour for colour, _ in asked]
            alone = [i for i, colour in enumerate(colours) if colours.count(colour) == 1]
            if alone:
                unwanted = alone[int(rng.integers(len(alone)))]
                data = {"asked": asked, "unwanted": unwanted, "noise": int(rng.integers(2**31))}
                items.append(Item(f"{seed}-{len(items)}", data))
        return items

    @staticmethod
    def parts(item: Item) -> tuple[list[Thing], Thing, list[Thing]]:
        """The things of the prompt, the one that is to stay out, and the others."""
        asked, place = [thing(*pair) for pair in item.data["asked"]], item.data["unwanted"]
        return asked, asked[place], [*asked[:place], *asked[place + 1 :]]

    def text(self, unwanted: Thing) -> str:
        """The negative text."""
        return listing([unwanted]) if self.naming == "thing" else getattr(unwanted, self.naming)

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        prompts = [listing(self.parts(item)[0]) for item in items]
        texts = [self.text(self.parts(item)[1]) for item in items]
        told = {"negative_prompt": texts} if self.by == "pipeline" else {}
        with subject.marked(negative=texts):
            images = drawn(subject, prompts, items, self.steps, self.guidance, **told)
        records = []
        for item, prompt, text, image in zip(items, prompts, texts, images):
            _, unwanted, others = self.parts(item)
            seen = read(image)
            said = {"thing": [s.name for s in seen], "shape": [s.shape for s in seen], "colour": [s.colour for s in seen]}
            right = judge(others, seen)
            found = {
                "kept_out": float(self.named(unwanted) not in said[self.naming]),
                "rest": right["binding"],
                "count": right["count"],
            }
            records.append({"prompt": prompt, "negative": text, "seen": said["thing"], **found})
        return records

    def named(self, unwanted: Thing) -> str:
        return unwanted.name if self.naming == "thing" else getattr(unwanted, self.naming)

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        right = record["kept_out"] * record["rest"]
        return {"pictures": 1, "right": right, **{name: record[name] for name in ("kept_out", "rest", "count")}}

    def metrics(self, sums: Sums) -> dict[str, Any]:
        """kept_out: share of pictures without what the negative text names; rest: mean share of the prompt's other things with the right
        colour on the right shape; right: both at once, rest where it is kept out and else nothing, since a push that ruins a picture keeps
        everything out; count: pictures with as many things as these."""
        return {name: ratio(sums[name], sums["pictures"]) for name in ("right", "kept_out", "rest", "count")}
