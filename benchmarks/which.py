"""Which recipe? Writes what answers that: the README's table, docs/recipes.md, recipes/README.md and recipes/kit/measured.json.

    python benchmarks/which.py      # after docs/effects.json or docs/costs.json changed, or a recipe came

A recipe says itself which problems it is a remedy for (`Info.problems`); what it did and what it costs was recorded: see `figures`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import reattend
import summary
from claims import believed
from reattend.recipes.kit.base import COSTS, Family, Problem

ROOT = Path(__file__).resolve().parents[1]
README, PAGE, METHODS = ROOT / "README.md", ROOT / "docs" / "recipes.md", ROOT / "recipes" / "README.md"
SHIPPED = ROOT / "recipes" / "kit" / "measured.json"
BEGIN, END = "<!-- recipes: written by benchmarks/which.py -->\n", "<!-- end of recipes -->"


def figures() -> dict[str, dict[str, Any]]:
    """{slug: {"did": [one text per measure], "cost": text}} of the recorded runs; a recipe that was not measured has no entry."""
    costs = json.loads((summary.DOCS / "costs.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = {}
    for section in summary.effects().values():
        for slug in dict.fromkeys(row["recipe"] for row in section["confirming"]["rows"] if row["recipe"]):
            if told := did(section, slug):
                found.setdefault(slug, {"did": [], "cost": ""})["did"].append(told)
    for slug, entry in found.items():
        entry["cost"] = cost(slug, costs)
    return found


def did(section: dict[str, Any], slug: str) -> str:
    """ "position-swap consistency 0.13 to 1.00 (smollm2)": plain, default, the setting that was chosen, and the best plain attempt."""
    metric, (plain, *rows) = section["columns"][0], section["confirming"]["rows"]
    parts = []
    for row in rows:
        if row["recipe"] == slug and summary.setting(section, row) not in ("", "second"):
            settings = row["label"].removeprefix(slug).strip("()")
            doubt = "" if believed(row["changes"][metric]) else " (no certain change)"
            parts.append(f"{row['metrics'][metric]['value']:.2f}{settings and ' with ' + settings}{doubt}")
    if not parts:
        return ""
    less = ", less is better" if metric in section["lower"] else ""
    short = section.get("short", section["suite"])
    name = metric if metric == short else f"{short} {metric}"
    text = f"{name} {plain['metrics'][metric]['value']:.2f} to {', '.join(parts)}"
    return f"{text}; without a recipe {summary.best_attempt(section, metric)} ({section['model'].removeprefix('zoo:')}{less})"


def cost(slug: str, costs: dict[str, Any]) -> str:
    """Prefill and decode, or a picture, as times of the untouched model's; "" where it was not timed."""
    row = summary.timed_row(slug, costs)
    if row is not None and "picture" in row:
        return f"picture {row['picture'][0]:.2f}x"
    return "" if row is None else f"prefill {row['prefill'][0]:.2f}x, decode {row['decode'][0]:.2f}x"


def answers(found: dict[str, dict[str, Any]]) -> str:
    """The README's table: a line per problem and recipe."""
    lines = ["| problem | recipe | family | what it did when we measured it | what it costs | profiling |", "|---" * 6 + "|"]
    for problem in get_args(Problem):
        for place, (slug, info) in enumerate((s, i) for s, i in reattend.list_recipes().items() if problem in i.problems):
            entry = found.get(slug, {"did": [], "cost": ""})
            did = "; ".join(entry["did"][:2]) or "not measured"
            needed = "optional" if info.profiling.startswith("optional") else "yes" if info.profiling else "no"
            name = f"`{slug}`" + ("" if info.status == "ready" else f" ({info.status})")
            lines.append(
                f"| {problem if place == 0 else ''} | {name} | {info.families[0]} | {did} | {entry['cost'] or info.cost} | {needed} |"
            )
    return "\n".join(lines) + "\n"


def page(found: dict[str, dict[str, Any]]) -> str:
    """docs/recipes.md: everything a recipe says of itself, and every figure."""
    parts = ["# The recipes", "", "Written by `python benchmarks/which.py`; do not edit. Parameters: `reattend show NAME`."]
    words = "; ".join(f"{word}, {meaning}" for word, meaning in COSTS.items())
    parts += ["", f"Costs are measured, as multiples of the untouched model's time, or words: {words}."]
    for slug, info in reattend.list_recipes().items():
        code = f"[{info.code}](https://github.com/{info.code})" + (f", {info.licence}" if info.licence else "")
        first = ", ".join(f"{k}={v}" for k, v in info.try_first.items()) or "the defaults"
        swept = "; ".join(f"{k} = {', '.join(map(str, values))}" for k, values in info.sweep.items()) or "nothing to sweep"
        parts += ["", f"## {slug}", "", info.does, ""]
        parts += [f"- For: {', '.join(info.kinds)}. Problem: {'; '.join(info.problems)}. Family: {', '.join(info.families)}."]
        parts += [f"- Paper: [{info.paper}](https://arxiv.org/abs/{info.arxiv}), {info.year}. Status: {info.status}."]
        parts += [
            f"- Official code: {code}." if info.code.count("/") == 1 else f"- Official code: {info.code or 'none known'}."
        ]
        parts += [f"- Try first: {first}. Sweep: {swept}.", f"- Needs profiling: {info.profiling or 'no'}."]
        entry = found.get(slug, {"did": [], "cost": ""})
        parts += [f"- Measured: {text}." for text in entry["did"]] or ["- Not measured."]
        parts += [f"- Costs: {entry['cost'] or info.cost}."]
    return "\n".join(parts) + "\n"


def methods() -> str:
    """recipes/README.md: the files of recipes/ by problem and by family."""
    every = reattend.list_recipes()

    def link(slug: str) -> str:
        status = every[slug].status
        return f"[{slug}]({slug.replace('-', '_')}.py)" + ("" if status == "ready" else f" ({status})")

    lines = [
        "# Methods, by problem and by family",
        "",
        "Written by `python benchmarks/which.py`; do not edit. Every file here is one published method, named by its slug; `kit/` holds what",
        "they are made with, `profiling/` how they learn about a model. What each did and costs: [docs/recipes.md](../docs/recipes.md).",
    ]
    lines += ["", "## By problem", "", "| problem | method | for | what it does |", "|---|---|---|---|"]
    for problem in get_args(Problem):
        chosen = [slug for slug, info in every.items() if problem in info.problems]
        for slug in chosen:
            info = every[slug]
            lines.append(f"| {problem if slug == chosen[0] else ''} | {link(slug)} | {', '.join(info.kinds)} | {info.does} |")
    lines += ["", "## By family", "", "| family | first of all | also |", "|---|---|---|"]
    for family in get_args(Family):
        first = [link(slug) for slug, info in every.items() if info.families[0] == family]
        also = [link(slug) for slug, info in every.items() if family in info.families[1:]]
        lines.append(f"| {family} | {', '.join(first)} | {', '.join(also)} |")
    return "\n".join(lines) + "\n"


def readme(found: dict[str, dict[str, Any]]) -> str:
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + answers(found) + END + rest.split(END)[1]


def shipped(found: dict[str, dict[str, Any]]) -> str:
    return json.dumps(dict(sorted(found.items())), indent=1) + "\n"


def main() -> None:
    found = figures()
    for file, text in ((README, readme(found)), (PAGE, page(found)), (METHODS, methods()), (SHIPPED, shipped(found))):
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
