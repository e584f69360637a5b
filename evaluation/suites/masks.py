"""Does a recipe know where the things of a picture are, or do the maps of their words: masks against the known ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from ...hooks import Plan, Words, attach, sites
from ...recipes.kit.denoisers import text_sites
from ...recipes.kit.heat import Heat
from ...zoo.worlds.drawing import mask, picture
from ...zoo.worlds.language import listing
from ...zoo.worlds.shapes import CLEAR, Scene, Thing, sample_scene
from ..metrics.images import mask_iou
from ..metrics.sums import Sums, ratio
from ..subject import Subject
from .base import Item, Suite
from .binding import OWN, drawn, drawn_as_meant
from .given_pictures import Things, check_steps, pipeline_of, side_of
from .layout import SAME


class Masks(Suite):
    name: ClassVar[str] = "masks"
    kind: ClassVar = "diffusion"
    does: ClassVar[str] = (
        "Shows pictures of coloured shapes to an image generator, with a prompt that says what they show, and compares masks of the things "
        "with the known ones: a recipe's, or where the maps of their words are high."
    )
    shown: ClassVar[Sequence[str] | None] = ("iou", "told", "rest")
    marks: ClassVar[Sequence[str]] = ("words", "picture")
    batch: ClassVar[int] = 16

    things: Things = Field((2, 3), description="fewest and most things of a picture")
    naming: Literal["things", "shapes"] = Field(
        "shapes", description='how the things are named: by their shapes alone, or "red circle"'
    )
    cut: float = Field(
        0.7,
        gt=0,
        lt=1,
        description="without a recipe that finds masks: a thing is where the map of its words is this share of its largest value, and larger "
        "than those of the other things",
    )
    strength: float = Field(
        0.3, gt=0, le=1, description="how much noise the picture has where image to image begins; 1 = noise alone"
    )
    steps: int = Field(20, ge=1, description="steps of the sampler, of which the share `strength` is made" + OWN)
    guidance: float = Field(2.0, ge=0, description="guidance scale of the pipeline" + OWN)

    @model_validator(mode="after")
    def _some(self) -> Masks:
        check_steps(self.steps, self.strength)
        return self

    def asked_of(self, subject: Subject) -> Suite:
        return drawn_as_meant(self, subject)

    def items(self, count: int, seed: int) -> list[Item]:
        rng = np.random.default_rng([seed, 408])
        items: list[Item] = []
        while len(items) < count:
            scene = sample_scene(rng, replace(CLEAR, things=self.things), habits="absent")
            if self.things[0] <= len(scene.things):
                things = [[t.shape, t.colour, t.x, t.y, t.size] for t in scene.things]
                items.append(Item(f"{seed}-{len(items)}", {"things": things, "noise": int(rng.integers(2**31))}))
        return items

    @staticmethod
    def scene(item: Item) -> Scene:
        return Scene(tuple(Thing(*fields) for fields in item.data["things"]))

    def words(self, scene: Scene) -> list[str]:
        """What the things are called, each once in the prompt."""
        return [thing.name if self.naming == "things" else thing.shape for thing in scene.things]

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        pipe = pipeline_of(subject, "image", self.name)
        side = side_of(pipe)
        scenes = [self.scene(item) for item in items]
        given, words = [picture(scene, side, CLEAR) for scene in scenes], [self.words(scene) for scene in scenes]
        prompts = [listing(list(scene.things)) for scene in scenes]
        with subject.marked(words=words, picture=given) as recipes:
            with found_by(pipe, words) as heat:
                drawn(
                    subject, prompts, items, self.steps, self.guidance, pipe=pipe, image=given, strength=self.strength,
                    output_type="latent",
                )  # fmt: skip
            found = next((one for one in (getattr(recipe, "found", None) for recipe in recipes) if one is not None), None)
        records = []
        for number, (scene, own) in enumerate(zip(scenes, words, strict=True)):
            if found is not None:
                masks = found[number].masks((side, side), may_be_empty=True)[: len(own)]
            else:
                masks = cut_out(heat(number, (side, side)), self.cut)
            records.append(self.record(scene, masks.numpy()))
        return records

    def record(self, scene: Scene, masks: np.ndarray) -> dict[str, Any]:
        """masks: bool [things, side, side]."""
        known = [mask(thing, masks.shape[-1]) for thing in scene.things]
        overlaps = [mask_iou(one, other) for one, other in zip(known, masks, strict=True)]
        return {
            "things": [thing.name for thing in scene.things],
            "iou": float(np.mean(overlaps)),
            "told": float(np.mean([overlap >= SAME for overlap in overlaps])),
            "rest": mask_iou(~np.any(known, axis=0), ~masks.any(axis=0)),
        }

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        return {"pictures": 1, **{name: record[name] for name in self.shown or ()}}

    def metrics(self, sums: Sums) -> dict[str, Any]:
        """iou: mean overlap of a thing's mask with the known one (intersection over union, of pixels); told: mean share of things with at
        least 0.5; rest: the same overlap of what belongs to no thing."""
        return {name: ratio(sums[name], sums["pictures"]) for name in self.shown or ()}


@contextlib.contextmanager
def found_by(pipe: Any, words: Sequence[Sequence[str]]) -> Iterator[Callable[[int, tuple[int, int]], torch.Tensor]]:
    """Reads the maps of words that runs of a pipeline make meanwhile, after the edits of the recipes at work: see `Heat`.

    words: of every prompt. Gives a function: (number of a picture, (height, width)) to the maps [words of its prompt, height, width].
    """
    table = text_sites(sites(pipe)).where(lambda s: s.supported)
    heat = Heat(table, Words("masks", [list(own) for own in words], occurrence="all"))

    def maps(number: int, size: tuple[int, int]) -> torch.Tensor:
        return torch.stack([heat.map(f"masks.{place}", size)[number] for place in range(len(words[number]))])

    with attach(pipe, [Plan("maps of words", heat.steps)]):
        yield maps


def cut_out(maps: torch.Tensor, share: float) -> torch.Tensor:
    """Bool [things, height, width] of maps [things, height, width]: where each is this share of its largest value, and the largest of all."""
    high = maps >= share * maps.amax(dim=(1, 2), keepdim=True)
    return high & (maps == maps.amax(dim=0)) if len(maps) > 1 else high
