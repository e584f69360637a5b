"""How recipes name heads: lists that users write, lists that profiles hold, and whether a model has them."""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator
from torch import Tensor

from ...hooks import SiteTable
from ...interventions import ReattendError
from .checks import read_json, read_text
from .profile import Profile

Head = tuple[int, int]


def _whole(value: Any) -> int:
    """A layer or head as a number; the keys of a JSON object are texts. Raises TypeError or ValueError for anything else."""
    if isinstance(value, bool):
        raise TypeError
    return int(value) if isinstance(value, str) else operator.index(value)


def as_heads(value: Any) -> Any:
    """Pairs (layer, head) from [[layer, head], ...] or {layer: [heads]}; None and names pass. Raises ValueError for anything else."""
    if value is None or isinstance(value, str):
        return value
    pairs: list[Head] = []
    try:
        if isinstance(value, Mapping):
            pairs = [(_whole(layer), _whole(head)) for layer, heads in value.items() for head in heads]
        else:
            pairs = [(_whole(layer), _whole(head)) for layer, head in value]
    except (TypeError, ValueError):
        raise ValueError("heads must be [[layer, head], ...] or {layer: [heads]}") from None
    if any(layer < 0 or head < 0 for layer, head in pairs):
        raise ValueError("layers and heads are counted from 0, so none may be negative")
    if len(set(pairs)) != len(pairs):
        raise ValueError("heads names a head twice")
    return tuple(pairs)


Heads = Annotated[tuple[Head, ...] | None, BeforeValidator(as_heads)]


def by_layer(heads: Iterable[Head]) -> dict[int, list[int]]:
    """{layer: heads in ascending order}."""
    result: dict[int, list[int]] = {}
    for layer, head in sorted(heads):
        result.setdefault(layer, []).append(head)
    return result


def at_layers(pairs: Iterable[tuple[int, int | None]]) -> dict[int, list[int] | None]:
    """{layer: its heads, None = all} of (layer, head) pairs, where head None names all of a layer."""
    found: dict[int, list[int] | None] = {}
    for layer, head in pairs:
        if head is None:
            found[layer] = None
        elif (known := found.setdefault(layer, [])) is not None and head not in known:
            known.append(head)
    return found


def missing_heads(heads: Iterable[Head], sites: SiteTable) -> str:
    """Why these sites do not have all the heads, or ""."""
    count = {site.layer: site.num_heads for site in sites}
    for layer, head in heads:
        if layer not in count:
            return f"heads name layer {layer}, but the decoder of {sites.model_name} has layers 0 to {max(count)}"
        known = count[layer]
        if known is not None and head >= known:
            return f"heads name head {head} of layer {layer}, but it has heads 0 to {known - 1}"
    return ""


def ranked(scores: Tensor) -> list[tuple[Head, float]]:
    """((layer, head), score) from scores [layers, heads], highest first; equal ones in the order of layers and heads."""
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    width = scores.shape[1]
    return [((i // width, i % width), float(scores[i // width, i % width])) for i in order]


def head_scores(profile: Profile) -> Tensor:
    """The scores [layers, heads] that any head profile holds. Raises ReattendError for a profile without them."""
    scores = profile.tensors.get("score")
    if scores is None or scores.dim() != 2:
        raise ReattendError(
            f"the profile of recipe {profile.recipe!r} holds no head scores (a tensor 'score' of shape [layers, heads])"
        )
    return scores


def scores_of_json(path: str) -> list[tuple[Head, float]]:
    """((layer, head), score), highest first, from a JSON file of {"layer-head": score or list of scores, whose mean counts}.

    Raises ReattendError for a file that holds none.
    """
    data = read_json(read_text(path, "profile file"), f"profile {path!r}")
    try:
        found = []
        for name, value in data.items():
            layer, head = (int(part) for part in name.split("-"))
            values = [float(v) for v in (value if isinstance(value, list) else [value])]
            found.append(((layer, head), sum(values) / len(values)))
    except (AttributeError, TypeError, ValueError, ZeroDivisionError):
        found = []
    if not found or any(layer < 0 or head < 0 or not math.isfinite(score) for (layer, head), score in found):
        raise ReattendError(f'{path!r} holds no head scores: it must be JSON of {{"layer-head": score}}')
    return sorted(found, key=lambda item: -item[1])


def random_control(ranking: list[Head], chosen: int, seed: int, outside: int = 100) -> list[Head]:
    """As many heads as were chosen, drawn from outside the `outside` best ones; in small models from the lower half of the ranking.

    Raises ReattendError when too few are left to draw from.
    """
    skip = max(chosen, min(outside, len(ranking) // 2))
    rest = sorted(ranking[skip:])
    if len(rest) < chosen:
        raise ReattendError(
            f"a random control of {chosen} heads needs as many beyond the best {skip}, but only {len(rest)} are left"
        )
    return random.Random(seed).sample(rest, chosen)
