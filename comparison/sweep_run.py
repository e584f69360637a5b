"""`compare` for a list of variants: the untouched model once, then every variant once, on the same input and seed."""

from __future__ import annotations

from typing import Any

from ..hooks import sites
from ..recipes import apply
from .facts import environment, model_facts, progress_bar, reading_notes, session_notes
from .inputs import job_for
from .job import generators_kept
from .report import Report
from .sweep import Sweep
from .sweep_chart import chart_of
from .sweep_effects import Effects
from .sweep_outcome import Column
from .sweep_variants import naming, variants_asked


def sweep(
    model: Any,
    wanted: list[Any],
    text: Any,
    prompt: Any,
    image: Any,
    inputs: Any,
    seed: int,
    tokenizer: Any,
    attention: bool,
    title: str | None,
    progress: bool | None,
    options: dict[str, Any],
) -> Sweep:
    """The report of a list of variants; arguments as for `compare`, already checked there.

    All variants are read, and tried against the model's sites, before anything runs. Each of them then runs once, after a short run that
    reads the beginning of the untouched text (or a short look at a joint attention), and is taken off before the next one.
    """
    variants, text, image, options = variants_asked(model, wanted, text, prompt, image, inputs, options)
    applied = [item for variant in variants for item in variant.recipes]
    job = job_for(model, text, prompt, image, inputs, tokenizer, options, seed, applied)
    table = sites(model)
    around, sessions = session_notes(model), []  # the former before sessions of our own start
    for place, variant in enumerate(variants, start=1):
        with naming(place, variant.label):
            session = apply(model, *variant.recipes, tokenizer=job.tokenizer)
        session.remove()
        sessions.append(session)

    report = Sweep(job.kind, title or "", model=model_facts(model, job, len(table)), seed=seed)
    report.request, report.environment = job.request(), environment()
    effects, pairs = Effects(job, attention), []
    with generators_kept(), progress_bar(progress, (len(variants) + 1) * (job.ticks + 1), "comparing") as tick:
        plain = job.run(tick)
        effects.begin(plain)
        tick()
        for place, (variant, session) in enumerate(zip(variants, sessions, strict=True), start=1):
            column = Column(variant.label, variant.facts, variant.differing)
            with naming(place, variant.label), session:
                effects.look(session)
                tick()
                session.clear_counts()
                result = job.run(tick)
                column.stats = session.stats
            pair = Report(job.kind, variant.label)
            job.fill(pair, plain, result)
            column.side, column.same = pair.after, bool(pair.metrics["identical"])
            column.first_difference = pair.first_difference
            column.notes += reading_notes(variant.recipes)
            silent = [repr(label) for label, counts in column.stats.items() if not counts]
            if silent:
                column.notes.append(f"{' and '.join(silent)} never acted in this run: nothing was changed.")
            pairs.append(pair)
            report.columns.append(column)
    report.untouched, report.inputs = pairs[0].before, pairs[0].inputs
    report.notes = [*around, *dict.fromkeys(note for pair in pairs for note in pair.notes)]
    report.measures = effects.finish(pairs, report.columns)
    report.title = report.title or _title(report)
    return report


def _title(report: Sweep) -> str:
    name = report.model["name"] or report.model["class"]
    chart = chart_of(report)
    if chart is not None and len(chart.lines) == 1 and not chart.others:
        return f"{chart.recipe} at {len(report.columns)} values of {chart.parameter} on {name}"
    slugs = list(dict.fromkeys(" + ".join(r["name"] for r in column.recipes) for column in report.columns))
    return f"{', '.join(slugs[:3])}{' and others' if len(slugs) > 3 else ''} on {name}"
