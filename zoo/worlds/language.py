"""What can be said of a scene: a description, questions with answers, and the prompts of the image generators. Words only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .shapes import COLOURS, SHAPES, Scene, Thing

DESCRIBE = "describe the image ."
NUMBERS = ("zero", "one", "two", "three", "four", "five")
SIDES = ("left", "right", "above", "below")
Kind = Literal["presence", "colour", "count", "side"]
KINDS: tuple[Kind, ...] = ("presence", "colour", "count", "side")
WORDS = sorted(
    {*SHAPES, *COLOURS, *NUMBERS, *SIDES, "yes", "no", "a", "an", "and", ",", ".", "?", "is", "are", "there", "what", "colour"}
    | {"the", "how", "many", "shapes", "where", "of", "from", "describe", "image", "in", "to"}
)


@dataclass(frozen=True)
class Question:
    kind: Kind
    text: str
    answer: str


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def caption(scene: Scene) -> str:
    """ "a red circle , a blue square and an orange star .": the things from left to right."""
    return listing(scene.things) + " ."


def listing(things: Sequence[Thing]) -> str:
    parts = [f"{article(t.colour)} {t.colour} {t.shape}" for t in things]
    return parts[0] if len(parts) == 1 else " , ".join(parts[:-1]) + " and " + parts[-1]


def presence(shape: str, scene: Scene) -> Question:
    return Question("presence", f"is there a {shape} in the image ?", "yes" if shape in scene.shapes else "no")


def colour(thing: Thing) -> Question:
    return Question("colour", f"what colour is the {thing.shape} ?", thing.colour)


def count(scene: Scene) -> Question:
    return Question("count", "how many shapes are there ?", NUMBERS[len(scene.things)])


def side(one: Thing, other: Thing) -> Question:
    """Where one lies from the other, along the axis on which they are further apart."""
    across, down = one.x - other.x, one.y - other.y
    if abs(across) >= abs(down):
        answer = "left" if across < 0 else "right"
    else:
        answer = "above" if down < 0 else "below"
    return Question("side", f"where is the {one.shape} from the {other.shape} ?", answer)


def ask(kind: Kind, scene: Scene, rng: np.random.Generator) -> Question:
    """A question of a kind, yes and no equally likely; a scene of one thing has no sides, then its colour is asked."""
    if kind == "count":
        return count(scene)
    if kind == "presence":
        absent = [s for s in SHAPES if s not in scene.shapes]
        pool = scene.shapes if rng.random() < 0.5 else absent
        return presence(pool[rng.integers(len(pool))], scene)
    if kind == "side" and len(scene.things) > 1:
        one, other = rng.permutation(len(scene.things))[:2]
        return side(scene.things[one], scene.things[other])
    return colour(scene.things[rng.integers(len(scene.things))])


def prompt(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """What an image generator is asked for: the things in any order, no places. Without rng from left to right."""
    things = list(scene.things)
    if rng is not None:
        things = [things[i] for i in rng.permutation(len(things))]
    return listing(things)
