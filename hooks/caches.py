"""The one place that knows by which name a model takes and returns its cache, and how long a cache is.

transformers calls it `cache` since 5.24 and called it `past_key_values` before; remote code may use either for years.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..interventions import ReattendError

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
