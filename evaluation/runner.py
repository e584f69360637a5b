"""`evaluate`: suites asked of a model, plain and under recipes - in batches, resumable, by one process or several."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..comparison.facts import environment
from ..hooks import sites
from ..hooks.sites.discovery import components
from ..interventions import ReattendError, UnsupportedError
from ..recipes.kit.checks import text, whole_number
from ..recipes.kit.checks import tokenizer as usable_tokenizer
from ..version import __version__
from .answers import Book, batch_key, model_key
from .cells import Cell
from .metrics.intervals import Resamples
from .processes import Team
from .results import Evaluation, output_folder
from .steering import Steering
from .subject import Subject
from .suites import Item, Suite
from .variants import NONE, Variant, suites_of, variants_of

# what a suite needs, and the kinds of models that have it
FITS = {"llm": ("llm", "lvlm"), "lvlm": ("lvlm",), "diffusion": ("diffusion",), "vision": ("vision",)}
# fewer batches say nothing about time
FEWEST_TIMED = 3
NEEDS = {
    "llm": "a language model",
    "lvlm": "a model that reads pictures, with its processor",
    "diffusion": "a diffusers pipeline",
    "vision": "an encoder of images",
}


@dataclass
class _Work:
    """One suite under one variant: all batches, and the answers so far."""

    suite: Suite
    variant: Variant
    batches: list[list[Item]]
    book: Book

    def open(self, team: Team) -> list[tuple[str, list[Item]]]:
        """This process's batches that are still to be answered."""
        mine = [(batch_key(batch), batch) for place, batch in enumerate(self.batches) if place % team.size == team.rank]
        return [(key, batch) for key, batch in mine if key not in self.book.lines]


def evaluate(
    model: Any,
    suites: Any,
    recipes: Any = (NONE,),
    *,
    count: int = 200,
    seed: int = 0,
    out: str | Path | None = None,
    tokenizer: Any = None,
    batch: int | None = None,
    resamples: int = 2000,
    progress: bool | None = None,
    name: str = "",
) -> Evaluation:
    """Asks suites of a model, plain and under recipes, and returns metrics with 95 % intervals and paired changes.

    model: a transformers or diffusers pipeline, or a bare model with tokenizer= (its tokenizer or processor). suites: names or Suite
    objects: "pope,chair", ["pope:noise=1.1"]. recipes: "none,var:move=0.2,vhr+var", Recipe objects or (name, parameters) pairs; a
    list inside the list composes; "none" is the plain model, against which changes are computed. count: scenes or texts per suite.
    seed: of the items, and of what is drawn by chance. out: a folder for answers and results; a second run goes on where the first
    stopped, and answers nothing twice; results of a run with other settings are kept beside those of this one. batch: items at once,
    by default the suite's own. resamples: of the intervals. progress: None shows a bar where somebody is watching.

    Under `accelerate launch` every process answers its share of the batches, and all return the same result. Raises ReattendError
    before anything runs: unknown suite, recipe or parameter, or a model that does not fit.
    """
    for what, value in (("count", count), ("resamples", resamples), ("batch", 1 if batch is None else batch)):
        whole_number(value, what, least=1)
    whole_number(seed, "seed")
    text(name, "name")
    usable_tokenizer(tokenizer)
    folder = None if out is None else output_folder(out)
    asked, variants = suites_of(suites), variants_of(recipes)
    subject, team = Subject(model, tokenizer), Team.current()
    for suite in asked:
        if subject.kind not in FITS[suite.kind]:
            raise ReattendError(f"suite {suite.name!r} needs {NEEDS[suite.kind]}; this is {subject.kind!r}")
        for variant in variants:
            try:
                Steering(subject, variant.choices, suite.marks)  # a recipe that does not fit says so before anything runs
            except UnsupportedError:
                raise
            except ReattendError as error:
                told = ", ".join(suite.marks) or "nothing"
                raise ReattendError(f"suite {suite.name!r} tells recipes of: {told}; {error}") from None
    asked = suites_of([suite.asked_of(subject) for suite in asked])
    model_facts = model_key(subject)
    plans: list[list[_Work]] = []
    for suite in asked:
        items = suite.items(count, seed)
        size = batch or suite.batch
        batches = [items[place : place + size] for place in range(0, len(items), size)]
        plans.append([])
        for variant in variants:
            key = _key(model_facts, suite, seed, size, variant)
            book = Book(folder, f"{suite.name}.{variant.label}", key, team.rank)
            plans[-1].append(_Work(suite, variant, batches, book))
    team.wait()  # nobody writes before everybody has read, so that all see the same
    total = sum(len(one.open(team)) for plan in plans for one in plan)
    with _evaluating(subject), _bar(progress if team.main else False, total) as tick:
        for plan in plans:
            _answer(subject, plan, team, seed, tick)
    cells = [cell for plan in plans for cell in _cells(plan, team, resamples, seed)]
    facts = {"name": name or _name(subject), **model_facts, "sites": len(sites(subject.source))}
    facts["parameters"] = sum(p.numel() for p in subject.module.parameters())
    result = Evaluation(
        facts,
        cells,
        [s.as_dict() for s in asked],
        seed,
        count,
        resamples,
        batch=batch,
        environment={**environment(), "processes": team.size},
    )
    if folder is not None and team.main:
        result.save(folder)
    return result


def _key(model: dict[str, Any], suite: Suite, seed: int, size: int, variant: Variant) -> dict[str, Any]:
    who = {"reattend": __version__, "model": model}
    return {**who, "suite": suite.as_dict(), "seed": seed, "batch": size, "recipes": variant.key()}


def _answer(subject: Subject, plan: Sequence[_Work], team: Team, seed: int, tick: Callable[[], None]) -> None:
    """Answers what is still open of one suite."""
    warm = False
    for work in plan:
        suite, todo = work.suite, work.open(team)
        if todo and not warm:
            # the first call of a process is slow for reasons that are no variant's fault
            suite.answer(subject, todo[0][1][:1])
            warm = True
        if not todo:
            continue
        with Steering(subject, work.variant.choices, suite.marks) as steering:
            for key, items in todo:
                before = steering.applied
                # a batch draws the same noise whoever answers it, in whatever order
                torch.manual_seed(seed + int(key, 16) % 2**32)
                start = time.perf_counter()
                records = suite.answer(subject, items)
                _finish(subject.device)
                seconds = time.perf_counter() - start
                if len(records) != len(items):
                    raise ReattendError(f"suite {suite.name!r} gave {len(records)} records for {len(items)} items")
                stamped = [{"id": item.id, "group": item.group, **record} for item, record in zip(items, records)]
                work.book.add({"batch": key, "seconds": seconds, "applied": steering.applied - before, "records": stamped})
                tick()


@contextmanager
def _evaluating(subject: Subject) -> Iterator[None]:
    """Dropout and the like off, and afterwards as it was, module by module."""
    modules = [module for part in components(subject.source).values() for module in part.modules()]
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cells(work: Sequence[_Work], team: Team, resamples: int, seed: int) -> list[Cell]:
    """Metrics of one suite under every variant, and their change against the plain model."""
    found: list[Cell] = []
    lines = [_gathered(one, team) for one in work]
    plain = next((place for place, one in enumerate(work) if not one.variant.choices), None)
    records = [[record for line in these for record in line["records"]] for these in lines]
    draws = Resamples([record["group"] for record in records[0]], count=resamples, seed=seed)
    counts = [[one.suite.counts(record) for record in those] for one, those in zip(work, records)]
    for place, one in enumerate(work):
        cell = Cell(
            one.suite, one.variant.label, one.variant.facts, draws.intervals(counts[place], one.suite.metrics), draws.size
        )
        cell.records = records[place]
        cell.applied = sum(line["applied"] for line in lines[place])
        cell.seconds = statistics.median(line["seconds"] / len(line["records"]) for line in lines[place])
        if plain is not None and place != plain:
            cell.changes = draws.changes(counts[plain], counts[place], one.suite.metrics)
            pairs = [(new["seconds"], max(old["seconds"], 1e-9)) for new, old in zip(lines[place], lines[plain])]
            if len(pairs) >= FEWEST_TIMED:
                cell.time_ratio = statistics.median(new / old for new, old in pairs)
        found.append(cell)
    return found


def _gathered(work: _Work, team: Team) -> list[dict[str, Any]]:
    """The lines of all batches in order, from all processes."""
    order = [batch_key(batch) for batch in work.batches]
    mine = [work.book.lines[key] for place, key in enumerate(order) if place % team.size == team.rank]
    held = {line["batch"]: line for line in team.gather(mine)}
    return [held[key] for key in order]


def _name(subject: Subject) -> str:
    config = getattr(subject.module, "config", None)
    own = getattr(subject.pipe, "name_or_path", "") or getattr(config, "_name_or_path", "")
    return str(own or type(subject.pipe or subject.module).__name__)


@contextmanager
def _bar(wanted: bool | None, total: int) -> Iterator[Callable[[], None]]:
    """A bar of batches with the time left, on stderr; silent where nobody watches."""
    if wanted is False or (wanted is None and not sys.stderr.isatty()) or not total:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("evaluating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
