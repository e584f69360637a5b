"""What the profile of a recipe holds: told by the recipe as data, checked here for all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...hooks import SiteTable
from ...interventions import ReattendError, Site
from .denoisers import image_layers

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
# of a size that neither the model nor the recipe fixes: more layers, tasks or dimensions than anybody lists
LARGEST = 2**16
Size = int | str


@dataclass(frozen=True)
class Numbers:
    """One tensor.

    shape: numbers, or names: "layers", "heads", "key_heads" and "head_dim" are the model's, any other is the same wherever it stands.
    whole: integers instead of floating-point numbers. least, most: the range of all values. empty: whether named sizes of its own may
    be 0. unknown: whether NaN, which says "not known", may stand in it. needed: False, or {parameter: value} with which it is needed.
    """

    shape: tuple[Size, ...]
    whole: bool = False
    least: float | None = None
    most: float | None = None
    empty: bool = False
    unknown: bool = False
    needed: bool | Mapping[str, Any] = True


@dataclass(frozen=True)
class Fact:
    """One JSON value. kind: its type; a list is one of texts. size: the name of a size that a list's length is. least: of a number."""

    kind: type
    size: str = ""
    least: int | None = None
    needed: bool = True


@dataclass(frozen=True)
class Contents:
    """tensors, facts: by name. A * in a tensor's name stands for a layer's number: one such tensor for each that the profile knows."""

    tensors: Mapping[str, Numbers] = field(default_factory=dict)
    facts: Mapping[str, Fact] = field(default_factory=dict)

    def check(self, recipe: Any, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], table: Any) -> None:
        """Raises ReattendError that names the first thing which is not as told. What the recipe does not tell of may be there too."""
        sizes = model_sizes(table)
        for name, fact in self.facts.items():
            _check_fact(name, fact, facts, sizes)
        for name, numbers in self._expanded(tensors):
            when = numbers.needed
            needed = when if isinstance(when, bool) else all(getattr(recipe, key) == value for key, value in when.items())
            if name in tensors:
                _check_tensor(name, numbers, tensors[name], sizes)
            elif needed:
                raise _error(f"holds no tensor {name!r} ({_shown(numbers)})")

    def _expanded(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Numbers]]:
        layers: set[str] = set()
        for pattern in self.tensors:
            if "*" in pattern:
                named = re.compile(re.escape(pattern).replace(r"\*", "([^.]*)"))
                layers |= {match[1] for match in map(named.fullmatch, tensors) if match}
        wrong = sorted(layer for layer in layers if not (layer.isascii() and layer.isdigit() and len(layer) < 6))
        if wrong:
            raise _error(f"names a layer {wrong[0]!r:.40}, which is no number")
        for pattern, numbers in self.tensors.items():
            if "*" in pattern and not layers and numbers.needed is True:
                raise _error(f"holds no tensors {pattern!r} ({_shown(numbers)})")
            for layer in sorted(layers, key=int) if "*" in pattern else [""]:
                yield pattern.replace("*", layer), numbers


def numbered_sites(table: SiteTable) -> list[tuple[int, Site]]:
    """(layer, site) of the attention that profiles tell of: a language model's decoder, a denoiser's self and joint attention."""
    image = image_layers(table)
    if image:
        return [(layer, site) for layer, sites in image.items() for site in sites]
    return [(site.layer, site) for site in table.stack("decoder").kind("self")]


def model_sizes(table: Any) -> dict[str, set[int]]:
    """{name: what it may be} of the sizes that the attention of a model's decoder or denoiser fixes."""
    numbered = numbered_sites(table)
    decoder = [site for _, site in numbered]
    config = table.config.get_text_config() if hasattr(table.config, "get_text_config") else table.config
    known = {
        "layers": {1 + max((layer for layer, _ in numbered), default=-1)},
        "heads": {max((s.num_heads or 0 for s in decoder), default=0)},
        "key_heads": {s.num_kv_heads for s in decoder},
        "head_dim": {s.head_dim for s in decoder} | {getattr(config, "v_head_dim", None)},
    }
    found = {name: {size for size in sizes if size} for name, sizes in known.items()}
    return {name: sizes for name, sizes in found.items() if sizes}


def _check_fact(name: str, fact: Fact, facts: Mapping[str, Any], sizes: dict[str, set[int]]) -> None:
    value: Any = facts.get(name)
    if value is None and not fact.needed:
        return
    right = isinstance(value, fact.kind) and not (isinstance(value, bool) and fact.kind is not bool)
    if isinstance(value, list):
        right = right and 0 < len(value) <= LARGEST and all(isinstance(item, str) for item in value)
    elif right and fact.least is not None:
        right = isinstance(value, (int, float)) and fact.least <= value <= LARGEST
    if not right:
        bound = "" if fact.least is None else f" of at least {fact.least}"
        kind = {list: "a list of texts", int: f"a whole number{bound}", str: "a text"}.get(fact.kind, fact.kind.__name__)
        got = "no fact" if name not in facts else f"{value!r:.60} as fact"
        raise _error(f"holds {got} {name!r}, which must be {kind}")
    if fact.size and isinstance(value, list):
        sizes[fact.size] = {len(value)}


def _check_tensor(name: str, numbers: Numbers, tensor: Tensor, sizes: dict[str, set[int]]) -> None:
    right = tensor.dim() == len(numbers.shape)
    for size, wanted in zip(tensor.shape, numbers.shape):
        if isinstance(wanted, int):
            right = right and size == wanted
        else:
            known = sizes.setdefault(wanted, {size})
            right = right and size in known and 0 < size + numbers.empty <= LARGEST
    if not right:
        told = "; ".join(f"{n} = {' or '.join(map(str, sorted(sizes[n])))}" for n in numbers.shape if n in sizes)
        shape = f"a tensor {name!r} of shape {list(tensor.shape)} instead of {_sizes(numbers)}"
        raise _error(f"holds {shape}{f' ({told})' if told else ''}")
    if tensor.dtype not in (WHOLE if numbers.whole else FLOATS):
        kind = "whole" if numbers.whole else "floating-point"
        raise _error(f"holds {str(tensor.dtype).removeprefix('torch.')} in tensor {name!r}, which must be {kind} numbers")
    if not numbers.whole and not numbers.unknown and not bool(tensor.isfinite().all()):
        raise _error(f"holds NaN or infinity in tensor {name!r}")
    low, high = (None, None) if not tensor.numel() else (float(tensor.min()), float(tensor.max()))
    for bound, value, sign in ((numbers.least, low, 1), (numbers.most, high, -1)):
        if bound is not None and value is not None and sign * value < sign * bound:
            raise _error(f"holds {value:g} in tensor {name!r}, which must be at {'least' if sign > 0 else 'most'} {bound:g}")


def _shown(numbers: Numbers) -> str:
    return f"{'whole ' if numbers.whole else ''}numbers of shape {_sizes(numbers)}"


def _sizes(numbers: Numbers) -> str:
    return f"[{', '.join(map(str, numbers.shape))}]"


def _error(what: str) -> ReattendError:
    return ReattendError(f"this profile is broken: it {what}; make it anew with the recipe's profiling step")
