"""`compare`: the same input and seed without and with recipes, measured and put side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from ..hooks import Session, SiteTable, Spans, capture, sites
from ..hooks.sites.discovery import original_of
from ..interventions import ReattendError
from ..recipes import Recipe, apply
from ..recipes.kit import checks
from ..recipes.kit.apply import Choice, resolve
from ..recipes.kit.registry import is_file_name, read_choice
from .arguments import picture_of
from .cost import Meter
from .facts import environment, model_facts, progress_bar, reading_notes, recipe_facts, session_notes
from .images import ImageJob
from .inputs import job_for
from .job import Job, Tick, generators_kept
from .looks import add_side
from .report import Report
from .shares import FIRST, named
from .sweep import Sweep
from .sweep_run import sweep
from .sweep_variants import filled, passage_of, picture_for
from .word_maps import WordMaps

# The role of the first token where passages have roles of their own, which go before "bos".
FIRST_ALONE = "first token alone"


@overload
def compare(
    model: Any,
    variants: list[Any],
    /,
    *,
    text: Any = None,
    prompt: Any = None,
    image: Any = None,
    inputs: Any = None,
    seed: int = 0,
    tokenizer: Any = None,
    attention: bool = True,
    title: str | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Sweep: ...
@overload
def compare(
    model: Any,
    *recipes: Choice,
    text: Any = None,
    prompt: Any = None,
    image: Any = None,
    inputs: Any = None,
    seed: int = 0,
    tokenizer: Any = None,
    attention: bool = True,
    title: str | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Report: ...
def compare(
    model: Any,
    *recipes: Any,
    text: Any = None,
    prompt: Any = None,
    image: Any = None,
    inputs: Any = None,
    seed: int = 0,
    tokenizer: Any = None,
    attention: bool = True,
    title: str | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Report | Sweep:
    """Runs a model or pipeline twice on the same input and seed, without and with the recipes, and reports both.

    A list of variants instead of recipes gives one report (a `Sweep`) of the untouched run and a column per variant:
    `compare(model, [("emphasise", {"alpha": 0.3}), ("emphasise", {"alpha": 0.1}), "instaboost"], prompt=..., text=...)`. A variant is a
    recipe as for `apply`, words as "vhr+var:move=0.2", or a list of recipes that compose. What several share is given once, as text here.

    model: a transformers pipeline (text-generation, image-text-to-text, fill-mask, text- and image-classification), a diffusers
    pipeline, or a bare model. recipes: as for `apply`. text or prompt: the input text, or a list of chat messages; image: a picture;
    inputs: prepared tensors for a bare model. tokenizer: the tokenizer or processor of a bare model. attention: also look at the
    attention, in a short run of its own. progress: None shows a bar where somebody is watching.

    options go to `generate` or to the pipeline's call; those that are parameters of a single named recipe go to the recipe. Beside prompt or
    inputs, text is the passage for every recipe that marks one and was not given its own; otherwise that is given as a pair:
    ("emphasise", {"text": "in French"}). image is the model's; where a pipeline that draws takes none, it is every recipe's that has such a
    parameter and was not given one (attencraft), and where it takes one, also that of those named without parameters of their own.

    Where a recipe takes the prompts of a batch for a source and its edits (prompt-reweight with edit), the pictures of all of them begin with
    the same noise, in all runs, unless generator is given as a list.

    Each variant runs once, and once more for the look at its attention: there both read the same text, the prompt and the beginning of
    the untouched model's answer. Raises ReattendError for bad input before anything runs.
    """
    checks.whole_number(seed, "seed")
    checks.truth(attention, "attention")
    checks.tokenizer(tokenizer)
    if title is not None:
        checks.text(title, "title")
    image = picture_of(image)
    model = original_of(model)
    variants = next((item for item in recipes if isinstance(item, list)), None)
    if variants is not None:
        if len(recipes) > 1:
            raise ReattendError(
                "a list of variants goes alone: compare(model, [a, b]) puts a and b side by side, compare(model, a, b) composes them, and a "
                "list inside the list composes within a variant"
            )
        return sweep(model, variants, text, prompt, image, inputs, seed, tokenizer, attention, title, progress, options)
    chosen, text, image, options = _recipes(model, recipes, text, prompt, image, inputs, options)
    job = job_for(model, text, prompt, image, inputs, tokenizer, options, seed, chosen)
    table = sites(model)
    around = session_notes(model)  # before a session of our own starts
    session = apply(model, *chosen, tokenizer=job.tokenizer)  # a recipe that does not fit says so before anything runs
    session.remove()

    slugs = " + ".join(item.slug for item in chosen)
    facts = model_facts(model, job, len(table))
    report = Report(job.kind, title or f"{slugs} on {facts['name'] or facts['class']}", model=facts, seed=seed)
    report.recipes = [recipe_facts(item) for item in chosen]
    report.request = job.request()
    report.environment = environment()
    ticks = job.ticks + 1 + (job.glance_ticks if attention else 0)
    with generators_kept(), progress_bar(progress, 2 * ticks, "comparing") as tick:
        before = _run(job, report, session, attention, tick)
        with session:
            after = _run(job, report, session, attention, tick, before)
            report.stats, report.ways = session.stats, session.ways
    report.notes += around
    if isinstance(job, ImageJob):
        report.maps = WordMaps(job, chosen)
    job.fill(report, before, after)
    for label, counts in report.stats.items():
        if not counts:
            report.notes.append(f"Recipe {label!r} never acted in this run, so nothing was changed: {session.idle(label)}.")
    report.notes += reading_notes(chosen)
    return report


def _run(job: Job, report: Report, session: Session, attention: bool, tick: Tick, untouched: Any = None) -> Any:
    """The timed run, and a look at the attention on the untouched run's text. Only the former counts in the session and in the cost."""
    side = report.after if session.active else report.before
    watched = job.watched(sites(job.model))
    look = attention and len(watched) > 0
    if look and session.active:  # which also warms up
        _look(job, report, session, watched, tick, untouched)
    else:
        job.warm()
    tick()
    session.clear_counts()
    with Meter(job.device, job.module) as meter:
        result = job.run(lambda: (meter.tick(), tick())[1])
    side.cost = meter.cost
    side.cost.steps = job.steps(result)
    if look and not session.active:
        _look(job, report, session, watched, tick, result)
    return result


def _look(job: Job, report: Report, session: Session, watched: SiteTable, tick: Tick, untouched: Any) -> None:
    """Reads the attention in a run of its own, which has the same text in both variants."""
    side = report.after if session.active else report.before
    # passages that the recipes name are told apart in both runs; the first token counts for itself also where it is in one
    spans: list[Spans] = [] if session.active else list(session.spans)
    if session.spans and job.kind == "text":
        spans.append(Spans(FIRST_ALONE, ranges=[[(0, 1)]]))
    with capture(job.model, where=watched, tokenizer=job.tokenizer, spans=spans, spread=True) as seen:
        job.glance(tick, untouched)
    if report.looks is not None or not session.active:
        report.looks = add_side(report.looks, seen, job.pieces(), session.active, job.sees_centre)
    side.mass, side.entropy = _mass(seen.mass_by_role()) if job.roles_tell(watched) else {}, seen.entropy()
    stacks = {s.stack for s in watched}
    by_layer = seen.mass_by_layer(next(iter(stacks))) if len(stacks) == 1 and side.mass else {}
    side.mass_by_layer = {layer: _mass(mass) for layer, mass in by_layer.items()}


def _mass(mass: dict[str, float]) -> dict[str, float]:
    """What a recording saw, under the names that readers know."""
    own = {role: value for role, value in mass.items() if role != FIRST_ALONE}
    if FIRST_ALONE in mass:
        own[FIRST] = own.get(FIRST, 0.0) + mass[FIRST_ALONE]
    return named(own)


def _recipes(
    model: Any, recipes: Sequence[Choice], text: Any, prompt: Any, image: Any, inputs: Any, options: dict[str, Any]
) -> tuple[list[Recipe], Any, Any, dict[str, Any]]:
    """(recipes with their parameters, the input text, the model's picture, options of the run)."""
    if not recipes:
        resolve(recipes, {})  # says what to give
    read = [choice if isinstance(choice, Recipe) else read_choice(choice) for choice in recipes]
    image = picture_for(model, read, image)
    first = read[0]
    if len(recipes) == 1 and isinstance(recipes[0], str) and not is_file_name(recipes[0]) and not isinstance(first, Recipe):
        fields = first[0].model_fields
        first[1].update({name: options[name] for name in options if name in fields})
        options = {name: value for name, value in options.items() if name not in fields}
    shared, text = passage_of(read, text, prompt, inputs)
    return [item if isinstance(item, Recipe) else filled(item[0], item[1], shared) for item in read], text, image, options
