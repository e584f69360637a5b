"""The world of coloured shapes: what a scene holds, and how scenes are drawn by chance. No pictures here, see `drawing`.

A scene holds up to five things of different shapes. In most scenes some shapes come with a companion (`HABITS`): a model that learns
from such scenes hallucinates companions by habit where it cannot see well. Evaluation scenes can leave habits out or break them.
Positions and sizes are fractions of the picture's side, so one scene can be drawn at any resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "moon")
COLOURS = {
    "red": (225, 40, 45),
    "orange": (245, 140, 25),
    "yellow": (240, 225, 60),
    "green": (50, 175, 70),
    "cyan": (60, 205, 215),
    "blue": (45, 80, 225),
    "purple": (155, 60, 200),
    "white": (240, 240, 240),
}
# the first seldom comes without the second
HABITS = {"circle": "square", "star": "moon", "triangle": "cross"}
# some shapes are seen more often than others, so that "popular" wrong answers exist
FREQUENCY = {"circle": 3.0, "star": 2.0, "triangle": 2.0, "diamond": 1.5, "square": 1.0, "cross": 1.0, "ring": 1.0, "moon": 1.0}

Habit = Literal["kept", "absent", "broken"]


@dataclass(frozen=True)
class Thing:
    """One coloured shape. x, y: centre, size: half its extent, all as fractions of the picture's side."""

    shape: str
    colour: str
    x: float
    y: float
    size: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) as fractions of the side."""
        return (self.x - self.size, self.y - self.size, self.x + self.size, self.y + self.size)

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Things from left to right, and the seed of everything that only the picture shows (noise, contrast, patches)."""

    things: tuple[Thing, ...]
    seed: int = 0

    @property
    def shapes(self) -> list[str]:
        """Each thing's shape; in a crowd a shape comes more than once."""
        return [thing.shape for thing in self.things]

    @property
    def kinds(self) -> list[str]:
        """Each shape once."""
        return list(dict.fromkeys(self.shapes))

    def find(self, shape: str) -> Thing | None:
        return next((thing for thing in self.things if thing.shape == shape), None)

    def boxes(self, side: int) -> dict[str, tuple[int, int, int, int]]:
        """Shape -> (left, top, right, bottom) in pixels of a picture of this side."""
        return {t.shape: tuple(round(v * side) for v in t.box) for t in self.things}  # type: ignore[misc]


@dataclass(frozen=True)
class World:
    """How scenes are drawn by chance.

    things: fewest and most things, each of another shape. repeats: at most so many further things repeat a shape. sizes: smallest and
    largest half extent. overlap: largest share of a thing's box that another may cover. companions: how often a shape of HABITS brings
    its companion. left_out: (colour, shape) pairs that never occur.
    The rest is the picture's: noise (standard deviation on a [-1, 1] picture), contrast (lowest share kept), patches that hide.
    """

    things: tuple[int, int] = (1, 5)
    repeats: int = 0
    sizes: tuple[float, float] = (0.11, 0.17)
    overlap: float = 0.15
    companions: float = 0.85
    noise: float = 0.55
    contrast: float = 0.5
    patches: int = 3
    left_out: frozenset[tuple[str, str]] = field(default_factory=frozenset)


# What the image generators learn from: clear pictures, nothing hidden, no habits, some pairs of colour and shape never shown.
CLEAR = World(
    things=(1, 4),
    sizes=(0.12, 0.18),
    overlap=0.0,
    companions=0.0,
    noise=0.0,
    contrast=1.0,
    patches=0,
    left_out=frozenset(
        {("red", "star"), ("blue", "circle"), ("green", "ring"), ("yellow", "square"), ("purple", "triangle"), ("cyan", "moon")}
    ),
)


# what is hard to count and to name: up to twelve smaller things of at most five shapes, so that some shapes are always missing
CROWDED = World(repeats=7, sizes=(0.08, 0.12))


def sample_scene(rng: np.random.Generator, world: World | None = None, *, habits: Habit = "kept") -> Scene:
    """One scene. habits: "kept" as in training, "absent" (companions only by chance), "broken" (a shape of HABITS without its companion)."""
    world = world or World()
    shapes = _shapes(rng, world, habits)
    if world.repeats:
        shapes += [shapes[i] for i in rng.integers(len(shapes), size=int(rng.integers(world.repeats + 1)))]
    things: list[Thing] = []
    for shape in shapes:
        placed = _place(rng, world, things)
        if placed is None:
            continue
        colours = [c for c in COLOURS if (c, shape) not in world.left_out]
        things.append(Thing(shape, colours[rng.integers(len(colours))], *placed))
    return Scene(tuple(sorted(things, key=lambda t: t.x)), int(rng.integers(2**31)))


def _shapes(rng: np.random.Generator, world: World, habits: Habit) -> list[str]:
    count = int(rng.integers(world.things[0], world.things[1] + 1))
    chance = np.array([FREQUENCY[s] for s in SHAPES])
    chosen: list[str] = []
    if habits == "broken":
        chosen.append(list(HABITS)[rng.integers(len(HABITS))])
    while len(chosen) < count:
        left = [i for i, s in enumerate(SHAPES) if s not in chosen and not (habits == "broken" and _companion(s, chosen))]
        if not left:
            break
        weights = chance[left] / chance[left].sum()
        shape = SHAPES[left[int(rng.choice(len(left), p=weights))]]
        chosen.append(shape)
        companion = HABITS.get(shape)
        if habits == "kept" and companion and companion not in chosen and rng.random() < world.companions:
            chosen.append(companion)
    most = world.things[1]
    return [chosen[i] for i in rng.permutation(len(chosen))[:most]] if habits != "broken" else chosen[:most]


def _companion(shape: str, chosen: Sequence[str]) -> bool:
    """Whether this shape and one that was chosen are companions."""
    return any(HABITS.get(c) == shape for c in chosen) or HABITS.get(shape) in chosen


def _place(rng: np.random.Generator, world: World, others: Sequence[Thing]) -> tuple[float, float, float] | None:
    for _ in range(60):
        size = float(rng.uniform(*world.sizes))
        x, y = (float(rng.uniform(size, 1 - size)) for _ in "xy")
        here = Thing("", "", x, y, size)
        if all(_covered(here, other) <= world.overlap and _covered(other, here) <= world.overlap for other in others):
            return x, y, size
    return None


def _covered(a: Thing, b: Thing) -> float:
    """Share of a's box that b's covers."""
    left, top = max(a.box[0], b.box[0]), max(a.box[1], b.box[1])
    right, bottom = min(a.box[2], b.box[2]), min(a.box[3], b.box[3])
    return max(right - left, 0.0) * max(bottom - top, 0.0) / (4 * a.size * a.size)
