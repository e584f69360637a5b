"""Whether recipes make shapes-llava look at what it is asked about: the share of its attention on the picture inside the shape's box.

    python benchmarks/effect_attention.py                                  # docs/attention.json, and its table for docs/results.md
    python benchmarks/effect_attention.py --picture docs/attention.png     # draws one scene and measures nothing

Each scene is asked for the colour of one of its shapes. The box is known, and so is its share of the picture, which a model that looked
everywhere alike would give it. Strengths are chosen on scenes of one seed, and confirmed on those of another.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import Row, believed, table
from reattend.comparison import compare
from reattend.comparison.loading import load
from reattend.evaluation.metrics.sums import ratio
from reattend.zoo.worlds.drawing import picture
from reattend.zoo.worlds.language import colour
from reattend.zoo.worlds.shapes import World, sample_scene

STORE = Path(__file__).resolve().parents[1] / "docs" / "attention.json"
SIDE, CHOSEN_ON, CONFIRMED_ON = 48, 0, 1
LAYERS = {"saliency_layers": [2], "enhance_layers": [3, 4]}
# {slug: {label: parameters}} from weak to strong
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "pai": {"attention part": {"gamma": 1}, "attention part, alpha 0.5": {"gamma": 1, "alpha": 0.5}},
    "selective-emphasis": {"default": {}, "alpha 1.4, beta 0.6": {"alpha": 1.4, "beta": 0.6}},
    "gift": {"default": LAYERS, "alpha 10": {**LAYERS, "alpha": 10}},
    "vhr": {"alpha 1.5": {"alpha": 1.5}, "default": {}},
    "cmai": {"default": {}, "gamma 0.9": {"gamma": 0.9}},
}
DRAWN = ("gift", {**LAYERS, "alpha": 10})


def scenes(count: int, seed: int) -> list[tuple[Any, str, tuple[int, int, int, int]]]:
    """(picture, question, box of the shape that is asked about), of scenes with at least two shapes."""
    found, number = [], 0
    while len(found) < count:
        rng = np.random.default_rng([number, 77, seed])
        scene, number = sample_scene(rng, World()), number + 1
        if len(scene.things) < 2:
            continue
        thing = scene.things[int(rng.integers(len(scene.things)))]
        found.append((picture(scene, SIDE, World()), colour(thing).text, scene.boxes(SIDE)[thing.shape]))
    return found


def looked_at(pipe: Any, recipe: tuple[str, dict[str, Any]], scene: tuple) -> Any:
    image, question, _ = scene
    return compare(pipe, recipe, image=image, text=question, max_new_tokens=2, do_sample=False, progress=False)


def rows(pipe: Any, wanted: dict[str, tuple[str, dict[str, Any]]], asked: list) -> list[Row]:
    """The plain model and every variant; counts: the share inside the box."""
    groups = [str(place) for place in range(len(asked))]
    found: list[Row] = []
    for label, (slug, parameters) in wanted.items():
        shares = [looked_at(pipe, (slug, parameters), scene).attention_inside(scene[2]) for scene in asked]
        if not found:
            found.append(Row("none", "plain", "", groups, [{"share": s["before"], "n": 1.0} for s in shares]))
        found.append(Row(label, "tried", slug, groups, [{"share": s["after"], "n": 1.0} for s in shares], applied=1))
        print(label, np.mean([s["after"] for s in shares]), flush=True)
    return found


def measure(choose: int, confirm: int) -> dict[str, Any]:
    pipe = load("zoo:shapes-llava")
    tried = {f"{slug}, {label}": (slug, given) for slug, these in RECIPES.items() for label, given in these.items()}

    def metrics(sums: Any) -> dict[str, Any]:
        return {"share": ratio(sums["share"], sums["n"])}

    first = table(rows(pipe, tried, scenes(choose, CHOSEN_ON)), metrics, ["share"], CHOSEN_ON)
    value = {row["label"]: row["metrics"]["share"]["value"] for row in first["rows"]}
    chosen = {
        slug: max((f"{slug}, {label}" for label in these), key=lambda label: value[label]) for slug, these in RECIPES.items()
    }
    asked = scenes(confirm, CONFIRMED_ON)
    kept = {label: given for label, given in tried.items() if label in chosen.values() or label.endswith(("default", "part"))}
    box = float(np.mean([(b[2] - b[0]) * (b[3] - b[1]) / SIDE**2 for _, _, b in asked]))
    return {
        "box": box,
        "chosen": chosen,
        "choosing": first,
        "confirming": table(rows(pipe, kept, asked), metrics, ["share"], CONFIRMED_ON),
    }


def written(found: dict[str, Any]) -> str:
    """The table for docs/results.md."""
    confirmed = found["confirming"]
    lines = ["| recipe | | share inside the box | change, 95 % interval |", "|---|---|---|---|"]
    lines.append(f"| a look everywhere alike | | {found['box']:.3f} | |")
    for row in confirmed["rows"]:
        value, change = row["metrics"]["share"]["value"], row.get("changes", {}).get("share")
        mark = "**" if change and believed(change) else ""
        moved = f"{mark}{change['value']:+.3f}{mark} [{change['low']:+.3f}, {change['high']:+.3f}]" if change else ""
        role = "chosen" if row["label"] in found["chosen"].values() else ""
        lines.append(f"| {'no recipe' if row['role'] == 'plain' else row['label']} | {role} | {value:.3f} | {moved} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--choose", type=int, default=40, help="scenes on which strengths are chosen")
    parser.add_argument("--confirm", type=int, default=100, help="scenes on which they are confirmed")
    parser.add_argument("--picture", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.picture is not None:
        report = looked_at(load("zoo:shapes-llava"), DRAWN, scenes(1, CHOSEN_ON)[0])
        report.attention_map().quantize().save(given.picture, optimize=True)
        return
    found = measure(given.choose, given.confirm)
    STORE.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
    print(written(found))


if __name__ == "__main__":
    main()
