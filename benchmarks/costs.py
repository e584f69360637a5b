"""What every recipe costs end to end, as ratios to the untouched model in the same run: the tables of docs/costs.md, by one command.

python benchmarks/costs.py                 # SmolLM2, shapes-llava, a LLaVA around SmolLM2, and pictures; over an hour on one core
python benchmarks/costs.py --only shapes-sd    # pictures, two to three minutes
python benchmarks/costs.py --only smollm2 --rounds 2
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import guidance
import torch
from subjects import Subject, llava_around_smollm2, shapes_llava, smollm2
from timing import Variant, paces

PAGE = Path(__file__).resolve().parents[1] / "docs" / "costs"
UNTOUCHED = "untouched"
SUBJECTS = {"smollm2": smollm2, "shapes-llava": shapes_llava, "llava-smollm2": llava_around_smollm2}
PICTURES = ("shapes-sd", "shapes-sd3")
HEAD = """# What every recipe costs

Written by `python benchmarks/costs.py`; do not edit. Ratios to the untouched model (fused attention): it and a copy under the recipe take
turns with every prompt and every token, and the median of the ratios counts, in CPU time of one thread; in brackets its 95 % interval
(bootstrap). Prefill: reading the prompt. Decode: each further token. `untouched`: two copies against each other, which is what chance does.
Floor: what the untouched model takes for the passes that the method needs by its definition, without any code of reattend.
Pictures: whole runs of a pipeline with and without a method, and with a floor where the method has branches of its own, take turns; their floor
has as many rows more in the denoiser's batch, and `above its floor` is the ratio to that.
What limits these figures: [performance](performance.md).
"""


def measure(subject: Subject, new: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """{row: {column: [ratio, low, high]}}"""
    variants = {UNTOUCHED: Variant()}
    variants |= {label: subject.under(chosen) for label, chosen in subject.recipes.items()}
    variants |= {f"floor of {label}": floor for label, (_, floor) in subject.floors.items()}
    ratios = paces(subject.model, subject.inputs, {**variants, **subject.others}, new, rounds)
    rows: dict[str, dict[str, list[float]]] = {}
    for label in [UNTOUCHED, *subject.recipes, *subject.others]:
        row = {"prefill": ratios[label][0], "decode": ratios[label][1]}
        if label in subject.floors:
            floor = ratios[f"floor of {label}"]
            row |= {"prefill floor": floor[0], "decode floor": floor[1]}
        rows[label] = {name: [round(part, 3) for part in (pace.value, pace.low, pace.high)] for name, pace in row.items()}
    return rows


def measured(name: str, given: argparse.Namespace) -> dict:
    """The section of a model that writes."""
    subject = SUBJECTS[name](given.out)
    rows = measure(subject, given.new, given.rounds)
    why = {label: reason for label, (reason, _) in subject.floors.items()}
    return {"title": subject.title, "new": given.new, "rows": rows, "why": why}


def section(found: dict) -> str:
    lines = [f"## {found['title']}, {found['new']} new tokens", ""]
    lines += ["| | prefill | decode | floor of prefill, decode | why |", "|---|---|---|---|---|"]
    for label, row in found["rows"].items():
        floor = f"{shown(row['prefill floor'])}, {shown(row['decode floor'])}" if "prefill floor" in row else ""
        lines.append(
            f"| {label} | {shown(row['prefill'])} | {shown(row['decode'])} | {floor} | {found['why'].get(label, '')} |"
        )
    return "\n".join(lines)


def shown(pace: list[float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*pace)


def page(results: dict[str, dict]) -> str:
    sections = [section(results[n]) for n in SUBJECTS if n in results]
    sections += [guidance.section(results[n]) for n in PICTURES if n in results]
    return "\n\n".join([HEAD.strip(), *sections]) + "\n"


def recorded() -> dict[str, dict]:
    store = PAGE.with_suffix(".json")
    return json.loads(store.read_text(encoding="utf-8")) if store.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*SUBJECTS, *PICTURES], default=None)
    parser.add_argument("--new", type=int, default=32, help="tokens after the prompt")
    parser.add_argument("--rounds", type=int, default=9, help="times that the prompt is read, or a picture drawn")
    parser.add_argument("--out", type=Path, default=Path("runs/costs"), help="folder of profiles")
    given = parser.parse_args()
    torch.set_num_threads(1)
    # a recipe that never acts would be timed as free: it must not pass silently
    warnings.simplefilter("error")
    store = PAGE.with_suffix(".json")
    for name in [given.only] if given.only else [*SUBJECTS, *PICTURES]:
        found = guidance.measure(name, given.rounds) if name in PICTURES else measured(name, given)
        results = {**recorded(), name: found}
        store.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.with_suffix(".md").write_text(page(results), encoding="utf-8")
        print((guidance.section if name in PICTURES else section)(found), flush=True)


if __name__ == "__main__":
    main()
