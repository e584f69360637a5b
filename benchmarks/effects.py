"""What every recipe does to a model's answers: docs/effects.json and the tables of docs/effects.md, made by one command.

    python benchmarks/effects.py                       # everything, hours on a small CPU; what was answered is not asked again
    python benchmarks/effects.py --only chair --choose 50 --confirm 50

Each section asks one suite of one model. Settings are chosen on the items of one seed and confirmed on those of another, of which none
was asked before; there the default, the setting that was chosen, and what a user would try without a recipe stand side by side.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import reattend
import torch
from claims import Row, table
from effects_page import page
from head_search import PROFILED_ON, drawn_scenes
from methods import profiled
from reattend.comparison.loading import load
from reattend.evaluation import evaluate
from reattend.evaluation.cells import Cell
from reattend.evaluation.steering import Steering
from reattend.evaluation.subject import Subject
from reattend.evaluation.suites import Item, Suite
from reattend.evaluation.variants import suites_of, variants_of
from reattend.recipes import recipe_class
from sections import SECTIONS, Section

PAGE = Path(__file__).resolve().parents[1] / "docs" / "effects"
CHOSEN_ON, CONFIRMED_ON = 0, 1  # seeds
PROFILE = re.compile(r"{([a-z-]+) ?(\w*)}")


class Measurement:
    """One section on its way. folder: where answers and profiles are kept."""

    def __init__(self, section: Section, folder: Path) -> None:
        self.section, self.folder = section, folder
        self.pipe = load(section.model)
        self.subject = Subject(self.pipe)
        (self.suite,) = suites_of([section.suite])
        self.refused: dict[str, str] = {}
        self.specs = {slug: [s for s in specs if self.fits(s)] for slug, specs in section.recipes.items()}
        folder.mkdir(parents=True, exist_ok=True)

    def measure(self) -> dict[str, Any]:
        """The section as data for docs/effects.json."""
        section, metric = self.section, self.section.columns[0]
        found: dict[str, Any] = {
            "title": section.title, "model": section.model, "suite": self.suite.name, "short": section.short or self.suite.name,
            "columns": list(section.columns),
            "lower": [m for m in section.columns if m in self.suite.lower],
            "neutral": [m for m in section.columns if m in self.suite.neutral],
            "paper": section.paper, "refused": self.refused, "chosen": {}, "further": [],
        }  # fmt: skip
        asked: list[Item] = []
        tried = [spec for specs in self.specs.values() for spec in specs]
        if section.choose:
            asked = self.suite.items(section.choose, CHOSEN_ON)
            rows = self.rows(self.suite, tried, section.choose, CHOSEN_ON)
            # the counts behind the choice are left out: what is claimed stands on those of the confirmation
            found["choosing"] = {
                name: value
                for name, value in table(rows, self.suite.metrics, [metric], CHOSEN_ON).items()
                if name not in ("names", "counts")
            }
            best = self.best(found["choosing"])
            found["chosen"] = {slug: labels[0] for slug, labels in best.items()}
            found["further"] = [label for labels in best.values() for label in labels[1:]]
        wanted = self.confirmed(found)
        specs = [self.renamed(spec) for spec in [*wanted, *section.others]]
        fresh = self.fresh(f"{self.renamed(section.suite)}:{section.confirming}", asked)
        rows = self.rows(fresh, specs, section.confirm, CONFIRMED_ON)
        for label, baseline in section.baselines.items():
            of = self.fresh(f"{self.renamed(section.suite)}:{section.confirming}:{baseline.suite}", asked)
            (cell,) = self.cells(of, [], section.confirm, CONFIRMED_ON)
            row = self.row(label, "baseline", "", cell)
            counts = [{**c, **{name: c.get(other, 0.0) for name, other in baseline.counts.items()}} for c in row.counts]
            rows.append(replace(row, counts=counts))
        chance = fresh.chance()
        found["chance"] = {name: chance[name] for name in section.columns if name in chance}
        found["confirming"] = table(rows, fresh.metrics, section.columns, CONFIRMED_ON)
        return found

    def fits(self, spec: str) -> bool:
        """Whether a variant suits this model; why not goes into `refused`."""
        try:
            Steering(self.subject, variants_of([self.filled(spec)])[0].choices, self.suite.marks)
        except reattend.ReattendError as error:
            self.refused[self.label(spec)] = str(error).replace(f"{self.folder}/", "")
            print(f"{spec} is left out: {error}")
            return False
        return True

    def filled(self, spec: str) -> str:
        return PROFILE.sub(lambda found: str(profile(found[1], found[2], self.pipe, self.folder)), spec)

    def renamed(self, text: str) -> str:
        """For the task on which settings are confirmed, where that is another one."""
        for old, new in self.section.instead.items():
            text = text.replace(old, new)
        return text

    # -- names ---------------------------------------------------------------------------------------------------------

    def label(self, spec: str) -> str:
        """A variant without the files of its profiles: "emphasise(alpha=0.3)", or "emphasise(profile)" where it could do without one."""
        names = []
        for part in spec.split("+"):
            slug, *settings = re.split(r":(?=\w+=)", part)
            optional = any(slug in specs for specs in self.section.recipes.values())
            shown = [s for s in settings if not s.startswith("profile_path=")]
            shown += ["profile"] * (optional and len(shown) < len(settings))
            names.append(f"{slug}({', '.join(shown)})" if shown else slug)
        return " + ".join(names)

    def is_default(self, spec: str) -> bool:
        """Whether a recipe is as it comes: with no parameters but a profile, where it needs one."""
        return "(" not in self.label(spec) and "+" not in spec

    def best(self, found: dict[str, Any]) -> dict[str, list[str]]:
        """{slug: its variants with the best first metric, so many as the section confirms, where they are better than the plain model};
        of equals the weakest."""
        metric = self.section.columns[0]
        sign = -1 if metric in self.suite.lower else 1
        value = {row["label"]: sign * row["metrics"][metric]["value"] for row in found["rows"]}
        ranked = {slug: sorted(map(self.label, specs), key=lambda label: -value[label]) for slug, specs in self.specs.items()}
        better = {slug: [label for label in labels if value[label] > value["none"] + 1e-9] for slug, labels in ranked.items()}
        return {slug: labels[: self.section.best] for slug, labels in better.items() if labels}

    def confirmed(self, found: dict[str, Any]) -> list[str]:
        """The variants that are measured again: those that were chosen, and defaults; all of them where nothing was to be chosen."""
        section, labels = self.section, {*found["chosen"].values(), *found["further"]}
        return [
            spec
            for slug, specs in self.specs.items()
            for spec in specs
            if not section.choose
            or self.label(spec) in labels
            or (self.is_default(spec) and (section.defaults or slug not in found["chosen"]))
        ]

    # -- asking --------------------------------------------------------------------------------------------------------

    def rows(self, suite: Suite, specs: Sequence[str], count: int, seed: int) -> list[Row]:
        specs = list(dict.fromkeys(specs))
        plain, *cells = self.cells(suite, specs, count, seed)
        found = [self.row("none", "plain", "", plain)]
        for spec, cell in zip(specs, cells, strict=True):
            slug = re.split(r"[:+]", spec)[0] if "+" not in spec else ""
            role = (
                "other" if spec in map(self.renamed, self.section.others) else "default" if self.is_default(spec) else "tried"
            )
            found.append(self.row(self.label(spec), role, slug, cell))
        return found

    def cells(self, suite: Suite, specs: Sequence[str], count: int, seed: int) -> list[Cell]:
        variants = ["none", *map(self.filled, specs)]
        return evaluate(
            self.pipe, [suite], variants, count=count, seed=seed, out=self.folder, resamples=10, progress=True
        ).cells

    @staticmethod
    def row(label: str, role: str, recipe: str, cell: Cell) -> Row:
        groups, counts = [r["group"] for r in cell.records], [cell.suite.counts(r) for r in cell.records]
        return Row(label, role, recipe, groups, counts, cell.applied)

    def fresh(self, spec: str, asked: Sequence[Item]) -> Suite:
        """The suite, asking nothing that was asked already."""
        (suite,) = suites_of([re.sub(":+$", "", re.sub("::+", ":", spec))])
        known, kind = {json.dumps(item.data, sort_keys=True) for item in asked}, type(suite)

        def items(self: Suite, count: int, seed: int) -> list[Item]:
            drawn = as_many(lambda more: kind.items(self, more, seed), count + len(asked), count)
            old = {item.group for item in drawn if json.dumps(item.data, sort_keys=True) in known}
            left = [group for group in dict.fromkeys(item.group for item in drawn) if group not in old][:count]
            return [item for item in drawn if item.group in set(left)]

        return type(kind.__name__, (kind,), {"items": items})(**suite.model_dump())


def as_many(draw: Any, most: int, least: int) -> list[Item]:
    """`most` items, or as many as there are, but at least `least`."""
    while most > least:
        try:
            return draw(most)
        except reattend.ReattendError:
            most -= max(1, (most - least) // 20)
    return draw(least)


def profile(slug: str, task: str, pipe: Any, folder: Path) -> Path:
    """The profile of a recipe for this model, and for a task where there are several, made once."""
    file = folder.parent / "profiles" / f"{slug}-{name_of(pipe)}{task and '-' + task}.safetensors"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        processor = getattr(pipe, "processor", None) or pipe.tokenizer
        options = {**profiled(slug), **({"task": task} if task else {})}
        if options.get("samples") == "scenes":
            options["samples"] = questions_on_scenes(50)
        if "scenes" in options:
            options = {**drawn_scenes(options.pop("scenes")), **options, "resume": str(file.with_suffix(".jsonl"))}
        recipe_class(slug).profile(getattr(pipe, "model", pipe), processor, **options).save(file)
    return file


def name_of(pipe: Any) -> str:
    """Of a language pipeline its model's name, of one that draws pictures its own."""
    model = getattr(pipe, "model", pipe)
    return str(model.config._name_or_path).rpartition("/")[2] or type(model).__name__


def questions_on_scenes(count: int) -> list[tuple[Any, str]]:
    """(picture, question) pairs of scenes that no suite asks about."""
    import numpy as np
    from reattend.zoo.worlds.drawing import picture
    from reattend.zoo.worlds.language import presence
    from reattend.zoo.worlds.shapes import World, sample_scene

    scenes = [sample_scene(np.random.default_rng([PROFILED_ON, n]), World()) for n in range(count)]
    return [(picture(scene, 48, World()), presence(scene.shapes[0], scene).text) for scene in scenes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(SECTIONS), nargs="+", default=list(SECTIONS))
    parser.add_argument("--choose", type=int, default=None, help="scenes or texts on which settings are chosen")
    parser.add_argument("--confirm", type=int, default=None, help="and on which they are confirmed")
    parser.add_argument("--out", type=Path, default=Path("runs/effects"), help="folder of answers and profiles")
    given = parser.parse_args()
    torch.set_num_threads(1)
    store = PAGE.with_suffix(".json")
    for name in given.only:
        section = SECTIONS[name]
        choose = section.choose if given.choose is None else min(given.choose, section.choose)
        section = replace(section, choose=choose, confirm=given.confirm or section.confirm)
        found = Measurement(section, given.out / name).measure()
        results = json.loads(store.read_text(encoding="utf-8")) if store.is_file() else {}
        results = {n: found if n == name else results[n] for n in SECTIONS if n == name or n in results}
        store.write_text(json.dumps(results, separators=(",", ":")) + "\n", encoding="utf-8")
        PAGE.with_suffix(".md").write_text(page(results), encoding="utf-8")
        print(name, "is done", flush=True)
    print("now python benchmarks/summary.py puts what is new into docs/results.md")


if __name__ == "__main__":
    main()
