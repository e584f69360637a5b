"""Is a thing of one picture put into another one, in its place and light, and does the rest of that stay as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from ...zoo.worlds.drawing import mask, picture
from ...zoo.worlds.language import listing
from ...zoo.worlds.reading import judge, read
from ...zoo.worlds.shapes import CLEAR, Scene, Thing, sample_scene
from ..metrics.images import background, change_inside, covered
from ..metrics.sums import Sums, ratio
from ..subject import Subject
from .base import Item, Suite
from .binding import OWN, drawn, drawn_as_meant
from .given_pictures import Things, alone, mask_picture, pipeline_of, side_of, touched
from .removal import ALIKE

# the thing in its own picture
OWN_SIZE = 0.24


class Composition(Suite):
    name: ClassVar[str] = "composition"
    kind: ClassVar = "diffusion"
    does: ClassVar[str] = (
        "Puts a coloured shape from a picture of its own, which is darker, into another picture, by a box: how often it is there in its "
        "colour, and the rest as it was."
    )
    shown: ClassVar[Sequence[str] | None] = ("right", "there", "rest", "psnr", "ssim", "inside")
    lower: ClassVar[Sequence[str]] = ("inside",)
    marks: ClassVar[Sequence[str]] = ("background", "reference", "mask", "box")
    batch: ClassVar[int] = 16

    by: Literal["text", "inpaint", "pasted"] = Field(
        "text",
        description="the pipeline: text to image, which is told of no picture, for recipes that begin with the pictures' own noise; "
        "inpainting, which is told of the background and the box; or none, the thing pasted into the background as it is",
    )
    things: Things = Field((2, 3), description="fewest and most things of the composed picture, one of which is put in")
    light: float = Field(0.6, gt=0, le=1, description="how bright the thing's own picture is; 1 = as the background")
    steps: int = Field(20, ge=1, description="steps of the sampler" + OWN)
    guidance: float = Field(2.0, ge=0, description="guidance scale of the pipeline" + OWN)

    def asked_of(self, subject: Subject) -> Suite:
        return drawn_as_meant(self, subject)

    def items(self, count: int, seed: int) -> list[Item]:
        """Scenes with a thing whose box touches no other's."""
        rng = np.random.default_rng([seed, 407])
        items: list[Item] = []
        while len(items) < count:
            scene = sample_scene(rng, replace(CLEAR, things=self.things), habits="absent")
            free = alone(scene, lambda thing: thing.box)
            if self.things[0] <= len(scene.things) and free:
                things = [[t.shape, t.colour, t.x, t.y, t.size] for t in scene.things]
                data = {"things": things, "put": free[int(rng.integers(len(free)))], "noise": int(rng.integers(2**31))}
                items.append(Item(f"{seed}-{len(items)}", data))
        return items

    @staticmethod
    def parts(item: Item) -> tuple[Thing, Scene]:
        """The thing that is put in, where it is to be, and the background without it."""
        things = [Thing(*fields) for fields in item.data["things"]]
        place = item.data["put"]
        return things[place], Scene((*things[:place], *things[place + 1 :]))

    def reference(self, thing: Thing, side: int) -> tuple[Image.Image, np.ndarray]:
        """The thing alone in the middle of a picture of its own, and its mask [side, side]."""
        own = replace(thing, x=0.5, y=0.5, size=OWN_SIZE)
        image = picture(Scene((own,)), side, CLEAR)
        return Image.fromarray((np.asarray(image) * self.light).round().astype(np.uint8)), mask(own, side)

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        pipe = pipeline_of(subject, "inpaint" if self.by == "inpaint" else "text", self.name)
        side = side_of(pipe)
        parts = [self.parts(item) for item in items]
        given = [picture(rest, side, CLEAR) for _, rest in parts]
        references = [self.reference(thing, side) for thing, _ in parts]
        held = [touched(thing.box, side) for thing, _ in parts]
        prompts = [listing([thing, *rest.things]) for thing, rest in parts]
        more: dict[str, Any] = {}
        if self.by == "inpaint":
            more = {"image": given, "mask_image": list(map(mask_picture, held)), "strength": 1.0, "height": side, "width": side}
        if self.by == "pasted":
            images = [pasted(*one, *own) for one, own in zip(zip(given, [t for t, _ in parts]), references, strict=True)]
        else:
            with subject.marked(
                background=given,
                reference=[image for image, _ in references],
                mask=[own.astype(int).tolist() for _, own in references],
                box=[thing.box for thing, _ in parts],
            ):
                images = drawn(subject, prompts, items, self.steps, self.guidance, pipe=pipe, **more)
        return [self.record(*one) for one in zip(parts, given, held, images, strict=True)]

    def record(self, parts: tuple[Thing, Scene], before: Image.Image, held: np.ndarray, after: Image.Image) -> dict[str, Any]:
        """What became of one picture. `inside` compares with the scene that has the thing."""
        thing, rest = parts
        seen = read(after)
        there = float(any(one.name == thing.name and covered(one.box, held) >= 0.5 for one in seen))
        still = judge(list(rest.things), seen)["binding"]
        outside = background(before, after, held)
        return {
            "put": thing.name,
            "seen": [one.name for one in seen],
            "right": there * still,
            "there": there,
            "rest": still,
            "psnr": min(outside["psnr"], ALIKE),
            "ssim": outside["ssim"],
            "inside": change_inside(picture(Scene((*rest.things, thing)), after.width, CLEAR), after, held),
        }

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        return {"pictures": 1, **{name: record[name] for name in self.shown or ()}}

    def metrics(self, sums: Sums) -> dict[str, Any]:
        """there: share of pictures with the thing in its box, in its own colour; rest: mean share of the other things that are still seen;
        right: both at once; psnr (dB), ssim: likeness outside the box, means; inside: mean absolute difference, in the box, from the
        picture that had the thing from the start (0 to 1)."""
        return {name: ratio(sums[name], sums["pictures"]) for name in self.shown or ()}


def pasted(given: Image.Image, thing: Thing, reference: Image.Image, held: np.ndarray) -> Image.Image:
    """The background with the thing cut out of its own picture, scaled to where it goes."""
    ratio_ = thing.size / OWN_SIZE
    sides = (max(round(reference.width * ratio_), 1), max(round(reference.height * ratio_), 1))
    corner = round(thing.x * given.width - sides[0] / 2), round(thing.y * given.height - sides[1] / 2)
    image = given.copy()
    image.paste(reference.resize(sides, Image.Resampling.BICUBIC), corner, mask_picture(held).resize(sides))
    return image
