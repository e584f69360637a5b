"""Every recipe in one line or two: what it did at its published strength, and what it cost. Rewrites a table of docs/results.md.

python benchmarks/summary.py     # from docs/effects.json and docs/costs.json, which two other commands make
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effects import SECTIONS, written

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- summary: written by benchmarks/summary.py -->\n", "<!-- end of summary -->"
HEAD = "| recipe | on | measure | plain | with it | change, 95 % interval | prefill, decode | the paper, on its models |"
# slug -> where docs/costs.json has its time: (subject, row)
COSTS = {
    "emphasise": ("smollm2", "emphasise, all heads"),
    "instaboost": ("smollm2", "instaboost"),
    "spotlight": ("smollm2", "spotlight"),
    "seka": ("smollm2", "seka"),
    "spa": ("smollm2", "spa"),
    "pine": ("smollm2", "pine, 3 segments"),
    "act": ("smollm2", "act, all heads of layers 2 to 28"),
    "retrieval-heads": ("smollm2", "retrieval-heads, 20 heads sharpened"),
    "soft-injection": ("smollm2", "soft-injection"),
    "streaming": ("smollm2", "streaming, window 256"),
    "var": ("llava-smollm2", "var"),
    "vhr": ("llava-smollm2", "vhr"),
    "gift": ("llava-smollm2", "gift, map from the prompt's own pass"),
    "selective-emphasis": ("llava-smollm2", "selective-emphasis"),
    "pai": ("llava-smollm2", "pai"),
    "cmai": ("llava-smollm2", "cmai"),
    "opera": ("llava-smollm2", "opera"),
    "visual-token-exit": ("llava-smollm2", "visual-token-exit, leaving"),
}
HIGHLIGHTERS = ["emphasise", "instaboost", "spotlight", "seka", "spa"]
IMAGES = [
    "var(tau=2.0)",
    "vhr(layers=[1, 3, 4, 5])",
    "gift(saliency_layers=[2], enhance_layers=[3, 4])",
    "selective-emphasis",
    "pai",
    "cmai",
    "opera",
    "visual-token-exit(exit_layer=3)",
]


def rows() -> Iterator[tuple[str, str, str, str]]:
    """(section, recipe, suite, metric), names as in docs/effects.md."""
    for recipe in HIGHLIGHTERS:
        for section in ("highlight", "gemma-highlight"):
            yield section, recipe, "highlight", "followed"
    for metric in ("consistency", "accuracy"):
        for section in ("order", "gemma-order"):
            yield section, "pine", "position-swap", metric
    for suite in ("sentiment", "choices"):
        for section in ("calibration", "gemma-calibration"):
            yield section, 'act(heads="all")', suite, "accuracy"
    for recipe in ("retrieval-heads", 'retrieval-heads(mode="mask", top=5)', "streaming(window=124)"):
        for section in ("needles", "gemma-needles"):
            yield section, recipe, "needles", "recall"
    yield "tasks", "soft-injection", "word-tasks", "accuracy"
    for recipe in IMAGES:
        yield "vision", recipe, "pope", "accuracy"
        yield "vision", recipe, "chair", "chair_i"
    yield "pictures", "softpag", "binding", "binding"


def table() -> str:
    effects, costs = (json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8")) for name in ("effects", "costs"))
    lines, told = [HEAD, "|---" * 8 + "|"], set()
    for section, recipe, suite, metric in rows():
        cells = {written(c["recipes"]): c for c in effects[section]["cells"] if c["suite"].partition(":")[0] == suite}
        plain, found = (cells[name]["metrics"][metric]["value"] for name in ("none", recipe))
        change = cells[recipe]["changes"][metric]
        mark = "**" if change["low"] > 0 or change["high"] < 0 else ""
        moved = f"{mark}{change['value']:+.3f}{mark} [{change['low']:+.3f}, {change['high']:+.3f}]"
        slug = recipe.partition("(")[0]
        # costs and papers are the same for every measure: once per recipe
        more = ("", "") if slug in told else (cost(slug, costs), SECTIONS[section].paper.get(slug, ""))
        told.add(slug)
        what = f"`{recipe}` | {SECTIONS[section].model} | {suite} {metric}"
        lines.append(f"| {what} | {plain:.3f} | {found:.3f} | {moved} | {more[0]} | {more[1]} |")
    return "\n".join(lines) + "\n"


def cost(slug: str, costs: dict[str, Any]) -> str:
    """Prefill and decode as ratios to the untouched model, with the floor that the method's own passes set; "" where it was not timed."""
    if slug not in COSTS:
        return ""
    subject, label = COSTS[slug]
    found = costs[subject]["rows"][label]
    ratios = f"{found['prefill']:.2f}, {found['decode']:.2f}"
    return f"{ratios} (floor {found['prefill floor']:.2f}, {found['decode floor']:.2f})" if "decode floor" in found else ratios


def main() -> None:
    page = DOCS / "results.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
