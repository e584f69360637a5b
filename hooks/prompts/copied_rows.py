"""A denoiser's arguments with copies of some rows of their batch at the end, and with other texts in these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...interventions import ReattendError
from ..sites.arguments import LISTED, rows_of


@dataclass
class Copies:
    """Copies of these rows of a batch, for one branch. given: arguments that are others in them, by name, groups by name again."""

    name: str
    rows: list[int]
    given: Mapping[str, Any] = field(default_factory=dict)


class _Grower:
    def __init__(self, kind: str, batch: int, copies: Sequence[Copies]) -> None:
        self.kind, self.batch, self.copies = kind, batch, copies
        self.rows = [row for each in copies for row in each.rows]
        # (branch, path) of what was given and has found its argument
        self.found: set[tuple[str, str]] = set()
        self.indices: dict[Any, Tensor] = {}

    def argument(self, value: Any, path: str) -> Any:
        """One argument, or one entry of an argument that holds further ones by name, grown."""
        name = path.rpartition(".")[2]
        if isinstance(value, Mapping):
            if not any(isinstance(item, (Tensor, list, tuple, Mapping)) for item in value.values()):
                return value
            # residuals of a ControlNet may come by the number of their block
            return type(value)(
                {key: self.argument(item, f"{path}.{key}" if isinstance(key, str) else path) for key, item in value.items()}  # type: ignore[call-arg]
            )
        if isinstance(value, (list, tuple)):
            if name in LISTED and len(value) == self.batch:
                return type(value)([*value, *(value[row] for row in self.rows)])
            return type(value)([self.argument(item, path) for item in value])
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        return self._tensor(value, name, path)

    def _tensor(self, value: Tensor, name: str, path: str) -> Tensor:
        how = rows_of(self.kind, name)
        others = [self._given(each, path) for each in self.copies]
        if not how:
            raise ReattendError(
                f"{self._who()}: whether the argument {path} {tuple(value.shape)} of {self.kind} has an entry for each row of the batch "
                "is not known, so rows cannot be added to this call: leave the argument out"
            )
        if how == "shared":
            self._only_copies(others, path, "is one for all rows of the batch")
            return value
        axis = 1 if how == "second" else 0
        size = value.shape[axis] if value.dim() > axis else 0
        if size == 1 and self.batch > 1:
            if not any(other is not None for other in others):
                return value
            value, size = value.expand(*value.shape[:axis], self.batch, *value.shape[axis + 1 :]), self.batch
        if not size or size % self.batch or (size != self.batch and how != "folded"):
            raise ReattendError(
                f"{self._who()}: the argument {path} of {self.kind} should have {self.batch} rows along dimension {axis}, one for each of "
                f"the batch, got {tuple(value.shape)}"
            )
        fold = size // self.batch
        if not any(other is not None for other in others):
            return torch.cat([value, value.index_select(axis, self._index(self.rows, fold, value.device))], dim=axis)
        parts = []
        for each, other in zip(self.copies, others, strict=True):
            if other is None:
                parts.append(value.index_select(axis, self._index(each.rows, fold, value.device)))
            else:
                parts.append(self._fitted(each, other, value, fold, axis, path))
        return torch.cat([value, *parts], dim=axis)

    def _given(self, copies: Copies, path: str) -> Tensor | None:
        given: Any = copies.given
        for part in path.split("."):
            given = given.get(part) if isinstance(given, Mapping) else None
        if given is None:
            return None
        if not isinstance(given, Tensor):
            raise ReattendError(
                f"guide {copies.name!r}: the argument {path} of its branch must be a tensor, got {type(given).__name__}"
            )
        self.found.add((copies.name, path))
        return given

    def _only_copies(self, others: Sequence[Tensor | None], path: str, why: str) -> None:
        for each, other in zip(self.copies, others, strict=True):
            if other is not None:
                raise ReattendError(
                    f"guide {each.name!r}: the argument {path} of {self.kind} {why}, so a branch has none of its own"
                )

    def _fitted(self, copies: Copies, other: Tensor, value: Tensor, fold: int, axis: int, path: str) -> Tensor:
        """A branch's own argument with as many rows as it has, in the shape of the others'."""
        wanted = [*value.shape[:axis], len(copies.rows) * fold, *value.shape[axis + 1 :]]
        if other.dim() != value.dim() or not other.shape[axis] or wanted[axis] % other.shape[axis]:
            fits = False
        else:
            fits = [*other.shape[:axis], wanted[axis], *other.shape[axis + 1 :]] == wanted
        if not fits:
            raise ReattendError(
                f"guide {copies.name!r}: the argument {path} of its branch must have the shape {tuple(wanted)}, or fewer rows of which each "
                f"stands for the same number, got {tuple(other.shape)}: two texts in one batch are padded to one length"
            )
        return other.to(value).repeat_interleave(wanted[axis] // other.shape[axis], dim=axis)

    def _index(self, rows: Sequence[int], fold: int, device: torch.device) -> Tensor:
        """The entries of these rows, `fold` for each; made once a pass on each device."""
        key = (tuple(rows), fold, device)
        if key not in self.indices:
            self.indices[key] = torch.tensor([row * fold + i for row in rows for i in range(fold)], device=device)
        return self.indices[key]

    def unused(self) -> str:
        """What was given for a branch and is no argument of this call, or ""."""
        for each in self.copies:
            for path in _paths(each.given):
                if (each.name, path) not in self.found:
                    return f"guide {each.name!r}: its branch has an argument {path} of its own, but this call of {self.kind} has none"
        return ""

    def _who(self) -> str:
        return f"guide {self.copies[0].name!r}"


def grown(
    kind: str, args: tuple, kwargs: Mapping[str, Any], names: Sequence[str], batch: int, copies: Sequence[Copies]
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call of a denoiser class with the copies of rows at the end of the batch.

    Raises ReattendError for an argument of which it is not known whether it has an entry for each row, or that has another number of
    rows, and for arguments of a branch that do not fit.
    """
    grower = _Grower(kind, batch, copies)
    args = tuple(grower.argument(value, names[i] if i < len(names) else f"argument {i}") for i, value in enumerate(args))
    kwargs = {name: grower.argument(value, name) for name, value in kwargs.items()}
    unused = grower.unused()
    if unused:
        raise ReattendError(unused)
    return args, kwargs


def _paths(given: Mapping[str, Any], before: str = "") -> list[str]:
    """Dotted names of all that is given."""
    found: list[str] = []
    for name, value in given.items():
        found += _paths(value, f"{before}{name}.") if isinstance(value, Mapping) else [f"{before}{name}"]
    return found
