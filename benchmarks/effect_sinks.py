"""What calibration does to a model's own sinks: `reattend.analysis.analyse` plain and under `act`, on two sets of texts.

python benchmarks/effect_sinks.py     # docs/sinks.json, and its table for docs/results.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import reattend
import torch
from claims import Row, believed, table
from reattend.analysis import analyse
from reattend.comparison.loading import load
from reattend.evaluation.material import prose
from reattend.evaluation.metrics.sums import ratio

STORE = Path(__file__).resolve().parents[1] / "docs" / "sinks.json"
MODELS = {"smollm2": "SmolLM2", "gemma3-270m": "Gemma"}
LENGTH, COUNT = 64, 16
COLUMNS = {"first": "heads with a sink on the first token", "other": "heads with one on another token, at the worst position"}


def texts(part: int) -> list[str]:
    """Paragraphs of Python's manual; the two sets have none in common."""
    return list(prose.paragraphs()[part::20][:COUNT])


def row(pipe: Any, label: str, asked: list[str]) -> Row:
    rates = [analyse(pipe, [text], length=LENGTH).as_dict()["sink_rate_per_position"] for text in asked]
    counts = [{"first": one[0] / 100, "other": max(one[1:]) / 100, "n": 1.0} for one in rates]
    return Row(
        label,
        "plain" if label == "none" else "default",
        "" if label == "none" else "act",
        list(map(str, range(len(asked)))),
        counts,
        1,
    )


def metrics(sums: Any) -> dict[str, Any]:
    return {name: ratio(sums[name], sums["n"]) for name in COLUMNS}


def measure() -> dict[str, Any]:
    found = {}
    for model in MODELS:
        pipe = load(model)
        for part in (0, 10):
            plain = row(pipe, "none", texts(part))
            with reattend.apply(pipe, "act", heads="all"):
                under = row(pipe, "act(heads=all)", texts(part))
            found[f"{model} {part}"] = table([plain, under], metrics, list(COLUMNS), part)
    return found


def written(found: dict[str, Any]) -> str:
    """The table for docs/results.md."""
    lines = [f"| | {' | '.join(COLUMNS.values())} |", "|---|---|---|"]
    for name, data in found.items():
        model, part = name.split(" ")
        for line in data["rows"]:
            cells = []
            for column in COLUMNS:
                shown, change = f"{line['metrics'][column]['value']:.3f}", line.get("changes", {}).get(column)
                if change:
                    mark = "**" if believed(change) else ""
                    shown += f" ({mark}{change['value']:+.3f}{mark} [{change['low']:+.3f}, {change['high']:+.3f}])"
                cells.append(shown)
            who = f"{MODELS[model]}, {'first' if part == '0' else 'second'} {data['groups']} texts"
            lines.append(f"| {who}{'' if line['role'] == 'plain' else ', under `act`, all heads'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    found = measure()
    STORE.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
    print(written(found))


if __name__ == "__main__":
    main()
