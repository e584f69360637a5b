"""HeadHunter's search: pictures are drawn with each head added to those found before, an objective scores them, the best k stay."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import nn

from ...hooks import SiteTable, running, sites
from ...hooks.sites.discovery import original_of
from ...interventions import ReattendError
from ..kit.base import Recipe
from ..kit.checks import read_json, read_text, shown, text, whole_number
from ..kit.denoisers import image_layers
from ..kit.heads import Head
from ..kit.profile import Profile, cached_path, table_fingerprint
from ..kit.profiling import checked, track
from .material.head_sets import Ledger, Painter
from .material.objectives import objective_of, scored

Scores = Callable[[list[tuple[Head, ...]]], Sequence[float]]
# what the search itself tells the pipeline; OWN: and what would make these mean something else
NEEDED = ("prompt", "generator", "num_inference_steps", "output_type")
OWN = (*NEEDED, "prompt_embeds", "num_images_per_prompt", "return_dict", "latents")
# the recipe's parameters that make a candidate's picture
USED = ("strength", "scale", "perturbation", "scope", "temperature", "rescale", "start", "stop")


@dataclass(frozen=True)
class Round:
    """chosen: the heads that a round added, best first. scores: of every head that it tried to the end."""

    chosen: list[Head]
    scores: dict[Head, float]


def search(
    pool: Sequence[Head], score: Scores, k: int, rounds: int, screen: Scores | None = None, keep: float = 0.25
) -> list[Round]:
    """The greedy search itself: every round adds the k heads to the set which score highest, each tried alone beside those of before.

    score: sets of heads -> one number each, higher = better. screen: the same, cheaper; the best `keep` of a round's heads by it (at
    least k) are then scored. Of equal ones the lower layer, then the lower head is taken. It ends early when no head is left.
    """
    left, found, result = sorted(set(pool)), [], []
    while left and len(result) < rounds:
        asked = left
        if screen is not None:
            share = max(k, math.ceil(keep * len(left)))
            asked = sorted(_best(left, screen([(*found, head) for head in left]), share))
        scores = score([(*found, head) for head in asked])
        chosen = _best(asked, scores, k)
        result.append(Round(chosen, dict(zip(asked, scores, strict=True))))
        found += chosen
        left = [head for head in left if head not in set(chosen)]
    return result


def _best(heads: Sequence[Head], scores: Sequence[float], count: int) -> list[Head]:
    value = dict(zip(heads, scores, strict=True))
    return sorted(heads, key=lambda head: (-value[head], head))[:count]


@checked
def search_heads(
    recipe: type[Recipe],
    model: Any,
    processor: Any = None,
    *,
    prompts: Any = None,
    seeds: Sequence[int] | None = None,
    objective: Any = None,
    k: int = 3,
    rounds: int = 5,
    layers: Sequence[int] | None = None,
    steps: int = 20,
    strength: float = 1.0,
    scale: float = 3.0,
    batch_size: int = 8,
    screen_steps: int | None = None,
    keep: float = 0.25,
    call: Any = None,
    resume: str | None = None,
    **parameters: Any,
) -> Profile:
    """The heads whose guidance raises an objective on pictures of these prompts, as a profile.

    model: a diffusers pipeline that is called with prompts. prompts: texts, or a JSON file of them; seeds: one for each of them (0, 1, 2,
    ...), so that a prompt can be named several times. objective: a callable (PIL pictures, prompts) -> one number per picture, higher =
    better, or the name of a built-in one (`material.objectives`: sharpness, contrast, brightness, saturation, warmth). k, rounds: heads
    that each round adds, 3 and 5 in the paper for a style, 24 and 1 for general quality. layers: search only in these.
    steps, strength, scale: how a candidate is drawn; the paper searches at strength 1 and scale 3 (SD3) or 8 (FLUX.1-dev) in 20 or 15 steps.
    parameters: further ones of the recipe, such as perturbation and scope. call: further arguments of the pipeline, {name: value}.
    batch_size: pictures drawn at once, each with its own heads. screen_steps: ours, None = off: all heads are first scored in so few
    steps, and only the best `keep` of them (0 to 1, at least k) in all of them. resume: a file in which every score is noted; a search
    that was cut off goes on with it, also with more rounds.

    Costs pairs x heads x rounds pictures, and twice the pairs. Its tensors: selected [n, 2], best first; scores [rounds, layers, heads,
    pairs], NaN where no head was tried. Facts: what was asked; rounds, each head with its mean score and the spread over the pairs;
    baseline, the score without guidance; score and gain, of all chosen heads together. Few pairs are noisy: look at the spread, and at
    pictures of other prompts. Raises ReattendError before any picture is drawn for what does not fit, and where the objective does not
    give a finite number for each picture.
    """
    table, numbered = _fitting(recipe, model)
    pairs = _pairs(prompts, seeds)
    name, judge = objective_of(objective)
    for what, value in (("k", k), ("rounds", rounds), ("steps", steps), ("batch_size", batch_size)):
        whole_number(value, what, 1)
    if screen_steps is not None and not 1 <= screen_steps < steps:
        raise ReattendError(f"screen_steps must lie between 1 and {steps - 1} (steps are {steps}), got {screen_steps}")
    if not 0 < keep <= 1:
        raise ReattendError(f"keep must lie above 0 and be at most 1, got {keep}")
    other = next((key for key in parameters if key not in USED), None)
    if other is not None:
        raise ReattendError(f"{other} is no option of this search; of the recipe's parameters it takes {', '.join(USED)}")
    given = _call(call, original_of(model))
    pool = _pool(numbered, layers, table.model_name)
    settings: Any = recipe(heads=pool, strength=strength, scale=scale, **parameters)
    if settings.neutral or settings.scale == 0:
        raise ReattendError("strength and scale must be above 0: at 0 no head changes the picture")
    if reason := settings.misfit(table):
        raise ReattendError(f"cannot search heads of this model: {reason}")
    asked = {
        "objective": name, **settings.model_dump(mode="json", include=set(USED)), "steps": steps,
        "sampler": type(getattr(model, "scheduler", None)).__name__, "pairs": [list(pair) for pair in pairs],
        "call": {key: value if isinstance(value, (int, float, str)) else shown(value) for key, value in given.items()},
    }  # fmt: skip
    painter = Painter(original_of(model), settings, numbered, pairs, given)
    ledger = Ledger(resume, {"model": cached_path(recipe.slug, table).stem, **asked})

    def each(sets: Sequence[tuple[Head, ...]], drawn_in: int, label: str) -> list[list[float]]:
        """[sets][pairs]: the scores of the pictures, of which those are drawn that are not known yet."""
        wanted = [(heads, pair) for pair in range(len(pairs)) for heads in sets]
        missing = [job for job in wanted if ledger.get(drawn_in, *job) is None]
        parts = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
        for part in track(parts, label, len(parts)):
            pictures = painter.draw(part, drawn_in)
            ledger.add(drawn_in, part, scored(judge, pictures, [pairs[pair][0] for _, pair in part]))
        return [[ledger[drawn_in, heads, pair] for pair in range(len(pairs))] for heads in sets]

    (baseline,) = each([()], steps, "without guidance")
    tried: list[dict[Head, list[float]]] = []

    def score(sets: list[tuple[Head, ...]]) -> list[float]:
        found = each(sets, steps, f"heads, round {len(tried) + 1} of {rounds}")
        tried.append({heads[-1]: values for heads, values in zip(sets, found, strict=True)})
        return [fmean(values) for values in found]

    def screen(sets: list[tuple[Head, ...]]) -> list[float]:
        assert screen_steps is not None
        return [fmean(values) for values in each(sets, screen_steps, f"screening, round {len(tried) + 1} of {rounds}")]

    done = search(pool, score, k, rounds, None if screen_steps is None else screen, keep)
    selected = [head for part in done for head in part.chosen]
    (together,) = each([tuple(selected)], steps, "all heads found")
    shape = len(done), len(numbered), max(site.num_heads or 0 for layer in numbered.values() for site in layer), len(pairs)
    scores = torch.full(shape, float("nan"))
    for number, part in enumerate(tried):
        for (layer, head), values in part.items():
            scores[number, layer, head] = torch.tensor(values)
    facts = {
        **asked, "k": k, "layers": sorted({layer for layer, _ in pool}), "screen_steps": screen_steps,
        "modules": [layer[0].name for layer in numbered.values()],
        "rounds": [
            [
                {"layer": layer, "head": head, "score": part.scores[layer, head], "spread": pstdev(values[layer, head])}
                for layer, head in part.chosen
            ]
            for part, values in zip(done, tried, strict=True)
        ],
        "baseline": fmean(baseline), "score": fmean(together), "gain": fmean(together) - fmean(baseline),
        "gain_of_pairs": [after - before for after, before in zip(together, baseline, strict=True)],
    }  # fmt: skip
    return Profile(recipe.slug, table_fingerprint(table), {"selected": torch.tensor(selected), "scores": scores}, facts)


def _fitting(recipe: type[Recipe], model: Any) -> tuple[SiteTable, dict[int, SiteTable]]:
    """(sites, layers) of a pipeline that draws. Raises ReattendError where it is none, or a recipe is at work."""
    table = sites(model)
    numbered = image_layers(table)
    if not numbered:
        stacks = ", ".join(sorted({s.stack for s in table})) or "none"
        raise ReattendError(
            f"{recipe.slug} needs a diffusion model with self-attention; {table.model_name} has attention in: {stacks}"
        )
    if isinstance(original_of(model), nn.Module) or not callable(original_of(model)):
        raise ReattendError(f"{recipe.slug} draws pictures to score heads: give the pipeline, not its {table.model_name} alone")
    missing = [name for name in NEEDED if name not in inspect.signature(original_of(model).__call__).parameters]
    if missing:
        raise ReattendError(f"{recipe.slug} draws pictures of prompts; {table.model_name} takes no {missing[0]}")
    if running(model):
        raise ReattendError("heads are searched on the plain model: end the session that is active on it first")
    return table, numbered


def _pairs(prompts: Any, seeds: Sequence[int] | None) -> list[tuple[str, int]]:
    if isinstance(prompts, (str, Path)):
        prompts = read_json(read_text(prompts, "prompts file"), f"prompts: {str(prompts)!r}")
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise ReattendError(f"prompts must be a list of at least one text, or a JSON file of one, got {shown(prompts)}")
    texts = [text(prompt, f"prompts[{n}]") for n, prompt in enumerate(prompts)]
    if seeds is None:
        seeds = range(len(texts))
    if len(seeds) != len(texts):
        raise ReattendError(f"seeds must be one for each prompt: there are {len(texts)} prompts and {len(seeds)} seeds")
    return [(prompt, whole_number(seed, "seeds", 0)) for prompt, seed in zip(texts, seeds, strict=True)]


def _call(given: Any, pipe: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ReattendError(f"call must be the pipeline's further arguments, {{name: value}}, got {shown(given)}")
    known = inspect.signature(pipe.__call__).parameters
    for name in given:
        if name in OWN:
            raise ReattendError(f"call must not hold {name}: prompts, seeds and steps are arguments of the search")
        if name not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            raise ReattendError(f"call: {type(pipe).__name__} takes no argument {shown(name)}; it takes {', '.join(known)}")
    return dict(given)


def _pool(numbered: dict[int, SiteTable], layers: Sequence[int] | None, name: str) -> list[Head]:
    """The heads that can be perturbed, of these layers (None = all). Raises ReattendError where a layer is none, or no head is left."""
    for layer in layers or ():
        if layer not in numbered:
            raise ReattendError(f"layers: layer {layer} does not exist: {name} has layers 0 to {len(numbered) - 1}")
        if numbered[layer].refusal:
            raise ReattendError(f"layers: {numbered[layer].refusal}")
    chosen = sorted(set(numbered if layers is None else layers))
    fit = [layer for layer in chosen if not numbered[layer].refusal]
    pool = [(layer, head) for layer in fit for head in range(min(site.num_heads or 0 for site in numbered[layer]))]
    if not pool:
        reason = next((numbered[layer].refusal for layer in chosen if numbered[layer].refusal), "layers is empty")
        raise ReattendError(f"no head is there to be searched: {reason}")
    return pool
