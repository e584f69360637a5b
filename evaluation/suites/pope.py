"""POPE over the world of shapes: is there a star in the image? Half of the answers are yes.

Absent shapes are asked for in three ways: at random, the most popular ones, and those that most often come with what is present. How
often shapes occur, alone and together, is counted in the world as models learn it, since the scenes asked about may break its habits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ...zoo.worlds.language import DESCRIBE, presence
from ...zoo.worlds.shapes import SHAPES, Scene
from ..metrics.pope import pope_counts, pope_metrics, strict_yes_or_no, yes_or_no
from ..metrics.sums import Sums
from ..subject import Subject
from .base import Item
from .chair import LONGEST, VOCABULARY
from .shapes_world import CrowdSuite, frequencies, together

SPLITS = ("random", "popular", "adversarial")


class Pope(CrowdSuite):
    name = "pope"
    does = "Yes-or-no questions about the presence of shapes (POPE), absent ones chosen in three ways."
    shown = ("accuracy", *(f"accuracy/{split}" for split in SPLITS), "f1", "yes_ratio")
    lower = ("unknown",)
    neutral = ("yes_ratio",)

    pairs: int = Field(
        2, ge=1, le=4, description="at most this many shapes that are there, and as many that are not, per scene"
    )
    by: Literal["answer", "description"] = Field(
        "answer",
        description="what counts: the answer to the question, or whether the model's description of the scene names the shape",
    )
    strict: bool = Field(False, description="only answers that begin with yes or no count; else all that do not deny are a yes")

    def items(self, count: int, seed: int) -> list[Item]:
        found = []
        for number in range(count):
            scene = self.scene(seed, number)
            rng = np.random.default_rng([seed, number, 1])
            there = [scene.kinds[i] for i in rng.permutation(len(scene.kinds))[: self.pairs]]
            absent = self.absent(scene, len(there), rng)
            splits = {shape: list(SPLITS) for shape in there}
            for split in SPLITS:
                for shape in absent[split]:
                    splits.setdefault(shape, []).append(split)
            for shape, of in splits.items():
                data = {"scene": [seed, number], "shape": shape, "truth": shape in there, "splits": of}
                found.append(Item(f"{seed}-{number}-{shape}", data, f"{seed}-{number}"))
        return found

    def absent(self, scene: Scene, count: int, rng: np.random.Generator) -> dict[str, list[str]]:
        """`count` absent shapes for each split."""
        left = [shape for shape in SHAPES if shape not in scene.shapes]
        likely = {shape: max(together(present)[shape] for present in scene.kinds) for shape in left}
        return {
            "random": [left[i] for i in rng.permutation(len(left))[:count]],
            "popular": sorted(left, key=lambda shape: -frequencies()[shape])[:count],
            "adversarial": sorted(left, key=lambda shape: -likely[shape])[:count],
        }

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        questions = [presence(item.data["shape"], self.scene_of(item)).text for item in items]
        pictures = [self.picture(item) for item in items]
        if self.by == "description":
            described = subject.generate([subject.chat(DESCRIBE, picture=True)] * len(items), pictures, LONGEST)
            said = ["yes" if item.data["shape"] in VOCABULARY.mentions(text) else "no" for item, text in zip(items, described)]
        else:
            said = subject.generate([subject.chat(question, picture=True) for question in questions], pictures, 8)
        return [
            {"question": question, "answer": text, "truth": item.data["truth"], "splits": item.data["splits"]}
            for question, text, item in zip(questions, said, items)
        ]

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        said = strict_yes_or_no(record["answer"]) if self.strict else yes_or_no(record["answer"])
        one = pope_counts(said, record["truth"])
        return {f"{name}/{split}": value for split in record["splits"] for name, value in one.items()}

    def chance(self) -> dict[str, float]:
        # as many shapes that are there are asked for as ones that are not
        return {name: 0.5 for name in ("accuracy", *(f"accuracy/{split}" for split in SPLITS))}

    def metrics(self, sums: Sums) -> dict[str, Any]:
        """Every metric of every split, and their mean over the splits."""
        of = {split: pope_metrics(_part(sums, split)) for split in SPLITS}
        mean = {name: sum(of[split][name] for split in SPLITS) / len(SPLITS) for name in of[SPLITS[0]]}
        return mean | {f"{name}/{split}": value for split in SPLITS for name, value in of[split].items()}


def _part(sums: Sums, split: str) -> Sums:
    ending = f"/{split}"
    return Sums({name.removesuffix(ending): value for name, value in sums.items() if name.endswith(ending)})
