"""What the suites over the world of coloured shapes share: scenes from seeds, their pictures, and how often shapes come together."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from ...zoo.worlds.drawing import picture
from ...zoo.worlds.shapes import CROWDED, SHAPES, Habit, Scene, World, sample_scene
from .base import Item, Suite

# scenes from which the statistics of the world are taken, always the same
STATISTICS, STATISTICS_SEED = 2000, 20240


class ShapesSuite(Suite):
    """Base of suites over the world of shapes. Scenes are as hard to see as the parameters say; by default they are like those of training."""

    kind = "lvlm"
    batch = 32

    noise: float = Field(0.5, ge=0, description="standard deviation of the noise on a picture of [-1, 1]")
    contrast: float = Field(0.5, gt=0, le=1, description="lowest contrast of a picture; 1 = always full")
    patches: int = Field(3, ge=0, description="patches that hide parts of the picture")
    habits: Habit = Field(
        "kept", description="scenes with companions as in training (kept), by chance (absent), or without (broken)"
    )
    side: int = Field(48, ge=16, description="side of the picture in pixels")

    @property
    def world(self) -> World:
        return replace(self.inhabited, noise=self.noise, contrast=self.contrast, patches=self.patches)

    @property
    def inhabited(self) -> World:
        """The world before it is made hard to see."""
        return World()

    def scene(self, seed: int, number: int) -> Scene:
        """The number-th scene of a seed; the same whatever came before."""
        return sample_scene(np.random.default_rng([seed, number]), self.world, habits=self.habits)

    def scene_of(self, item: Item) -> Scene:
        return self.scene(*item.data["scene"])

    def picture(self, item: Item) -> Any:
        return picture(self.scene_of(item), self.side, self.world)


class CrowdSuite(ShapesSuite):
    """Base of suites whose questions also fit scenes that show a shape more than once."""

    crowded: bool = Field(False, description="up to twelve smaller things, several of one shape, instead of up to five")

    @property
    def inhabited(self) -> World:
        return CROWDED if self.crowded else World()


@functools.cache
def frequencies() -> dict[str, float]:
    """Shape -> share of scenes that hold it, in the world as models learn it."""
    return {shape: together(shape)[shape] for shape in SHAPES}


@functools.cache
def together(shape: str) -> dict[str, float]:
    """Other shape -> share of all scenes that hold both."""
    table = _holds()
    mine = table[:, SHAPES.index(shape)]
    return {other: float((mine & table[:, i]).mean()) for i, other in enumerate(SHAPES)}


@functools.cache
def _holds() -> np.ndarray:
    """bool [scenes, shapes]: which scenes hold which shapes."""
    rng = np.random.default_rng(STATISTICS_SEED)
    scenes = [sample_scene(rng, World(), habits="kept").shapes for _ in range(STATISTICS)]
    return np.array([[shape in held for shape in SHAPES] for held in scenes])
