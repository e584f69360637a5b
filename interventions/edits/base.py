"""What all edits share: which heads and rows they name, how their tensors broadcast, and the rows they are applied to."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import ReattendError
from .row_values import tell, values_of

Columns = Tensor | Sequence[int]
E = TypeVar("E", bound="Edit")
READS = ("", "heads", "batch", "both")
# What is made for calls of a size is kept for so many sizes: an edit that lives longer than a step meets a longer cache in each.
KEPT = 8


class Shape(NamedTuple):
    """The sizes of a call that tensors of its edits have to fit. keys: None where an edit of operands merges columns."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int | None


@dataclass
class Rows:
    """A chunk of query rows of one call (or of a group of its heads), as the formulas of edits see it.

    index [R] long: the rows. visible: bool, broadcastable to [B, H, R, Tk], or None when every key is visible.
    query [B, H, Tq, D], key and value [B, Hkv, Tk, *] are the whole operands. offset: the key column of query row 0's own token,
    None where an operand edit has merged columns. appended: columns at the end that an operand edit added. mask, is_causal: as in `Call`.
    """

    index: Tensor
    visible: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    offset: int | None
    appended: int = 0
    mask: Tensor | None = None
    is_causal: bool = False

    @property
    def own(self) -> Tensor:
        """[R] long: the key column of each row's own token."""
        if self.offset is None:
            raise ReattendError("an edit needs each row's own column, but PoolKV has merged the columns of this call")
        return self.index + self.offset

    def columns(self, columns: Columns) -> Tensor:
        """A column set as bool [B, H, 1, Tk] (1 where shared). Columns that were appended belong to no set."""
        return self.padded(column_mask(columns, self.key.shape[2] - self.appended, self.key.device))[:, :, None]

    def padded(self, per_column: Tensor) -> Tensor:
        """Adds False or 0 for appended columns on the last axis."""
        return torch.nn.functional.pad(per_column, (0, self.appended)) if self.appended else per_column


@dataclass(frozen=True, eq=False, kw_only=True)
class Edit:
    """A declarative change of one call's attention.

    heads: query heads of the whole model it applies to (None = all). rows: bool [Tq] or [B, Tq] (or [B, 1] to choose batch
    rows), None = all. Tensors broadcast over leading axes: [Tk], [B, Tk] and [B, heads, Tk] are all right for a column set.
    reads: how far an edit looks beyond its own head and batch row. "heads": its formula is given all heads that it names at once, in
    the order named; "batch": all rows of the batch; "both". "" (most edits): it may be given any heads and batch rows alone.
    """

    heads: Sequence[int] | None = None
    rows: Tensor | None = None

    level: ClassVar[str] = ""
    reads: ClassVar[str] = ""
    # name -> number of trailing axes; the two axes before them are batch and heads
    broadcast: ClassVar[dict[str, int]] = {}
    # the same for tensors of columns or groups by number (a long tensor in `broadcast` is one list of columns)
    indices: ClassVar[dict[str, int]] = {}
    # those of these tensors whose first trailing axis is that of the query rows, whose last one is that of the keys, and whose axis of
    # heads may also be that of the key heads (where the edit names no heads)
    per_row: ClassVar[tuple[str, ...]] = ()
    per_column: ClassVar[tuple[str, ...]] = ()
    per_key_head: ClassVar[tuple[str, ...]] = ()
    # further fields that have an axis of batch rows, the first one
    batched: ClassVar[tuple[str, ...]] = ()
    # whether the formula asks q, k and v for more than their sizes: they are then cut to the heads that the edit names
    reads_operands: ClassVar[bool] = True
    # whether it may be made for some rows of the batch alone, where its tensors show what belongs to which row
    splits_batch: ClassVar[bool] = True
    # whether its formula is of all query rows at once (edits of outputs only)
    reads_rows: ClassVar[bool] = False
    # whether the output before it means nothing to it (edits of outputs only)
    replaces: ClassVar[bool] = False
    # whether it stands for something else than exact attention under a stated edit
    approximate: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.heads is not None:
            heads = tuple(int(h) for h in self.heads)
            if any(h < 0 for h in heads) or len(set(heads)) != len(heads):
                raise ReattendError(f"heads must be distinct and not negative, got {list(heads)}")
            object.__setattr__(self, "heads", heads)
        if self.rows is not None:
            if self.rows.dtype != torch.bool or self.rows.dim() not in (1, 2):
                raise ReattendError("rows must be a bool tensor [queries] or [batch, queries]")
            if self.rows.dim() == 1:
                object.__setattr__(self, "rows", self.rows[None])
        for name, value in self.tensors():
            value = lead(value, self.broadcast.get(name) or self.indices.get(name, 0), name)
            object.__setattr__(self, name, value)
            if self.heads and value.shape[1] not in (1, len(self.heads)):
                raise ReattendError(
                    f"{name} has values for {value.shape[1]} heads, but the edit names {len(self.heads)} (heads={list(self.heads)}): "
                    f"give {len(self.heads)}, or 1 for all of them"
                )
        if self.reads not in READS:
            raise ReattendError(f"reads must be one of {', '.join(map(repr, READS))}, got {self.reads!r}")

    @property
    def reads_heads(self) -> bool:
        return self.reads in ("heads", "both")

    @property
    def reads_batch(self) -> bool:
        return self.reads in ("batch", "both")

    def check_shapes(self, shape: Shape) -> None:
        """Raises ReattendError for tensors that are made for other batch rows, heads, query rows or keys than a call's.

        Looked at once, however many layers share the edit.
        """
        self.remember_size("shapes", shape, lambda: self._check_shapes(shape))

    def _check_shapes(self, shape: Shape) -> None:
        heads = shape.heads if self.heads is None else len(self.heads)
        if self.rows is not None:
            self._check_size("rows", self.rows, 0, shape.batch, "batch rows")
            self._check_size("rows", self.rows, 1, shape.queries, "query rows")
        for name, value in self.tensors():
            self._check_size(name, value, 0, shape.batch, "batch rows")
            if name not in self.per_key_head or self.heads is not None or value.shape[1] != shape.kv_heads:
                self._check_size(name, value, 1, heads, "heads")
            if name in self.per_row:
                self._check_size(name, value, 2, shape.queries, "query rows")
            if name in self.per_column and shape.keys is not None:
                self._check_size(name, value, -1, shape.keys, "keys")

    def _check_size(self, name: str, value: Tensor, axis: int, wanted: int, what: str) -> None:
        if value.shape[axis] not in (1, wanted):
            raise ReattendError(
                f"{name} of {type(self).__name__} has values for {value.shape[axis]} {what}, this call has {wanted}: give {wanted} "
                f"(or 1 for all); its shape is {list(value.shape)}"
            )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of `broadcast` and `indices`, each with the axes batch and heads first."""
        for name in (*self.broadcast, *self.indices):
            value = getattr(self, name)
            if isinstance(value, Tensor) and (value.dtype != torch.long or name in self.indices):
                yield name, value

    def fitted(self: E, heads: int, kv_heads: int) -> E:
        """The same edit, told how many query heads a call has for its key heads, where it holds tensors per key head."""
        if self.heads is not None or heads == kv_heads or not self._is_per_key_head(kv_heads):
            return self

        def told() -> E:
            new = self._copy()
            object.__setattr__(new, "_call_heads", (heads, kv_heads))
            return new

        return told() if self._needs_gradient() else self.remember(("fitted", heads, kv_heads), told)

    def _is_per_key_head(self, kv_heads: int) -> bool:
        return any(name in self.per_key_head and value.shape[1] == kv_heads for name, value in self.tensors())

    @property
    def is_identity(self) -> bool:
        """True where the edit provably changes nothing (strength 0): it is then dropped, so outputs stay bit-identical."""
        return self.heads is not None and len(self.heads) == 0

    def at_heads(self, positions: Sequence[int]) -> Edit:
        """The same edit with its per-head tensors cut to these positions of its own head list."""
        if self.heads is None and not self._has_head_axis():
            return self
        if self._needs_gradient():
            return self._cut(positions)  # a cut that is kept would belong to one backward pass
        return self.remember(("heads", tuple(positions)), lambda: self._cut(positions))

    def on_heads(self: E, heads: Sequence[int] | None) -> E:
        """The same edit for other heads, whose tensors all heads share; made once for each list of heads."""
        heads = None if heads is None else tuple(heads)
        return self if heads == self.heads else self.remember(("on", heads), lambda: self._renamed(heads))

    def on_every_head(self, count: int) -> Edit:
        """The same edit on all `count` heads, where nobody looks at what it makes of those that it does not name."""
        if self.heads is None:
            return self
        if self._has_head_axis():
            return self.at_heads([self.heads.index(head) if head in self.heads else 0 for head in range(count)])
        # layers that share it but for their heads share this one too
        store = self.of_any_heads
        if "every head" not in store:
            whole = self._copy(heads=None)
            store["every head"] = whole if self.lasts is None else whole.lasting(self.lasts)
        return store["every head"]

    def _renamed(self: E, heads: tuple[int, ...] | None) -> E:
        store = self.of_any_heads
        if "has an axis of heads" not in store:
            store["has an axis of heads"] = self._has_head_axis()
        if store["has an axis of heads"]:
            raise ReattendError(
                f"this {type(self).__name__} has a tensor with an axis of heads, which belongs to heads {self.heads}"
            )
        # of the same tensors
        return self._copy(heads=heads, _of_any_heads=store, _counted=self._counted)

    @property
    def of_any_heads(self) -> dict[Any, Any]:
        """What has been found that holds for the edit on whatever heads, with its copies `on_heads` too; for as long as `remember` keeps."""
        store = self.__dict__.get("_of_any_heads")
        if store is None:
            store = {}
            object.__setattr__(self, "_of_any_heads", store)
        state = versions([self])
        if store.get("versions") != state:
            store.clear()
            store["versions"] = state
        return store

    def _copy(self: E, **changes: Any) -> E:
        """The same edit with other values in some fields, which are not looked at again."""
        kind, own = type(self), self.__dict__
        new = object.__new__(kind)
        values = new.__dict__
        for name in _field_names(kind):
            values[name] = own[name]
        values.update(changes)
        return new

    def lasting(self: E, store: dict[Any, Any]) -> E:
        """The same edit, which is made anew at every step of an answer but for the columns that were generated since, which it does not
        mean: what is worked out of its columns is kept in `store` for the next step.
        """
        object.__setattr__(self, "_lasting", store)
        return self

    @property
    def lasts(self) -> dict[Any, Any] | None:
        return self.__dict__.get("_lasting")

    def remember(self, key: object, make: Callable[[], Any]) -> Any:
        """make(), kept with this edit: recipes share one edit between the layers of a step, so what follows from it is found once.

        It is found anew where a tensor of the edit has been changed in place, as optimisers do.
        """
        state, kept = versions([self]), self.__dict__.get("_remembered")
        if kept is None or kept[0] != state:
            kept = state, {}
            object.__setattr__(self, "_remembered", kept)
        store = kept[1]
        if key not in store:
            store[key] = make()
        return store[key]

    def remember_size(self, key: object, size: object, make: Callable[[], Any]) -> Any:
        """`remember` for what depends on the size of a call, which is kept for few sizes."""
        return kept_few(self.remember(key, dict), size, make)

    @functools.cached_property
    def _counted(self) -> tuple[Tensor, ...]:
        """Its tensors, those of its parts too, that count how often they are changed in place."""
        fields = [self.__dict__[name] for name in _field_names(type(self))]
        parts = [value for field in fields for value in (field, *getattr(field, "__dict__", {}).values())]
        return tuple(part for part in parts if isinstance(part, Tensor) and not part.is_inference())

    def _has_head_axis(self) -> bool:
        return any(value.shape[1] > 1 for _, value in self.tensors())

    def _needs_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(value.requires_grad for _, value in self.tensors())

    def _cut(self: E, positions: Sequence[int]) -> E:
        heads, kv_heads = getattr(self, "_call_heads", (0, 0))
        changes = {}
        for name, value in self.tensors():
            if value.shape[1] > 1:
                shared = name in self.per_key_head and value.shape[1] == kv_heads
                chosen = tuple(key_heads(positions, heads // kv_heads) if shared else positions)
                if chosen != tuple(range(value.shape[1])):
                    changes[name] = value.index_select(1, heads_index(chosen, value.device))
        new = self._copy(heads=None, **changes)
        return new if self.lasts is None else new.lasting(self.lasts.setdefault(("heads", tuple(positions)), {}))

    def can_split_batch(self, batch: int) -> bool:
        """Whether `at_batch` gives the same edit, which names its batch rows."""
        return self.rows is not None and self.rows.shape[0] == batch and self.knows_rows

    @property
    def knows_rows(self) -> bool:
        """Whether everything that it holds tells which batch rows it belongs to."""
        if not self.splits_batch or self.reads_batch:
            return False
        known = ("rows", *self.broadcast, *self.indices, *self.batched)
        return not any(isinstance(getattr(self, f.name), Tensor) for f in dataclasses.fields(self) if f.name not in known)

    def at_batch(self: E, index: Tensor) -> E:
        """The same edit for these rows of the batch, `index` [n] long."""
        names = ("rows", *(name for name, _ in self.tensors()), *self.batched)
        values = {name: getattr(self, name) for name in names}
        new = self._copy(**{name: batch_rows(value, index) for name, value in values.items() if value is not None})
        rows = self.rows
        if rows is not None and new.rows is not None and rows.shape[0] > 1:
            tell(new.rows, lambda: values_of(rows)[values_of(index)])
        return new

    def chosen(self, rows: Rows) -> Tensor | None:
        """Bool [B, 1, R, 1]: the rows of this chunk that the edit names; None for all."""
        if self.rows is None:
            return None
        chosen = self.rows if self.rows.shape[1] == 1 else self.rows[:, rows.index]
        return chosen[:, None, :, None]


def versions(edits: Sequence[Edit]) -> tuple[int, ...]:
    """What changes where a tensor of one of these edits is changed in place."""
    state: tuple[int, ...] = ()
    for edit in edits:
        for tensor in edit._counted:
            state += (tensor._version,)
    return state


def kept_few(store: dict[Any, Any], key: object, make: Callable[[], Any]) -> Any:
    """make(), kept for as many keys as `KEPT`. Threads share the store: what one of them takes may be gone for the next."""
    found = store.get(key, store)
    if found is store:
        if len(store) >= KEPT:
            store.clear()
        found = store[key] = make()
    return found


@functools.lru_cache(maxsize=256)
def _field_names(kind: type[Edit]) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(kind))


def batch_rows(value: Any, index: Tensor) -> Any:
    """A tensor [B, ...], or what knows how to cut itself (`at_batch`), for these rows of the batch; what all rows share stays."""
    if isinstance(value, Tensor):
        return value[index] if value.shape[0] > 1 else value
    return value.at_batch(index)


@functools.lru_cache(maxsize=1024)
def heads_index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """The heads as a tensor on the device, made once: every layer asks for its own at every step."""
    with torch.inference_mode(False):  # kept longer than the pass that makes it
        return torch.tensor(heads, device=device)


@functools.lru_cache(maxsize=1024)
def heads_mask(heads: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """Bool [1, count]: these of `count` heads; made once, as `heads_index`."""
    named = torch.zeros(1, count, dtype=torch.bool)
    named[0, list(heads)] = True
    with torch.inference_mode(False):
        return named.clone().to(device)


def key_heads(heads: Sequence[int], shared: int) -> list[int]:
    """Key heads for some query heads such that query head i of them reads key head i // (len(heads) / len(key heads)) of the list."""
    own = [head // shared for head in heads]
    found = list(dict.fromkeys(own))
    times = len(own) // len(found)
    return found if own == [head for head in found for _ in range(times)] else own


def lead(value: Tensor, trailing: int, name: str) -> Tensor:
    """Adds the missing batch and head axes in front: [*t] -> [1, 1, *t], [B, *t] -> [B, 1, *t]."""
    missing = trailing + 2 - value.dim()
    if missing < 0 or missing > 2:
        raise ReattendError(f"{name} must have {trailing} to {trailing + 2} dimensions, got shape {tuple(value.shape)}")
    if missing == 2:
        return value[None, None]
    return value[:, None] if missing == 1 else value


def check_number(name: str, value: float | Tensor, low: float = -math.inf, high: float = math.inf) -> None:
    """Raises ReattendError unless low <= value <= high and finite. Tensors on an accelerator are not read (that would stall it)."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or value.numel() == 0:
            return
        smallest, largest = value.min().item(), value.max().item()
        ok = math.isfinite(smallest) and math.isfinite(largest) and low <= smallest and largest <= high
    else:
        ok = isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high
    if not ok:
        raise ReattendError(f"{name} must be finite and in [{low}, {high}], got {value}")


def as_columns(name: str, columns: Columns) -> Tensor:
    """Column sets are bool tensors [..., Tk] or a list of column indices (kept as a long tensor until Tk is known)."""
    if isinstance(columns, Tensor) and columns.dtype == torch.bool:
        return columns
    index = torch.as_tensor(columns, dtype=torch.long) if not isinstance(columns, Tensor) else columns
    if index.dim() != 1 or index.dtype != torch.long:
        raise ReattendError(f"{name} must be a bool tensor [..., keys] or a list of column indices")
    return index


def column_mask(columns: Columns, num_keys: int, device: torch.device) -> Tensor:
    """Bool [B, H, Tk] (1 where shared) from a column set; columns beyond the keys are an error."""
    columns = as_columns("a column set", columns)
    if columns.dtype == torch.bool:
        if columns.shape[-1] != num_keys:
            raise ReattendError(f"a column set has {columns.shape[-1]} columns, the call has {num_keys} keys")
        return columns.to(device)
    if columns.numel() and (int(columns.max()) >= num_keys or int(columns.min()) < 0):
        raise ReattendError(f"column {int(columns.max())} is outside the {num_keys} keys of the call")
    mask = torch.zeros(num_keys, dtype=torch.bool, device=device)
    mask[columns.to(device)] = True
    return mask[None, None]


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, Hkv, ...] -> [B, H, ...]: key/value heads repeated for the query heads that share them."""
    times = num_heads // x.shape[1]
    return x if times == 1 else x.repeat_interleave(times, dim=1)
