"""Whether recipes make shapes-llava look at what it is asked about: the share of its attention on the picture inside the shape's box.

    python benchmarks/effect_attention.py                                  # prints a table
    python benchmarks/effect_attention.py --picture docs/attention.png     # and draws one scene

Each scene is asked for the colour of one of its shapes. The box is known, and so is its share of the picture, which a model that looked
everywhere alike would give it. Intervals: bootstrap over scenes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reattend.comparison import compare
from reattend.comparison.loading import load
from reattend.evaluation.metrics.intervals import mean_change
from reattend.zoo.worlds.drawing import picture
from reattend.zoo.worlds.language import colour
from reattend.zoo.worlds.shapes import World, sample_scene

SIDE = 48
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "pai, attention part": ("pai", {"gamma": 1}),
    "pai, attention part, alpha 0.5": ("pai", {"gamma": 1, "alpha": 0.5}),
    "selective-emphasis": ("selective-emphasis", {}),
    "gift": ("gift", {"saliency_layers": [2], "enhance_layers": [3, 4]}),
    "gift, alpha 10": ("gift", {"saliency_layers": [2], "enhance_layers": [3, 4], "alpha": 10}),
    "vhr": ("vhr", {"layers": [1, 3, 4, 5]}),
    "cmai": ("cmai", {}),
}


def scenes(count: int) -> list[tuple[Any, str, tuple[int, int, int, int]]]:
    """(picture, question, box of the shape that is asked about), of scenes with at least two shapes."""
    found, seed = [], 0
    while len(found) < count:
        rng = np.random.default_rng([seed, 77])
        scene, seed = sample_scene(rng, World()), seed + 1
        if len(scene.things) < 2:
            continue
        thing = scene.things[int(rng.integers(len(scene.things)))]
        found.append((picture(scene, SIDE, World()), colour(thing).text, scene.boxes(SIDE)[thing.shape]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--picture", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load("zoo:shapes-llava")
    asked = scenes(given.count)
    even = [(box[2] - box[0]) * (box[3] - box[1]) / SIDE**2 for _, _, box in asked]
    print(f"share of the attention on the picture inside the box of what is asked about, {given.count} scenes")
    print(f"box's share of the picture: {np.mean(even):.3f}\n")
    print("| recipe | before | after | change, 95 % interval |\n|---|---|---|---|")
    for label, recipe in RECIPES.items():
        shares = []
        for i, (image, question, box) in enumerate(asked):
            report = compare(pipe, recipe, image=image, text=question, max_new_tokens=2, do_sample=False, progress=False)
            shares.append(report.attention_inside(box))
            if given.picture is not None and i == 0 and label == "gift, alpha 10":
                report.attention_map().quantize().save(given.picture, optimize=True)
        before, after = ([s[side] for s in shares] for side in ("before", "after"))
        change = mean_change(before, after)
        moved = f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
        print(f"| {label} | {np.mean(before):.3f} | {np.mean(after):.3f} | {moved} |", flush=True)


if __name__ == "__main__":
    main()
