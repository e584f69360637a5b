"""A further pass of a denoiser with the arguments of the call under way: other latents, another timestep or text, chosen rows.

A ControlNet of the pipeline sees the latents that the denoiser sees: it runs again, and what it gives takes the place of what it gave.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...interventions import ReattendError
from ..sites.arguments import LISTED, rows_of
from ..sites.inputs import HIDDEN, name_in
from ..tokens.latents import Place
from ..tokens.states import parameters_of
from .prompt import without_inference


@dataclass
class Beside:
    """A call of a ControlNet: its arguments by name, and what it gave."""

    module: nn.Module
    given: dict[str, Any]
    output: Any


@dataclass
class Companions:
    """The ControlNets of a pipeline, and their calls in each thread since the last call of the denoiser that read them."""

    local: threading.local = field(default_factory=threading.local)

    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(parameters_of(module), args, strict=False)), **kwargs}
        self.local.open = Beside(module, given, None)

    def end(self, module: nn.Module, args: tuple, output: Any) -> None:
        one: Beside | None = getattr(self.local, "open", None)
        self.local.open = None
        if one is not None and one.module is module and output is not None:
            one.output = output
            # a ControlNet of several calls its parts first: only the last call is of this step where one module ran again
            self.local.calls = [*(call for call in self.calls if call.module is not module), one]

    @property
    def calls(self) -> list[Beside]:
        return getattr(self.local, "calls", [])

    def of(self, given: Mapping[str, Any], denoiser: str) -> list[Beside]:
        """The calls whose results a denoiser is given. Raises ReattendError for results that come from elsewhere."""
        found = [call for call in self.calls if _tensors(call.output) & _tensors(given)]
        known = set().union(*(_tensors(call.output) for call in found))
        for name, value in given.items():
            theirs = ("additional_residual" in name and "intrablock" not in name) or "controlnet" in name
            if theirs and not _tensors(value) <= known:
                raise ReattendError(
                    f"{name} of {denoiser} is not what a ControlNet of this pipeline gave as it is (guess_mode, or one that belongs to "
                    "another pipeline), so it could not see changed latents"
                )
        return found


def _tensors(value: Any) -> set[int]:
    """Identities of the tensors in a structure."""
    if isinstance(value, Tensor):
        return {id(value)}
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return set().union(*(_tensors(part) for part in parts))


def _pairs(old: Any, new: Any) -> list[tuple[Tensor, Tensor]]:
    if isinstance(old, Tensor):
        return [(old, new)]
    if isinstance(old, Mapping):
        return [pair for key in old for pair in _pairs(old[key], new[key])]
    if isinstance(old, (list, tuple)):
        return [pair for a, b in zip(old, new, strict=True) for pair in _pairs(a, b)]
    return []


def taken(value: Any, name: str, kind: str, batch: int, rows: Sequence[int] | None, instead: Mapping[int, Tensor]) -> Any:
    """An argument of a module class for these rows of its batch (None = as it is), with these tensors in the place of others (by identity).

    Raises ReattendError for a tensor of which it is not known whether it has an entry for each row.
    """
    if isinstance(value, Mapping):
        return {key: taken(item, str(key) or name, kind, batch, rows, instead) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if name in LISTED and len(value) == batch and rows is not None:
            return type(value)(value[row] for row in rows)
        return type(value)(taken(item, name, kind, batch, rows, instead) for item in value)
    if not isinstance(value, Tensor) or id(value) in instead:
        return instead.get(id(value), value)
    value = without_inference(value)
    if rows is None or value.dim() == 0:
        return value
    how = rows_of(kind, name)
    axis = 1 if how == "second" else 0
    size = value.shape[axis] if value.dim() > axis else 0
    if how == "shared" or (how and size == 1):
        return value
    if not how or not size or size % batch or (size != batch and how != "folded"):
        raise ReattendError(
            f"which entries of the argument {name} {tuple(value.shape)} of {kind} belong to which of its {batch} rows is not known, so a "
            "further pass cannot take some of them: leave the argument out, or take all rows"
        )
    fold = size // batch
    index = [row * fold + number for row in rows for number in range(fold)]
    return value.index_select(axis, torch.tensor(index, device=value.device))


@dataclass
class Further:
    """What a further pass changes. latents [B, ...]: scaled, of the input's dtype; rows: of the batch, None = all of them; timestep: in the
    denoiser's own units, None = the call's; text: arguments by name, those in a dictionary beside the call's others there."""

    place: Place
    latents: Tensor
    rows: Sequence[int] | None = None
    timestep: float | None = None
    text: Mapping[str, Any] = field(default_factory=dict)

    def arguments(
        self, kind: str, given: Mapping[str, Any], companions: Sequence[Beside], *, real: bool = False
    ) -> dict[str, Any]:
        """The arguments of a denoiser class, by name; ControlNets have run again. real: for the pass that counts, in the place of the
        call's."""
        name = name_in(given, HIDDEN)
        hidden: Tensor = given[name]
        instead: dict[int, Tensor] = {}
        for one in companions:
            output = self._run(one, hidden)
            instead |= {id(old): new for old, new in _pairs(one.output, output)}
            if real:
                one.output = output
        return self._changed(kind, given, name, hidden, self.place, instead)

    def _run(self, one: Beside, hidden: Tensor) -> Any:
        name = name_in(one.given, HIDDEN)
        own = one.given.get(name)
        bare = isinstance(own, Tensor) and own.shape[1:] == self.latents.shape[1:]
        if not isinstance(own, Tensor) or len(own) != len(hidden) or not (bare or own.shape == hidden.shape):
            shape = tuple(own.shape) if isinstance(own, Tensor) else type(own).__name__
            raise ReattendError(
                f"{type(one.module).__name__} was given {shape}, which is not the denoiser's batch of latents {tuple(hidden.shape)}, so "
                "it could not see changed latents"
            )
        place = Place(self.place.parts) if bare else self.place
        return one.module(**self._changed(type(one.module).__name__, one.given, name, own, place, {}))

    def _changed(
        self, kind: str, given: Mapping[str, Any], name: str, hidden: Tensor, place: Place, instead: Mapping[int, Tensor]
    ) -> dict[str, Any]:
        batch = len(hidden)
        arguments = {key: taken(value, key, kind, batch, self.rows, instead) for key, value in given.items()}
        rows = batch if self.rows is None else len(self.rows)
        place = Place(rows // len(self.latents), place.cuts)
        arguments[name] = place.put(arguments[name], self.latents)
        timestep = arguments.get("timestep")
        if self.timestep is not None:
            arguments["timestep"] = torch.full_like(timestep, self.timestep) if isinstance(timestep, Tensor) else self.timestep
        for key, value in self.text.items():
            if key in arguments:
                arguments[key] = _instead(key, arguments[key], value)
        return arguments


def _instead(name: str, before: Any, value: Any) -> Any:
    """A text argument in the place of the call's. Raises ReattendError for one of another kind, number of rows or width."""
    if isinstance(before, Mapping) and isinstance(value, Mapping):
        return {**before, **{key: _instead(f"{name}.{key}", before.get(key), item) for key, item in value.items()}}
    if not isinstance(before, Tensor):
        return value
    # a text may be longer or shorter
    wanted = list(before.shape[:1] + before.shape[2:]) if before.dim() > 2 else list(before.shape[:1])
    found = value.shape if isinstance(value, Tensor) else ()
    if len(found) != before.dim() or list(found[:1] + found[2:] if before.dim() > 2 else found[:1]) != wanted:
        got = tuple(found) if isinstance(value, Tensor) else type(value).__name__
        raise ReattendError(
            f"the text argument {name} of a further pass must have {len(before)} rows and the shape {tuple(before.shape)}, but for its "
            f"length, got {got}"
        )
    return value
