"""The head search of ACT: calibrate one head at a time and keep those that raise accuracy on labelled prompts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from ...hooks import Capture, Plan, SiteTable, attach
from ...interventions import Call, ReattendError
from ...interventions.calibration import learn_sinks
from ..base import Recipe, profiled_sites
from ..head_choice import Head, as_heads, missing_heads
from ..profile import Profile, table_fingerprint
from .choices import Example, accuracy_of, batches_of, read_choices
from .labelled_examples import labelled_examples
from .progress import track


def search_heads(
    recipe: type[Recipe],
    model: Any,
    tokenizer: Any,
    *,
    data: Sequence[Example] | None = None,
    heads: Any = None,
    max_heads: int | None = None,
    max_samples: int | None = None,
    batch_size: int = 16,
    task: str = "",
    **parameters: Any,
) -> Profile:
    """Tries heads one by one and returns what it found as a profile.

    Its tensors: score [layers, heads], the accuracy with that head alone calibrated; count, the prompts it was tried on (0: not
    tried); sinks, the share of prompts on which the head has a hidden sink; selected [n, 2], the heads whose score exceeds that of
    the untouched model by more than one standard error.

    data: (prompt, label) or (prompt, label, choices); the model chooses by the logits of the choices' first tokens at the prompt's end.
    Without data: sentences of our own, for a try. heads: search only among these; else layers 2 to the last but one. max_heads: only
    the heads that have a hidden sink most often. parameters: beta, threshold and the like, as they will be used.
    Raises ReattendError for data that cannot be judged, such as choices that begin with the same token.
    """
    table, chosen = profiled_sites(model, recipe.slug)
    examples = list(labelled_examples() if data is None else data)[:max_samples]
    questions = read_choices(tokenizer, examples)
    listed = _candidates(heads, chosen)
    settings = recipe(heads=listed, **parameters)
    batches = batches_of(model, tokenizer, questions, batch_size)
    sinks, baseline = _screen(settings, model, chosen, listed, batches)
    candidates = [head for head in listed if sinks[head]]
    # heads that have something to calibrate most often come first
    candidates = sorted(candidates, key=lambda head: -sinks[head])[:max_heads]
    error = math.sqrt(max(baseline * (1 - baseline), 1e-12) / len(questions))
    size = max(s.layer for s in chosen) + 1, max(s.num_heads or 0 for s in chosen)
    score, count, share = torch.full(size, baseline), torch.zeros(size), torch.zeros(size)
    for head, times in sinks.items():
        share[head] = times / len(questions)
    for head in track(candidates, "heads", len(candidates)):
        score[head] = _accuracy_with(recipe(heads=[head], **parameters), model, table, batches)
        count[head] = len(questions)
    selected = [head for head in sorted(candidates) if score[head] > baseline + error]
    facts = {
        "task": task or ("built-in examples" if data is None else "user data"),
        "samples": len(questions),
        "data_hash": hashlib.sha256(repr(examples).encode()).hexdigest()[:16],
        "baseline": baseline,
        "standard_error": error,
        "tried": len(candidates),
        "without_sinks": sum(not times for times in sinks.values()),
        "together": _accuracy_with(recipe(heads=selected, **parameters), model, table, batches) if selected else baseline,
        **{name: value for name, value in settings.as_dict().items() if name not in ("name", "version", "heads")},
    }
    tensors = {"score": score, "count": count, "sinks": share, "selected": torch.tensor(selected).view(-1, 2)}
    return Profile(recipe.slug, table_fingerprint(table), tensors, facts)


def accuracy(model: Any, tokenizer: Any, data: Sequence[Example], batch_size: int = 16) -> float:
    """Share of labelled prompts (see `search_heads`) that the model answers rightly, under whatever session is active."""
    return accuracy_of(model, batches_of(model, tokenizer, read_choices(tokenizer, data), batch_size))


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


def _accuracy_with(recipe: Recipe, model: Any, table: SiteTable, batches: list) -> float:
    with attach(model, [Plan(recipe.slug, recipe.plan(table))]):
        return accuracy_of(model, batches)


def _screen(settings: Any, model: Any, sites: SiteTable, heads: list[Head], batches: list) -> tuple[dict[Head, int], float]:
    """({head: prompts on which it has a hidden sink}, accuracy of the untouched model), in one pass over the prompts."""
    found = dict.fromkeys(heads, 0)
    wanted: dict[int, list[int]] = {}
    for layer, head in heads:
        wanted.setdefault(layer, []).append(head)

    def look(call: Call, edits: Any) -> None:
        assert call.site is not None
        layer = call.site.layer
        known = learn_sinks(call, wanted[layer], **settings.rule)
        for head, times in zip(known.heads, known.sinks.any(dim=2).sum(dim=0).tolist(), strict=True):
            found[layer, head] += times

    with attach(model, [Plan(settings.slug, [Capture(sites.only(list(wanted)), look)])]):
        return found, accuracy_of(model, batches)
