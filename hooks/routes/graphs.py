"""The attention function inside the graphs that torch.compile makes: one opaque operation that runs a session's Python.

A plan is the set of modules that sessions act at. Each distinct one has a number, which is a part of the name in the model's config: so
compilers see a change of plan, and find the code of an earlier one again. While a graph is traced, attention of a module outside of the
plan is the model's own function, traced as ever; that of a module in the plan is `torch.ops.reattend.any`, whose body does what is done
without a compiler, for the sessions of the pass that its thread runs. The graph knows nothing of what they do, so one serves all of it.
The operation has no gradient and returns no weights: where these are wanted, the graph ends before the call and goes on after it.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..sites.discovery import uncompiled

Attention = Callable[..., tuple[Tensor, Tensor | None]]


class Place(NamedTuple):
    """Where attention is called in traced code.

    attention(name, plan, module, ...) is what runs there; module: its id; constants, tensors: its further arguments, and the names of those
    that are tensors. cast: the dtype of autocast, which is on while code is traced and off while a graph runs; None without.
    """

    attention: Attention
    name: str
    plan: str
    module: int
    constants: tuple[tuple[str, Any], ...]
    tensors: tuple[str, ...]
    cast: torch.dtype | None


class Plans:
    """The plans, numbered, and the places of traced code. No number is used twice."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # modules are told apart by numbers of their own; traced code knows them by their ids
        self.serials: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self.modules: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
        self.next_serial = itertools.count()
        self.numbers: dict[frozenset[int], str] = {}
        self.plans: dict[str, frozenset[int]] = {}
        self.tokens: dict[tuple[Place, tuple[type, ...]], int] = {}
        self.places: list[tuple[Place, weakref.ref[nn.Module]]] = []

    def number(self, modules: Iterable[nn.Module]) -> str:
        """The number of the plan of these modules, from 1 on, as text: compilers take a number that changes for a size that may vary."""
        with self.lock:
            plan = frozenset(self._serial(module) for module in modules)
            number = self.numbers.setdefault(plan, str(len(self.numbers) + 1))
            self.plans[number] = plan
        return number

    def _serial(self, module: nn.Module) -> int:
        if module not in self.serials:
            self.serials[module] = next(self.next_serial)
        self.modules[id(module)] = module
        return self.serials[module]

    def holds(self, number: str, module: int) -> bool:
        """Whether the module of this id is in a plan."""
        found = self.modules.get(module)
        return found is not None and self.serials[found] in self.plans[number]

    def token(self, place: Place) -> int:
        """What stands in a graph for a place."""
        # True and 1 are equal as keys
        kinds = tuple(type(value) for _, value in place.constants)
        with self.lock:
            module = self.modules[place.module]
            token = self.tokens.setdefault((place._replace(module=self.serials[module]), kinds), len(self.places))
            if token == len(self.places):
                self.places.append((place, weakref.ref(module)))
        return token


plans = Plans()


# -- the operation -----------------------------------------------------------------------------------------------------


def _any(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, others: list[Tensor], token: int) -> Tensor:
    place, module = plans.places[token]
    kwargs = {**dict(place.constants), **dict(zip(place.tensors, others, strict=True))}
    casting = contextlib.nullcontext() if place.cast is None else torch.autocast(query.device.type, place.cast)
    with casting:
        output, _ = place.attention(place.name, place.plan, module(), query, key, value, mask, **kwargs)
    output = output.to(_dtype(query, token)).contiguous()
    # a graph may use the memory of its values again
    storage = output.untyped_storage()._cdata
    aliased = any(storage == each.untyped_storage()._cdata for each in (query, key, value))
    return output.clone() if aliased else output


def _fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, others: list[Tensor], token: int) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]), dtype=_dtype(query, token))


def _dtype(query: Tensor, token: int) -> torch.dtype:
    """What attention returns: under autocast the dtype of that."""
    cast = plans.places[token][0].cast
    return query.dtype if cast is None or query.dtype == torch.float64 else cast


# No `custom_op`: inside one nothing can be differentiated, which an intervention may want to do. CUDA graphs are cut at it, and all
# that is between two of these stays captured.
_library = torch.library.Library("reattend", "FRAGMENT")
_library.define(
    "any(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor[] others, int token) -> Tensor",
    tags=[torch.Tag.pt2_compliant_tag, *([torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else [])],
)
# where torch ends a graph before the operation, its body is Python that the compiler would take up anew, as traced code that calls it
_library.impl("any", uncompiled(_any), "CompositeExplicitAutograd")
torch.library.register_fake("reattend::any", _fake, lib=_library)


# -- tracing -----------------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def _holds(number: str, module: int) -> bool:
    return plans.holds(number, module)


@torch.compiler.assume_constant_result
def _token(
    attention: Attention,
    name: str,
    plan: str,
    module: int,
    constants: tuple[tuple[str, Any], ...],
    tensors: tuple[str, ...],
    device: str,
) -> int:
    cast = (
        torch.get_autocast_dtype(device)
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        else None
    )
    return plans.token(Place(attention, name, plan, module, constants, tensors, cast))


def acts_in(number: str, module: nn.Module) -> bool:
    """Whether a module is in the plan of this number, for code that is traced: a constant of it."""
    return _holds(number, id(module))


def traced(
    attention: Attention,
    name: str,
    plan: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """Attention of a module in the plan of this number, in code that is traced: output [B, Tq, H, Dv]. None where no graph can hold it.

    attention(name, plan, module, query, key, value, mask, **kwargs) -> (output, weights) is what the operation runs.
    """
    tensors = {name: each for name, each in kwargs.items() if isinstance(each, Tensor)}
    constants = {name: each for name, each in kwargs.items() if name not in tensors}
    if not all(each is None or isinstance(each, (bool, int, float, str)) for each in constants.values()):
        return None
    if not (mask is None or isinstance(mask, Tensor)):
        return None
    if torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value)):
        return None
    token = _token(attention, name, plan, id(module), tuple(constants.items()), tuple(tensors), query.device.type)
    return torch.ops.reattend.any(query, key, value, mask, list(tensors.values()), token)
