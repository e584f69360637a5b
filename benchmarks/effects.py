"""What every recipe does to a model's answers: the tables of docs/effects.md, made by one command.

    python benchmarks/effects.py                       # everything, hours on a small CPU; what was answered is not asked again
    python benchmarks/effects.py --only vision --count 500

Each section asks suites of one model, plain and under recipes at half, default and double strength. Profiles are made first where a
recipe needs one and kept in the same folder.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import reattend
import torch
from reattend.comparison.loading import load
from reattend.evaluation import evaluate
from reattend.evaluation.results import Evaluation
from reattend.recipes import recipe_class

PAGE = Path(__file__).resolve().parents[1] / "docs" / "effects"


@dataclass
class Section:
    """suites and recipes as in `reattend eval`. metrics: what the table shows, by suite. paper: what papers report, in their words' terms."""

    title: str
    model: str
    suites: list[str]
    recipes: list[str]
    metrics: dict[str, list[str]]
    count: int
    paper: dict[str, str] = field(default_factory=dict)


VISION = Section(
    "Vision-language recipes on shapes-llava",
    "zoo:shapes-llava",
    ["pope", "chair"],
    [
        "none",
        # six layers of width 128: layers and thresholds are set for this depth, strengths are the published ones; no token of this model
        # exceeds var's 20 times the rms in any dimension, so its most sink-like tokens are taken
        "var:tau=2:profile_path={var}:move=0.2",
        "var:tau=2:profile_path={var}",
        "var:tau=2:profile_path={var}:move=0.8",
        "vhr:layers=[1,3,4,5]:alpha=1.5",
        "vhr:layers=[1,3,4,5]",
        "vhr:layers=[1,3,4,5]:alpha=3",
        "gift:saliency_layers=[2]:enhance_layers=[3,4]:alpha=2.5",
        "gift:saliency_layers=[2]:enhance_layers=[3,4]",
        "gift:saliency_layers=[2]:enhance_layers=[3,4]:alpha=10",
        "selective-emphasis:alpha=0.35:beta=0.15",
        "selective-emphasis",
        "selective-emphasis:alpha=1.4:beta=0.6",
        "pai:alpha=0.1",
        "pai",
        "pai:alpha=0.4",
        "pai:gamma=1",
        "cmai:gamma=0.25",
        "cmai",
        "cmai:gamma=0.9",
        "opera:penalty_weight=0.5",
        "opera",
        "opera:penalty_weight=2",
        "visual-token-exit:exit_layer=2",
        "visual-token-exit:exit_layer=3",
        "visual-token-exit:exit_layer=4",
        "vhr:layers=[1,3,4,5]+pai:gamma=1",
        "var:tau=2:profile_path={var}+vhr:layers=[1,3,4,5]",
    ],
    {"pope": ["accuracy", "accuracy/random", "accuracy/popular", "accuracy/adversarial"], "chair": ["chair_i", "recall"]},
    500,
    paper={
        "vhr": "LLaVA-1.5-7B, CHAIR_i 14.3 to 9.7, POPE F1 85.0 to 85.5",
        "gift": "LLaVA-1.5-7B, CHAIR_i 15.4 to 10.6, POPE F1 82.4 to 83.8",
        "selective-emphasis": "LLaVA-1.5-7B, CHAIR_i 13.8 to 4.0 and F1 75.9 to 71.8, with answers twice as long",
        "pai": "as quoted by others, LLaVA-1.5-7B, CHAIR_i 13.8 to 6.8 and F1 75.9 to 74.7",
        "opera": "as quoted by others, LLaVA-1.5-7B with its beam search, CHAIR_i 14.3 to 13.4",
    },
)


def highlighters(model: str, title: str, count: int) -> Section:
    strengths = [
        "none",
        "emphasise:alpha=0.55",
        "emphasise",
        "emphasise:alpha=0.09",
        "instaboost:multiplier=1.7",
        "instaboost",
        "instaboost:multiplier=9",
        "spotlight:target=0.1",
        "spotlight",
        "spotlight:target=0.4",
        "seka:profile_path={seka}:gain=0.4",
        "seka:profile_path={seka}",
        "seka:profile_path={seka}:gain=1.6",
        "seka:profile_path={seka}:adaptive=true",
        "spa:strength=1.2",
        "spa",
        "spa:strength=1.8",
        "emphasise+instaboost",
    ]
    metrics = {"highlight": ["followed", "on_top", "lead"]}
    paper = {
        "seka": "Qwen3-4B, share of CounterFact prompts that follow the marked fact 45.0 to 99.0; in the same table `emphasise` (PASTA) "
        "97.2, `spa` 65.2, adaptive `seka` 98.9 (the official routing, whose numbers are not reproduced here: decisions.md)",
        "spotlight": "Qwen2.5-7B, IFEval by prompt 0.47 to 0.54",
        "instaboost": "matches or beats prompting and earlier steering of attention on 15 tasks (abstract)",
        "spa": "as summarised by others, six code models, Pass@1 up to 12.9 % higher",
    }
    return Section(f"Highlighters on {title}", model, ["highlight"], strengths, metrics, count, paper)


def order_of_segments(model: str, title: str, count: int) -> Section:
    metrics = {"position-swap": ["accuracy", "consistency", "accuracy_first", "accuracy_last"]}
    paper = {"pine": "Llama-3-8B, RewardBench reasoning 65.3 to 73.4; question answering over 20 documents two points worse"}
    return Section(f"The order of segments on {title}", model, ["position-swap"], ["none", "pine"], metrics, count, paper)


def calibration(model: str, title: str, count: int) -> Section:
    return Section(
        f"Classification and choice on {title}",
        model,
        ["sentiment", "choices"],
        ["none", "act:heads=all:beta=0.7", "act:heads=all", "act:heads=all:beta=0.1"],
        {"sentiment": ["accuracy"], "choices": ["accuracy"]},
        count,
        paper={"act": "chosen heads: up to 7.3 points of mean accuracy over data sets on Llama-30B (abstract)"},
    )


def copying(model: str, title: str, count: int) -> Section:
    return Section(
        f"A needle in a haystack on {title}",
        model,
        ["needles"],
        [
            "none",
            "retrieval-heads:profile_path={retrieval-heads}:strength=0.1",
            "retrieval-heads:profile_path={retrieval-heads}",
            "retrieval-heads:profile_path={retrieval-heads}:strength=0.4",
            "retrieval-heads:profile_path={retrieval-heads}:mode=mask:top=5",
            "retrieval-heads:profile_path={retrieval-heads}:mode=mask:top=5:random_heads=true",
            "streaming:window=124",
        ],
        {"needles": ["recall", "found"]},
        count,
        {
            "retrieval-heads": "Llama-2-7B, masking 30 such heads ruins the search, 30 random ones barely matter (figures only)",
            "streaming": "perplexity stays flat up to 4 million tokens (as recalled)",
        },
    )


TASKS = Section(
    "A task without its demonstrations (opposites) on SmolLM2-135M-Instruct",
    "smollm2",
    ["word-tasks"],
    [
        "none",
        "soft-injection:profile_path={soft-injection}:scale=0.5",
        "soft-injection:profile_path={soft-injection}",
        "soft-injection:profile_path={soft-injection}:alpha=0.5",
    ],
    {"word-tasks": ["accuracy", "answers_input"]},
    30,
    {"soft-injection": "12 models of 4B to 70B, 57 tasks, 10.2 to 14.3 points over ten demonstrations (abstract)"},
)
PICTURES = Section(
    "Guidance on shapes-sd",
    "zoo:shapes-sd",
    ["binding"],
    ["none", "softpag:scale=1", "softpag:scale=2.5", "softpag", "softpag:scale=2.5:strength=1"],
    {"binding": ["binding", "shapes", "count"]},
    60,
    {"softpag": "FID 56.15 (identity), 53.37 (uniform), 53.33 (mean query), at the best setting of each"},
)
SMOLLM2, GEMMA = ("smollm2", "SmolLM2-135M-Instruct"), ("gemma3-270m", "Gemma 3 270M (base model)")
SECTIONS = {
    "vision": VISION,
    "highlight": highlighters(*SMOLLM2, 20),
    "order": order_of_segments(*SMOLLM2, 12),
    "calibration": calibration(*SMOLLM2, 120),
    "needles": copying(*SMOLLM2, 24),
    "tasks": TASKS,
    "gemma-highlight": highlighters(*GEMMA, 12),
    "gemma-order": order_of_segments(*GEMMA, 12),
    "gemma-calibration": calibration(*GEMMA, 60),
    "gemma-needles": copying(*GEMMA, 12),
    "pictures": PICTURES,
}
# how profiles are made where the defaults do not fit the model or would take long
PROFILES: dict[str, dict[str, Any]] = {
    "var": {"tau": 2.0, "text": "is there a circle in the image ?"},
    "soft-injection": {"task": "opposite", "prompts": 12, "iterations": 40, "check_every": 20},
    "retrieval-heads": {"lengths": (150, 300, 600), "depths": (0.1, 0.5, 0.9), "needles": 3},
}


def profile(slug: str, pipe: Any, folder: Path) -> str:
    """The profile of a recipe for this model, made once per folder."""
    file = folder / f"{slug}.safetensors"
    if not file.is_file():
        processor = getattr(pipe, "processor", None) or pipe.tokenizer
        recipe_class(slug).profile(pipe.model, processor, **PROFILES.get(slug, {})).save(file)
    return str(file)


def measure(section: Section, folder: Path, count: int | None) -> Evaluation:
    pipe = load(section.model)
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, str] = {}
    for slug in sorted(set(re.findall(r"{([a-z-]+)}", " ".join(section.recipes)))):
        try:
            made[slug] = profile(slug, pipe, folder)
        except reattend.ReattendError as error:
            print(f"{slug} is left out: {error}")
    recipes = [r for r in section.recipes if set(re.findall(r"{([a-z-]+)}", r)) <= set(made)]
    for slug, file in made.items():
        recipes = [r.replace("{" + slug + "}", file) for r in recipes]
    asked = count or section.count
    return evaluate(pipe, section.suites, recipes, count=asked, out=folder, name=section.model, progress=True)


def table(section: Section, found: dict[str, Any]) -> str:
    """found: an Evaluation as data."""
    columns = [(suite, metric) for suite, metrics in section.metrics.items() for metric in metrics]
    lines = [
        "| recipe | " + " | ".join(f"{suite} {metric}" for suite, metric in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    cells = {(cell["suite"].partition(":")[0], cell["recipe"]): cell for cell in found["cells"]}
    for label, recipes in {cell["recipe"]: cell["recipes"] for cell in found["cells"]}.items():
        row = []
        for suite, metric in columns:
            cell = cells[suite, label]
            value = cell["metrics"][metric]
            shown = f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
            if cell.get("changes"):
                change = cell["changes"][metric]
                bold = "**" if change["low"] > 0 or change["high"] < 0 else ""
                moved = f"{bold}{change['value']:+.3f}{bold} [{change['low']:+.3f}, {change['high']:+.3f}]"
                shown = f"{value['value']:.3f} ({moved})"
            row.append(shown)
        lines.append(f"| `{written(recipes)}` | " + " | ".join(row) + " |")
    return "\n".join(lines)


def written(recipes: list[dict[str, Any]]) -> str:
    """A variant's recipes with their settings, without the files of profiles; "none" for the plain model."""
    names = []
    for one in recipes:
        settings = ", ".join(f"{k}={json.dumps(v)}" for k, v in one["given"].items() if k != "profile_path")
        names.append(f"{one['name']}({settings})" if settings else one["name"])
    return " + ".join(names) or "none"


def page(results: dict[str, dict[str, Any]]) -> str:
    """results: {section: an Evaluation as data}."""
    parts = [
        "# What every recipe did, with intervals",
        "",
        "Written by `python benchmarks/effects.py`; do not edit. 95 % percentile intervals by bootstrap over scenes or texts. In brackets "
        "behind a recipe's value: the change against the plain model on the same items, bold where its interval leaves out 0. "
        "What it means: [results](results.md); what it costs: [costs](costs.md).",
    ]
    for name, section in SECTIONS.items():
        if name not in results:
            continue
        found = results[name]
        groups = ", ".join(dict.fromkeys(f"{cell['suite']} {cell['groups']}" for cell in found["cells"]))
        parts += [
            "",
            f"## {section.title}",
            "",
            f"Scenes, texts or pairs: {groups}; seed {found['seed']}.",
            "",
            table(section, found),
        ]
        if section.paper:
            said = "; ".join(f"`{k}`: {v}" for k, v in section.paper.items())
            parts += ["", f"The papers' own figures, on their models: {said}."]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(SECTIONS), default=None)
    parser.add_argument("--count", type=int, default=None, help="scenes or texts per suite")
    parser.add_argument("--out", type=Path, default=Path("runs/effects"), help="folder of answers and profiles")
    given = parser.parse_args()
    torch.set_num_threads(1)
    store = PAGE.with_suffix(".json")
    for name in [given.only] if given.only else SECTIONS:
        section = SECTIONS[name]
        folder = given.out / name
        found = measure(section, folder, given.count)
        found.print()
        results = json.loads(store.read_text()) if store.is_file() else {}
        # where profiles lay is nobody's business
        results[name] = json.loads(json.dumps(found.as_dict()).replace(f"{folder}/", ""))
        store.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.with_suffix(".md").write_text(page(results))
    print("now python benchmarks/summary.py puts what is new into docs/results.md")


if __name__ == "__main__":
    main()
