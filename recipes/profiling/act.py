"""The head search of ACT: calibrate one head at a time and keep those that raise the score on labelled prompts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from ...hooks import Capture, Plan, SiteTable, attach
from ...interventions import Call, ReattendError
from ...interventions.families.calibration import learn_sinks
from ..kit.base import Recipe
from ..kit.heads import Head, as_heads, by_layer, missing_heads
from ..kit.profile import Profile, table_fingerprint
from ..kit.profiling import checked, profiled_sites, track
from .material.files import content_of, list_of
from .material.labelled_examples import built_in
from .material.labelled_tasks import Judge, Kind, LabelledTask, labelled_task


@checked
def search_heads(
    recipe: type[Recipe],
    model: Any,
    processor: Any,
    *,
    data: Sequence[Any] | str | None = None,
    kind: Kind = "classification",
    heads: Any = None,
    max_heads: int | None = None,
    max_samples: int | None = None,
    batch_size: int = 16,
    task: str = "",
    judge: Judge | None = None,
    max_new_tokens: int = 0,
    **parameters: Any,
) -> Profile:
    """Tries heads one by one and returns what it found as a profile.

    Its tensors: score [layers, heads], the mean score of the prompts with that head alone calibrated; count, the prompts it was tried on
    (0: not tried); sinks, the share of prompts on which the head has a hidden sink; selected [n, 2], the heads whose score exceeds that
    of the untouched model by more than one standard error.

    data and kind: labelled prompts, as `labelled_tasks.labelled_task` takes them; (prompt, label) or (prompt, label, choices) for
    "classification", (prompt, answer, options) for "multiple_choice", (prompt, reference) for "generation", which judge and
    max_new_tokens go with; or a JSON file of those. Without data: sentences and questions of our own, for a try. A list of heads is worth
    what its task is worth: search once per kind of task. heads: search only among these; else layers 2 to the last but one.
    max_heads: only the heads that have a hidden sink most often. parameters: beta, threshold and the like, as they will be used.
    Raises ReattendError for data that cannot be judged, such as choices that begin with the same token.
    """
    table, chosen = profiled_sites(model, recipe.slug)
    examples = list(built_in(kind) if data is None else list_of(content_of(data)))[:max_samples]
    listed = _candidates(heads, chosen)
    settings = recipe(heads=listed, **parameters)
    work = labelled_task(kind, processor, examples, batch_size, judge, max_new_tokens)
    sinks, plain = _screen(settings, model, chosen, listed, work)
    baseline = sum(plain) / len(plain)
    candidates = [head for head in listed if sinks[head]]
    # heads that have something to calibrate most often come first
    candidates = sorted(candidates, key=lambda head: -sinks[head])[:max_heads]
    spread = sum((x - baseline) ** 2 for x in plain) / len(plain)
    error = math.sqrt(max(spread, 1e-12) / len(plain))
    size = max(s.layer for s in chosen) + 1, max(s.num_heads or 0 for s in chosen)
    score, count, share = torch.full(size, baseline), torch.zeros(size), torch.zeros(size)
    for head, times in sinks.items():
        share[head] = times / sum(work.passes)
    for head in track(candidates, "heads", len(candidates)):
        score[head] = _score_with(recipe(heads=[head], **parameters), model, table, work)
        count[head] = len(plain)
    selected = [head for head in sorted(candidates) if score[head] > baseline + error]
    facts = {
        "task": task or ("built-in examples" if data is None else "user data"),
        "kind": kind,
        "samples": len(plain),
        "data_hash": hashlib.sha256(repr(examples).encode()).hexdigest()[:16],
        "baseline": baseline,
        "standard_error": error,
        "tried": len(candidates),
        "without_sinks": sum(not times for times in sinks.values()),
        "together": _score_with(recipe(heads=selected, **parameters), model, table, work) if selected else baseline,
        **{name: value for name, value in settings.as_dict().items() if name not in ("name", "version", "heads")},
    }
    tensors = {"score": score, "count": count, "sinks": share, "selected": torch.tensor(selected, dtype=torch.long).view(-1, 2)}
    return Profile(recipe.slug, table_fingerprint(table), tensors, facts)


def accuracy(
    model: Any, processor: Any, data: Sequence[Any], batch_size: int = 16, kind: Kind = "classification", **options: Any
) -> float:
    """Mean score of labelled prompts (see `search_heads`), for choices the share answered rightly, under whatever session is active."""
    return mean_score(model, labelled_task(kind, processor, data, batch_size, **options))


def mean_score(model: Any, task: LabelledTask) -> float:
    found = task.scores(model)
    return sum(found) / len(found)


def _candidates(heads: Any, sites: SiteTable) -> list[Head]:
    if heads is None:
        return [(s.layer, h) for s in sites.layers(2, -2) for h in range(s.num_heads or 0)]
    if isinstance(heads, str):
        raise ReattendError(f"heads must be [[layer, head], ...] or {{layer: [heads]}} for a search, got {heads!r}")
    try:
        listed = list(as_heads(heads))
    except ValueError as error:
        raise ReattendError(str(error)) from None
    reason = missing_heads(listed, sites) or ("" if listed else "heads is empty")
    if reason:
        raise ReattendError(reason)
    return listed


def _score_with(recipe: Recipe, model: Any, table: SiteTable, task: LabelledTask) -> float:
    with attach(model, [Plan(recipe.slug, recipe.plan(table))]):
        return mean_score(model, task)


def _screen(
    settings: Any, model: Any, sites: SiteTable, heads: list[Head], task: LabelledTask
) -> tuple[dict[Head, int], list[float]]:
    """({head: prompts on which it has a hidden sink}, scores of the untouched model), in one run over the prompts."""
    found = dict.fromkeys(heads, 0)
    wanted = by_layer(heads)

    def look(call: Call, edits: Any) -> None:
        assert call.site is not None
        if call.clock.phase == "decode":
            return  # sinks are those of the prompt
        layer = call.site.layer
        known = learn_sinks(call, wanted[layer], **settings.rule)
        for head, times in zip(known.heads, known.sinks.any(dim=2).sum(dim=0).tolist(), strict=True):
            found[layer, head] += times

    with attach(model, [Plan(settings.slug, [Capture(sites.only(list(wanted)), look)])]):
        return found, task.scores(model)
