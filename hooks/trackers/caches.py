"""The one place that knows by which name a model takes and returns its cache, how long a cache is, and which of its columns are filled.

transformers calls it `cache` since 5.24 and called it `past_key_values` before; remote code may use either for years.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...interventions import ReattendError, TokenMap

# the newest name first
NAMES = ("cache", "past_key_values")
# what models of state spaces call theirs; it holds no keys
OTHERS = ("cache_params",)


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

    return _name_in(vars(GenerationMixin)["prepare_inputs_for_generation"]) or NAMES[0]


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


def strange_cache(values: Mapping[str, Any]) -> str:
    """The name of a cache among these arguments or outputs that stands under none of the names that are read here, or ""."""
    return next((name for name, value in values.items() if name not in (*NAMES, *OTHERS) and _is_cache(value)), "")


def takes_cache(model: Any) -> bool:
    """Whether a model's forward names a cache among its parameters."""
    return _name_in(type(model).forward) is not None


def _is_cache(value: Any) -> bool:
    if hasattr(value, "get_seq_length"):
        return True
    first = value[0] if isinstance(value, (tuple, list)) and value else None
    # one pair of keys and values per layer
    return (
        isinstance(first, (tuple, list)) and len(first) >= 2 and all(isinstance(x, Tensor) and x.dim() == 4 for x in first[:2])
    )


def same_content(cache: Any, other: Any, length: int) -> bool:
    """Whether a cache holds what another one holds at its first `length` tokens: for copies, which are objects of their own.

    Keys of the first and the last layer that keep all tokens are compared bit by bit; the rows of `other` may be one for all.
    """
    layers = (getattr(one, "layers", ()) for one in (cache, other))
    origins = [(getattr(a, "origin", None), getattr(b, "origin", None)) for a, b in zip(*layers, strict=False)]
    if any(a is not b for a, b in origins if a is not None and b is not None):
        return False
    mine, theirs = _whole_layers(cache, length), _whole_layers(other, length)
    if not mine and cache_length(cache) == cache_length(other) == length:
        # windows hold the same tokens where neither has gone on
        mine, theirs = _windows(cache), _windows(other)
    if len(mine) != len(theirs) or not mine:
        return False
    pairs = [(mine[i], theirs[i]) for i in dict.fromkeys((0, len(mine) - 1))]
    for a, b in pairs:
        if a.shape[1:2] != b.shape[1:2] or a.shape[3:] != b.shape[3:] or (a.dtype, a.device) != (b.dtype, b.device):
            return False
        if a.shape[0] != b.shape[0] and b.shape[0] != 1:
            return False
    # most caches differ in the last token already
    pairs = [(a[:, :, :length], b[:, :, :length]) for a, b in pairs]
    if any(a.shape[2] != b.shape[2] for a, b in pairs):
        return False
    spots = [(a[:, :1, -1], b[:, :1, -1]) for a, b in pairs]
    return all(bool(_alike(a, b).all()) for a, b in [*spots, *pairs])


def _alike(a: Tensor, b: Tensor) -> Tensor:
    """Bool [B, Hkv, ...]: where two tensors of keys have the same ones, or one of them has let that token go (zeros)."""
    return (a == b).all(dim=-1) | ~a.any(dim=-1) | ~b.any(dim=-1)


def _keys(layer: Any) -> Any:
    """The keys that a layer of a cache holds; of one that has let tokens go of all, with zeros for those."""
    return layer.whole()[0] if hasattr(layer, "evicted_at") else getattr(layer, "keys", None)


def _windows(cache: Any) -> list[Tensor]:
    """The keys that the windowed layers of a cache hold."""
    keys = [getattr(layer, "keys", None) for layer in getattr(cache, "layers", ()) if getattr(layer, "is_sliding", False)]
    return [k for k in keys if isinstance(k, Tensor) and k.dim() == 4]


def _whole_layers(cache: Any, length: int) -> list[Tensor]:
    """The keys of the layers that keep the first `length` tokens one after the other."""
    cache = getattr(cache, "self_attention_cache", cache)
    if isinstance(cache, (tuple, list)):
        keys = [layer[0] for layer in cache]
    else:
        keys = [
            _keys(layer)
            for layer in getattr(cache, "layers", ())
            if not getattr(layer, "is_sliding", False) or 0 < length < getattr(layer, "sliding_window", 0)
        ]
    return [k for k in keys if isinstance(k, Tensor) and k.dim() == 4 and k.shape[2] >= length]


def rows_repeat(cache: Any, times: int) -> bool:
    """Whether the rows of a cache are alike in groups of so many: each was repeated, and none was taken away."""
    keys = _whole_layers(cache, cache_length(cache))
    if times < 2 or not keys:
        return False
    groups = keys[-1].unflatten(0, (-1, times))
    return bool((groups == groups[:, :1]).all())


def versions() -> str:
    """The versions of the libraries that caches come from."""
    found = []
    for name in ("torch", "transformers", "diffusers", "peft"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
