"""The one place that knows by which name a model takes and returns its cache, how long a cache is, and which of its columns are filled.

transformers calls it `cache` since 5.24 and called it `past_key_values` before; remote code may use either for years.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..interventions import ReattendError, TokenMap

# the newest name first
NAMES = ("cache", "past_key_values")


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model or layer, or None."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The cache that a model's output holds, or None."""
    name = next((name for name in NAMES if hasattr(output, name)), None)
    return None if name is None else getattr(output, name)


def cache_name(model: Any) -> str:
    """The name by which a model's forward takes its cache; the library's own where the forward only hands it on."""
    return _name_in(type(model).forward) or _library_name()


@functools.lru_cache(maxsize=256)
def _name_in(function: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(function).parameters
    return next((name for name in NAMES if name in parameters), None)


def _library_name() -> str:
    from transformers import GenerationMixin

    return _name_in(GenerationMixin.prepare_inputs_for_generation) or NAMES[0]


def cache_length(cache: Any) -> int:
    """Tokens already in a cache. Raises ReattendError for one that does not tell."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    if isinstance(cache, (tuple, list)) and cache and cache[0] is not None:
        return int(cache[0][0].shape[2])
    raise ReattendError(f"a cache of type {type(cache).__name__} does not tell its length: pass a transformers Cache")


def has_buffers(cache: Any) -> bool:
    """Whether layers of a cache hand out buffers of a fixed length, whose last columns may not be written yet (static caches)."""
    cache = getattr(cache, "self_attention_cache", cache)
    return any(hasattr(layer, "max_cache_len") for layer in getattr(cache, "layers", ()))


def filled_columns(query: Tensor, key: Tensor, mask: Tensor | None, tokens: TokenMap | None, buffered: bool) -> int:
    """How many of a decoder's key columns hold tokens: the length of the sequence, or of the window that its cache keeps.

    A buffer is longer until it is full; both of transformers' kinds are written from column 0 on, and one with a window is rolled when
    it is full, so that columns are in the order of the sequence always. Without a token map the mask tells: nobody sees what follows.
    """
    keys = key.shape[2]
    if tokens is not None:
        return min(keys, tokens.length) if buffered else keys
    if mask is None or mask.shape[-1] != keys or keys <= query.shape[2]:
        return keys
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    places = seen.flatten(0, 2).any(dim=0).nonzero()
    return max(query.shape[2], int(places[-1]) + 1 if len(places) else keys)
