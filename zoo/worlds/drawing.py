"""Pictures of scenes with PIL: shapes with smooth edges, and the trouble that hides them (contrast, patches, noise)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .shapes import COLOURS, Scene, Thing, World

BACKGROUND = (28, 28, 34)
# shapes are drawn this much larger and then reduced, for smooth edges
FINER = 3


def picture(scene: Scene, side: int, world: World | None = None) -> Image.Image:
    """The scene as an RGB picture of side x side pixels; the same scene, world and side always give the same pixels."""
    world = world or World()
    canvas = Image.new("RGB", (side * FINER, side * FINER), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _draw(pen, thing, side * FINER, COLOURS[thing.colour], BACKGROUND)
    image = canvas.reduce(FINER)
    if world.contrast >= 1 and not world.patches and not world.noise:
        return image
    return _troubled(image, np.random.default_rng(scene.seed), world)


def _troubled(image: Image.Image, rng: np.random.Generator, world: World) -> Image.Image:
    side = image.width
    values = np.asarray(image, dtype=np.float32) / 127.5 - 1.0
    base = np.asarray(BACKGROUND, dtype=np.float32) / 127.5 - 1.0
    values = base + rng.uniform(world.contrast, 1.0) * (values - base)
    for _ in range(world.patches):
        width, height = rng.integers(side // 12, side // 5 + 1, size=2)
        left, top = rng.integers(0, side - width), rng.integers(0, side - height)
        values[top : top + height, left : left + width] = rng.uniform(-0.9, 0.3)
    values += world.noise * rng.standard_normal(values.shape, dtype=np.float32)
    return Image.fromarray(np.clip(np.rint((values + 1.0) * 127.5), 0, 255).astype(np.uint8))


def mask(thing: Thing, side: int) -> np.ndarray:
    """bool [side, side]: where the thing is (more than half of a pixel), as if nothing lay over it."""
    canvas = Image.new("L", (side * FINER, side * FINER), 0)
    _draw(ImageDraw.Draw(canvas), thing, side * FINER, 255, 0)
    return np.asarray(canvas.reduce(FINER)) > 127


def _draw(pen: ImageDraw.ImageDraw, thing: Thing, side: int, colour: Any, background: Any) -> None:
    x, y, r = thing.x * side, thing.y * side, thing.size * side
    if thing.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif thing.shape == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        pen.ellipse((x - 0.5 * r, y - 0.5 * r, x + 0.5 * r, y + 0.5 * r), fill=background)
    elif thing.shape == "moon":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        pen.ellipse((x - 0.3 * r, y - 0.95 * r, x + 1.6 * r, y + 0.95 * r), fill=background)
    elif thing.shape == "square":
        pen.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=colour)
    elif thing.shape == "cross":
        pen.rectangle((x - r, y - 0.34 * r, x + r, y + 0.34 * r), fill=colour)
        pen.rectangle((x - 0.34 * r, y - r, x + 0.34 * r, y + r), fill=colour)
    else:
        pen.polygon([(x + dx * r, y + dy * r) for dx, dy in CORNERS[thing.shape]], fill=colour)


def _star() -> list[tuple[float, float]]:
    turns = [(1.0 if i % 2 == 0 else 0.42, math.pi * (i / 5 - 0.5)) for i in range(10)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in turns]


CORNERS = {
    "triangle": [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)],
    "diamond": [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)],
    "star": _star(),
}
