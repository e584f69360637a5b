"""Is a thing taken out of a picture, without another one in its place, and does the rest stay as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from ...zoo.worlds.drawing import picture
from ...zoo.worlds.language import listing
from ...zoo.worlds.reading import judge, read
from ...zoo.worlds.shapes import CLEAR, Scene, Thing, sample_scene
from ..metrics.images import background, change_inside, covered, removed
from ..metrics.sums import Sums, ratio
from ..subject import Subject
from .base import Item, Suite
from .binding import OWN, drawn, drawn_as_meant
from .given_pictures import Box, Things, alone, check_steps, mask_picture, pipeline_of, side_of, touched

# of pictures that do not differ at all, in dB
ALIKE = 100.0


class Removal(Suite):
    name: ClassVar[str] = "removal"
    kind: ClassVar = "diffusion"
    does: ClassVar[str] = (
        "Takes one coloured shape out of a picture, by a box: how often it is gone, nothing came in its place, and the rest is as it was."
    )
    shown: ClassVar[Sequence[str] | None] = ("right", "empty", "removed", "rest", "psnr", "ssim", "inside")
    lower: ClassVar[Sequence[str]] = ("inside",)
    marks: ClassVar[Sequence[str]] = ("removed", "picture")
    batch: ClassVar[int] = 16

    by: Literal["image", "inpaint", "text"] = Field(
        "image",
        description="the pipeline: image to image, which is told of no mask; inpainting, which is; or text to image, which is told of no "
        "picture either, for recipes that begin with the picture's own noise",
    )
    prompt: Literal["empty", "rest"] = Field("empty", description='what the pipeline is told: "", or the things that stay')
    things: Things = Field((2, 3), description="fewest and most things of a picture, one of which is to go")
    margin: float = Field(
        0.02, ge=0, le=0.1, description="how far the box reaches beyond the thing, in shares of the picture's side"
    )
    strength: float = Field(0.8, gt=0, le=1, description="where image to image and inpainting begin: 1 = from noise alone")
    steps: int = Field(20, ge=1, description="steps of the sampler, of which the share `strength` is made" + OWN)
    guidance: float = Field(1.0, ge=0, description="guidance scale of the pipeline" + OWN)

    @model_validator(mode="after")
    def _some(self) -> Removal:
        if self.by != "text":
            check_steps(self.steps, self.strength)
        return self

    def asked_of(self, subject: Subject) -> Suite:
        return drawn_as_meant(self, subject)

    def items(self, count: int, seed: int) -> list[Item]:
        """Scenes with a thing whose box touches no other's."""
        rng = np.random.default_rng([seed, 406])
        items: list[Item] = []
        while len(items) < count:
            scene = sample_scene(rng, replace(CLEAR, things=self.things), habits="absent")
            free = alone(scene, self.box)
            if self.things[0] <= len(scene.things) and free:
                things = [[t.shape, t.colour, t.x, t.y, t.size] for t in scene.things]
                unwanted = free[int(rng.integers(len(free)))]
                data = {"things": things, "unwanted": unwanted, "noise": int(rng.integers(2**31))}
                items.append(Item(f"{seed}-{len(items)}", data))
        return items

    def box(self, thing: Thing) -> Box:
        """What is masked of a thing, in shares of the picture's side."""
        left, top, right, bottom = thing.box
        return (
            max(left - self.margin, 0.0), max(top - self.margin, 0.0), min(right + self.margin, 1.0), min(bottom + self.margin, 1.0),
        )  # fmt: skip

    @staticmethod
    def parts(item: Item) -> tuple[Scene, Thing, Scene]:
        """The scene, the thing that is to go, and what stays."""
        things = [Thing(*fields) for fields in item.data["things"]]
        place = item.data["unwanted"]
        return Scene(tuple(things)), things[place], Scene((*things[:place], *things[place + 1 :]))

    def mask(self, thing: Thing, side: int) -> np.ndarray:
        """Bool [side, side]: the pixels that its box touches."""
        return touched(self.box(thing), side)

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        pipe = pipeline_of(subject, self.by, self.name)
        side = side_of(pipe)
        parts = [self.parts(item) for item in items]
        given = [picture(scene, side, CLEAR) for scene, _, _ in parts]
        masks = [self.mask(unwanted, side) for _, unwanted, _ in parts]
        prompts = [listing(list(rest.things)) if self.prompt == "rest" else "" for _, _, rest in parts]
        more: dict[str, Any] = {}
        if self.by != "text":
            more = {"image": given, "strength": self.strength}
        if self.by == "inpaint":
            more |= {"mask_image": [mask_picture(mask) for mask in masks], "height": side, "width": side}
        boxes = [[self.box(unwanted)] for _, unwanted, _ in parts]
        with subject.marked(removed=boxes, picture=given):
            images = drawn(subject, prompts, items, self.steps, self.guidance, pipe=pipe, **more)
        found = zip(parts, given, masks, images, strict=True)
        return [self.record(*one) for one in found]

    def record(
        self, parts: tuple[Scene, Thing, Scene], before: Image.Image, mask: np.ndarray, after: Image.Image
    ) -> dict[str, Any]:
        """What became of one picture. `inside` compares with the scene that never had the thing."""
        _, unwanted, rest = parts
        seen = read(after)
        places = [(one.name, one.box) for one in seen]
        empty = float(not any(covered(box, mask) >= 0.5 for _, box in places))
        still = judge(list(rest.things), seen)["binding"]
        outside = background(before, after, mask)
        return {
            "unwanted": unwanted.name,
            "seen": [name for name, _ in places],
            "right": empty * still,
            "empty": empty,
            "removed": float(removed(unwanted.name, places, mask)),
            "rest": still,
            "psnr": min(outside["psnr"], ALIKE),
            "ssim": outside["ssim"],
            "inside": change_inside(picture(rest, after.width, CLEAR), after, mask),
        }

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        return {"pictures": 1, **{name: record[name] for name in self.shown or ()}}

    def metrics(self, sums: Sums) -> dict[str, Any]:
        """empty: share of pictures with nothing in the box; removed: share without the thing there, whatever came instead; rest: mean share
        of the other things that are still seen; right: both at once, rest where the box is empty and else nothing; psnr (dB), ssim: likeness
        outside the box, means; inside: mean absolute difference, in the box, from a picture that never had the thing (0 to 1)."""
        return {name: ratio(sums[name], sums["pictures"]) for name in self.shown or ()}
