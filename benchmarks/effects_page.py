"""docs/effects.md from docs/effects.json: one table per section."""

from __future__ import annotations

from typing import Any

from claims import BELIEVED, believed
from reattend.recipes import recipe_class

HEAD = f"""# What every recipe did, with intervals

Written by `python benchmarks/effects.py`; do not edit. Settings are chosen on the items of one seed (by the first column, of equals the
weakest) and measured again on those of another one, of which none was asked before: all figures are of the latter. Intervals: 95 %, bootstrap
over scenes, texts or pairs. In brackets after a value: the change against the plain model on the same items, bold where it is believed: a
paired permutation test over all changes of one table, with a false discovery rate of {BELIEVED:g} (Benjamini and Hochberg). Default: the
recipe without parameters, with a profile where it needs one. What it means: [results](results.md); what it costs: [costs](costs.md)."""


def page(results: dict[str, dict[str, Any]]) -> str:
    """results: {section: data of `Measurement.measure`}."""
    return "\n\n".join([HEAD, *(section(found) for found in results.values())]) + "\n"


def section(found: dict[str, Any]) -> str:
    confirmed = found["confirming"]
    said = f"Suite `{found['suite']}`, {confirmed['groups']} scenes, texts or pairs of seed {confirmed['seed']}"
    if "choosing" in found:
        said += f"; settings chosen on {found['choosing']['groups']} of seed {found['choosing']['seed']}"
    parts = [f"## {found['title']}", f"{said}.", table(found)]
    if found["refused"]:
        parts.append(
            "Does not fit this model: " + "; ".join(f"`{label}`: {why}" for label, why in found["refused"].items()) + "."
        )
    if "choosing" in found:
        parts.append(f"When choosing ({found['columns'][0]}): {tried(found)}.")
    if found["paper"]:
        parts.append(
            "The papers' own figures, on their models: " + "; ".join(f"`{k}`: {v}" for k, v in found["paper"].items()) + "."
        )
    return "\n\n".join(parts)


def table(found: dict[str, Any]) -> str:
    columns = found["columns"]
    heads = [f"{name}{' (less is better)' if name in found['lower'] else ''}" for name in columns]
    lines = [f"| | | {' | '.join(heads)} |", "|---" * (len(columns) + 2) + "|"]
    if found["chance"]:
        lines.append("| chance | | " + " | ".join(_number(found["chance"].get(name)) for name in columns) + " |")
    for row in found["confirming"]["rows"]:
        cells = [cell(row, name) for name in columns]
        lines.append(f"| {name_of(row)} | {role(row, found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(row: dict[str, Any], name: str) -> str:
    value = row["metrics"][name]
    if "changes" not in row:
        return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    change = row["changes"][name]
    mark = "**" if believed(change) else ""
    return f"{value['value']:.3f} ({mark}{change['value']:+.3f}{mark} [{change['low']:+.3f}, {change['high']:+.3f}])"


def role(row: dict[str, Any], found: dict[str, Any]) -> str:
    """What a row is there for."""
    names = [row["role"]] if row["role"] in ("default", "baseline") else []
    names += ["chosen"] if row["label"] in found["chosen"].values() else []
    names += ["next best"] if row["label"] in found.get("further", ()) else []
    names += ["never acts"] if row["recipe"] and not row["applied"] and not recipe_class(row["recipe"]).info.reads else []
    return ", ".join(names)


def name_of(row: dict[str, Any]) -> str:
    return "no recipe" if row["role"] == "plain" else row["label"] if row["role"] == "baseline" else f"`{row['label']}`"


def tried(found: dict[str, Any]) -> str:
    metric = found["columns"][0]
    return ", ".join(f"{name_of(row)} {row['metrics'][metric]['value']:.3f}" for row in found["choosing"]["rows"])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
