"""Every recipe in one line or two: what it did, beside what a user would try without it, and what it cost. Rewrites tables of docs/results.md.

python benchmarks/summary.py     # from docs/effects.json, costs.json, attention.json and sinks.json, which other commands make
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import effect_attention
import effect_sinks
from claims import believed
from effects_page import name_of
from methods import shown
from reattend.recipes import recipe_class

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- {name}: written by benchmarks/summary.py -->\n", "<!-- end of {name} -->"
HEAD = "| recipe | on | measure | no recipe | with it | change, 95 % interval | best plain attempt | prefill, decode |"
# metrics beside a section's first column
ALSO = {
    "order": ["accuracy"],
    "gemma-order": ["accuracy"],
    "sentiment": ["auc"],
    "gemma-sentiment": ["auc"],
    "chair": ["recall"],
    "negatives": ["kept_out", "rest"],
    "turbo-negatives": ["kept_out", "rest"],
    "layout": ["binding"],
    "canvas-96": ["extra"],
    "canvas-48": ["extra"],
}
# on which model of docs/costs.json a method is timed, by the first kind that it is for
TIMED_ON = {"llm": "smollm2", "lvlm": "llava-smollm2", "diffusion": "shapes-sd"}


def effects() -> dict[str, dict[str, Any]]:
    return json.loads((DOCS / "effects.json").read_text(encoding="utf-8"))


def claims(results: dict[str, dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    """(section, row, metric) of every recipe at its default, and at the setting that was chosen for a section."""
    slugs = dict.fromkeys(row["recipe"] for found in results.values() for row in found["confirming"]["rows"] if row["recipe"])
    for slug in slugs:
        for name, found in results.items():
            for row in found["confirming"]["rows"]:
                if row["recipe"] == slug and setting(found, row):
                    for metric in [found["columns"][0], *ALSO.get(name, [])]:
                        yield found, row, metric


def setting(found: dict[str, Any], row: dict[str, Any]) -> str:
    """Why a row is claimed of its recipe: as "default" or "chosen", or as "given" where the section has neither; "" for further rows."""
    known = [r for r in found["confirming"]["rows"] if r["recipe"] == row["recipe"]]
    names = ["default"] if row["role"] == "default" else []
    names += ["chosen"] if row["label"] in found["chosen"].values() else []
    names += ["second"] if row["label"] in found.get("further", ()) else []
    claimed = any(r["role"] == "default" or r["label"] in found["chosen"].values() for r in known)
    # of what was set by hand, controls come after what was tried
    first = row["role"] == "tried" or not any(r["role"] == "tried" for r in known)
    return ", ".join(names) or ("" if claimed or not first else "given")


def table(results: dict[str, dict[str, Any]], costs: dict[str, Any]) -> str:
    lines, told = [HEAD, "|---" * 8 + "|"], set()
    for found, row, metric in claims(results):
        plain, change = found["confirming"]["rows"][0], row["changes"][metric]
        mark = "**" if believed(change) else ""
        moved = f"{mark}{change['value']:+.3f}{mark} [{change['low']:+.3f}, {change['high']:+.3f}]"
        # what a recipe costs is the same for every measure: once
        price = "" if row["recipe"] in told else cost(row["recipe"], costs)
        told.add(row["recipe"])
        lines.append(
            f"| {name_of(row)}, {setting(found, row)} | {found['model'].removeprefix('zoo:')} | {found.get('short', found['suite'])} {metric} "
            f"| {plain['metrics'][metric]['value']:.3f} | {row['metrics'][metric]['value']:.3f} | {moved} "
            f"| {best_attempt(found, metric)} | {price} |"
        )
    return "\n".join(lines) + "\n"


def best_attempt(found: dict[str, Any], metric: str) -> str:
    """The best of the section's baselines."""
    sign = -1 if metric in found["lower"] else 1
    rows = [row for row in found["confirming"]["rows"] if row["role"] == "baseline"]
    if not rows:
        return ""
    best = max(rows, key=lambda row: sign * row["metrics"][metric]["value"])
    return f"{best['metrics'][metric]['value']:.3f}, {best['label']}"


def timed_row(slug: str, costs: dict[str, Any]) -> dict[str, Any] | None:
    """What docs/costs.json holds of a method; None where it was not timed."""
    subject = TIMED_ON.get(recipe_class(slug).info.kinds[0], "")
    return costs.get(subject, {}).get("rows", {}).get(shown(slug))


def cost(slug: str, costs: dict[str, Any]) -> str:
    """Prefill and decode, or a picture, as ratios to the untouched model, with the floor that the method's own passes set; "" where it was
    not timed."""
    found = timed_row(slug, costs)
    if found is None:
        return ""
    if "picture" in found:
        return f"{found['picture'][0]:.2f}" + (f" (floor {found['floor'][0]:.2f})" if "floor" in found else "")
    ratios = f"{found['prefill'][0]:.2f}, {found['decode'][0]:.2f}"
    return (
        f"{ratios} (floor {found['prefill floor'][0]:.2f}, {found['decode floor'][0]:.2f})"
        if "decode floor" in found
        else ratios
    )


def blocks() -> dict[str, str]:
    """{name: a table of docs/results.md}"""

    def recorded(name: str) -> dict[str, Any]:
        return json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))

    return {
        "summary": table(effects(), recorded("costs")),
        "attention": effect_attention.written(recorded("attention")),
        "sinks": effect_sinks.written(recorded("sinks")),
    }


def rewritten(page: str) -> str:
    """docs/results.md with its tables as they follow from the recorded figures."""
    for name, text in blocks().items():
        begin, end = BEGIN.format(name=name), END.format(name=name)
        before, rest = page.split(begin)
        page = before + begin + text + end + rest.split(end)[1]
    return page


def main() -> None:
    page = DOCS / "results.md"
    page.write_text(rewritten(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
