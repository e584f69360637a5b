"""Does an image generator draw what the prompt says: the right colours on the right shapes, nothing missing, nothing more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from ...zoo.loading import meant
from ...zoo.worlds.language import listing
from ...zoo.worlds.reading import judge, read
from ...zoo.worlds.shapes import CLEAR, Thing, sample_scene
from ..metrics.sums import Sums, ratio
from ..subject import Subject
from .base import Item, Suite
from .word_embeddings import scaled

OWN = "; of a model of the zoo that is drawn in one way (shapes-turbo) its own, where it is not named"


class Binding(Suite):
    name: ClassVar[str] = "binding"
    kind: ClassVar = "diffusion"
    does: ClassVar[str] = (
        "Draws prompts of coloured shapes and reads the pictures: right colour on right shape, all there, right count."
    )
    shown: ClassVar[Sequence[str] | None] = ("binding", "whole", "shapes", "count", "extra")
    lower: ClassVar[Sequence[str]] = ("extra",)
    marks: ClassVar[Sequence[str]] = ("words",)
    batch: ClassVar[int] = 16

    least: int = Field(2, ge=1, le=4, description="fewest things of a prompt")
    steps: int = Field(20, ge=1, description="steps of the sampler" + OWN)
    guidance: float = Field(2.0, ge=0, description="guidance scale of the pipeline" + OWN)
    side: int | None = Field(None, ge=16, description="side of the picture in pixels; None: the pipeline's own")
    naming: Literal["both", "colours", "shapes"] = Field(
        "both", description="the words of a prompt that are named to recipes, and that `prompting` is about"
    )
    prompting: Literal["none", "repeated", "scaled"] = Field(
        "none",
        description="the named words also stand out in what the pipeline is given, as without any recipe: each said twice in a row, or "
        "their columns of the encoded prompt moved away from the empty prompt's, as compel does it",
    )
    factor: float = Field(1.5, ge=0, le=10, description='how far, with prompting "scaled"; 1 = not')

    def asked_of(self, subject: Subject) -> Suite:
        return drawn_as_meant(self, subject)

    def items(self, count: int, seed: int) -> list[Item]:
        rng = np.random.default_rng([seed, 404])
        items: list[Item] = []
        while len(items) < count:
            scene = sample_scene(rng, CLEAR, habits="absent")
            if len(scene.things) >= self.least:
                things = [scene.things[i] for i in rng.permutation(len(scene.things))]
                asked = [[t.colour, t.shape] for t in things]
                items.append(Item(f"{seed}-{len(items)}", {"asked": asked, "noise": int(rng.integers(2**31))}))
        return items

    @staticmethod
    def asked(item: Item) -> list[Thing]:
        return [thing(*pair) for pair in item.data["asked"]]

    def words(self, item: Item) -> list[str]:
        """The words of a prompt that are named, each once."""
        chosen = {"both": (0, 1), "colours": (0,), "shapes": (1,)}[self.naming]
        return list(dict.fromkeys(pair[place] for pair in item.data["asked"] for place in chosen))

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        prompts = [listing(self.asked(item)) for item in items]
        words = [self.words(item) for item in items]
        given: list[str] | None = prompts
        more: dict[str, Any] = {} if self.side is None else {"height": self.side, "width": self.side}
        if self.prompting == "repeated":
            given = [" ".join(f"{w} {w}" if w in own else w for w in p.split()) for p, own in zip(prompts, words)]
        with subject.marked(words=words):
            if self.prompting == "scaled":
                given, more = None, more | scaled(subject.source, prompts, words, self.factor)
            images = drawn(subject, given, items, self.steps, self.guidance, **more)
        records = []
        for item, prompt, image in zip(items, prompts, images):
            seen = read(image)
            records.append({"prompt": prompt, "seen": [s.name for s in seen], **judge(self.asked(item), seen)})
        return records

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        names = ("binding", "whole", "shapes", "colours", "count", "extra")
        return {"pictures": 1, **{name: record[name] for name in names}}

    def metrics(self, sums: Sums) -> dict[str, Any]:
        """binding: mean share of things with the right colour on the right shape; whole: pictures with all of them; shapes, colours:
        shares found at all; count: pictures with as many things as asked for; extra: things per picture that nobody asked for."""
        return {
            name: ratio(sums[name], sums["pictures"]) for name in ("binding", "whole", "shapes", "colours", "count", "extra")
        }


def thing(colour: str, shape: str) -> Thing:
    """A thing of a prompt, which has no place."""
    return Thing(shape, colour, 0.5, 0.5, 0.15)


def drawn_as_meant(suite: Suite, subject: Subject) -> Suite:
    """The suite with the steps and the guidance of a model of the zoo that is drawn in one way, as far as nobody named them. Raises
    ReattendError where they do not go with what was named."""
    own = meant(subject.pipe)
    named = {name: getattr(suite, name) for name in suite.model_fields_set}
    return type(suite)(**{**own, **named}) if own else suite


def drawn(
    subject: Subject,
    prompts: Sequence[str] | None,
    items: Sequence[Item],
    steps: int,
    guidance: float,
    pipe: Any = None,
    **more: Any,
) -> list[Any]:
    """The pictures of a batch. Each has its item's own noise, so that plain and changed runs begin alike. prompts: None with
    prompt_embeds among `more`. pipe: another pipeline of the subject's parts."""
    noise = [torch.Generator().manual_seed(item.data["noise"]) for item in items]
    pipe = subject.source if pipe is None else pipe
    with subject.quiet(pipe):
        return pipe(prompts, generator=noise, num_inference_steps=steps, guidance_scale=guidance, **more).images
