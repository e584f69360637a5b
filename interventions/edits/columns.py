"""Edits that give a call other keys and values, or other columns: replaced, appended, merged, reordered."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ReattendError
from .base import Shape, repeat_heads
from .operands import OperandEdit, Operands


def _check_pair(key: Tensor | None, value: Tensor | None, count: int | None) -> None:
    given = [(name, t) for name, t in (("key", key), ("value", value)) if t is not None]
    wanted = "m" if count is None else str(count)
    for name, t in given:
        if t.dim() != 4 or (count is not None and t.shape[2] != count) or t.shape[2] != given[0][1].shape[2]:
            raise ReattendError(
                f"{name} must be [batch, key heads, {wanted}, dim] for {wanted} columns, got shape {list(t.shape)}"
            )


def _check_within(name: str, columns: Tensor, keys: int) -> None:
    """Raises ReattendError for columns beyond the keys. Values on an accelerator are not read."""
    if columns.device.type == "cpu" and columns.numel():
        least, most = (int(x) for x in columns.aminmax())
        if least < 0 or most >= keys:
            raise ReattendError(f"{name} names column {least if least < 0 else most}, outside the {keys} keys of the call")


def _wide(index: Tensor, x: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """(index [B, heads, m], key, value) with a head of keys for each list of the index; shared lists serve every head as it is."""
    key, value = x.key, x.value
    if index.shape[1] > key.shape[1]:
        key, value = repeat_heads(key, index.shape[1]), repeat_heads(value, index.shape[1])
    return index.to(key.device).expand(key.shape[0], key.shape[1], -1), key, value


def _per_head(given: Tensor, own: Tensor) -> Tensor:
    """Keys or values of an edit for the heads of the call's, which another edit may have given to each query head alone."""
    given = repeat_heads(given, own.shape[1]) if given.shape[1] > 1 else given
    return given.to(own.dtype).expand(*own.shape[:2], -1, -1)


@dataclass(frozen=True, eq=False, kw_only=True)
class ReplaceKV(OperandEdit):
    """k_j = key, v_j = value for j in `columns`: other keys and/or values at some columns.

    columns long [m], [B, m] or [B, heads, m] (of query heads, or of key heads where the edit names no heads), each column once. key
    [B or 1, Hkv or 1, m, D] and value [B or 1, Hkv or 1, m, Dv], or None for one of them.
    """

    columns: Tensor
    key: Tensor | None = None
    value: Tensor | None = None
    indices = {"columns": 1}
    per_key_head = ("columns",)
    batched = ("key", "value")

    def __post_init__(self) -> None:
        if self.columns.dtype != torch.long:
            raise ReattendError("columns must be a long tensor of key columns, [m], [batch, m] or [batch, heads, m]")
        super().__post_init__()
        if self.key is None and self.value is None:
            raise ReattendError("ReplaceKV needs key, value or both")
        _check_pair(self.key, self.value, self.columns.shape[2])

    def _check_shapes(self, shape: Shape) -> None:
        super()._check_shapes(shape)
        if shape.keys is not None:
            _check_within("columns", self.columns, shape.keys)

    @property
    def is_identity(self) -> bool:
        return super().is_identity or self.columns.numel() == 0

    def on_operands(self, x: Operands) -> Operands:
        index, *old = _wide(self.columns, x)
        new = []
        for own, given in zip(old, (self.key, self.value), strict=True):
            if given is not None:
                place = index[..., None].expand(-1, -1, -1, own.shape[3])
                own = own.scatter(2, place, _per_head(given, own))
            new.append(own)
        return dataclasses.replace(x, key=new[0], value=new[1])


@dataclass(frozen=True, eq=False, kw_only=True)
class AppendKV(OperandEdit):
    """[K; key], [V; value]: m more columns at the end, seen by the rows that the edit names where `visible` says so.

    key [B or 1, Hkv or 1, m, D], value [B or 1, Hkv or 1, m, Dv]. visible bool [..., Tq or 1, m], None = all of them. Rows that see none of
    them (or are not named) attend as before.
    """

    key: Tensor
    value: Tensor
    visible: Tensor | None = None
    broadcast = {"visible": 2}
    per_row = ("visible",)
    batched = ("key", "value")
    tells_rows = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key.dim() != 4 or self.value.dim() != 4 or self.key.shape[:3] != self.value.shape[:3]:
            raise ReattendError("key and value must be [batch, key heads, m, dim] with the same m")
        if self.visible is not None and (
            self.visible.dtype != torch.bool or self.visible.shape[3] not in (1, self.key.shape[2])
        ):
            raise ReattendError(
                f"visible must be bool [..., queries, {self.key.shape[2]}], got shape {list(self.visible.shape)}"
            )

    @property
    def is_identity(self) -> bool:
        return super().is_identity or self.key.shape[2] == 0

    def for_all_heads(self, count: int) -> AppendKV:
        """The same for all heads of a call, `count` of them: those that are not named have the columns too, and see none of them."""
        if self.heads is None:
            return self

        def widened() -> AppendKV:
            own = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.key.device) if self.visible is None else self.visible
            sight = own.new_zeros(own.shape[0], count, *own.shape[2:])
            sight[:, list(self.heads or ())] = own
            return self._copy(heads=None, visible=sight)

        return self.remember(("for all heads", count), widened)

    def _sight(self) -> Tensor | None:
        """Bool [B or 1, heads or 1, Tq or 1, m or 1]: who sees the new columns; None where all do."""
        sight = self.visible
        rows = None if self.rows is None else self.rows[:, None, :, None]
        if rows is not None and not (rows.device.type == "cpu" and bool(rows.all())):
            sight = rows if sight is None else sight & rows
        return sight

    def on_operands(self, x: Operands) -> Operands:
        mask, sight, extra = x.dense_mask(), self._sight(), self.key.shape[2]
        if mask is None and sight is not None:
            mask = torch.ones(1, 1, 1, x.key.shape[2], dtype=torch.bool, device=x.key.device)
        if mask is not None:
            sight = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=mask.device) if sight is None else sight
            lead = [max(a, b) for a, b in zip(mask.shape[:3], sight.shape[:3])]
            sight = sight.expand(*lead, extra)
            if mask.dtype != torch.bool:
                sight = torch.zeros(sight.shape, dtype=mask.dtype, device=mask.device).masked_fill_(~sight, float("-inf"))
            mask = torch.cat([mask.expand(*lead, x.key.shape[2]), sight], dim=3)
        key, value = (
            torch.cat([own, _per_head(given, own)], dim=2) for own, given in ((x.key, self.key), (x.value, self.value))
        )
        return dataclasses.replace(x, key=key, value=value, mask=mask, is_causal=False, appended=x.appended + extra)


@dataclass(frozen=True, eq=False, kw_only=True)
class PoolKV(OperandEdit):
    """k_g, v_g = means over the columns of group g, standing for `size` keys: S[:, g] += log size.

    groups long [Tk], [B, Tk] or [B, heads, Tk] (of query heads, or of key heads where the edit names no heads): group of each column,
    numbered 0..m-1 in the order the pooled columns shall have. A row sees a pooled column only when it sees all its members (so causality
    holds); a row that sees no complete group is an error.
    """

    groups: Tensor
    indices = {"groups": 1}
    per_key_head = ("groups",)

    def __post_init__(self) -> None:
        if self.groups.dtype != torch.long:
            raise ReattendError(
                "groups must be a long tensor, one group number per key: [keys], [batch, keys] or [batch, heads, keys]"
            )
        super().__post_init__()
        if self.groups.device.type == "cpu" and self.groups.numel() and int(self.groups.min()) < 0:
            raise ReattendError(f"groups are numbered from 0, got {int(self.groups.min())}")

    @property
    def is_identity(self) -> bool:
        return super().is_identity or bool((self.groups == torch.arange(self.groups.shape[2], device=self.groups.device)).all())

    def on_operands(self, x: Operands) -> Operands:
        if self.groups.shape[2] != x.key.shape[2]:
            raise ReattendError(f"groups names {self.groups.shape[2]} columns, the call has {x.key.shape[2]} keys")
        exact = torch.float64 if x.key.dtype == torch.float64 else torch.float32
        count = int(self.groups.max()) + 1
        groups = self.groups.to(x.key.device)
        size = torch.zeros(*groups.shape[:2], count, dtype=exact, device=groups.device)
        size.scatter_add_(2, groups, torch.ones(groups.shape, dtype=exact, device=groups.device))

        index, *operands = _wide(groups, x)
        means = []
        for own in operands:
            total = torch.zeros(*own.shape[:2], count, own.shape[3], dtype=exact, device=own.device)
            total = total.scatter_add(2, index[..., None].expand(-1, -1, -1, own.shape[3]), own.to(exact))
            divisor = size.clamp_min(1)
            divisor = divisor if divisor.shape[1] in (1, own.shape[1]) else repeat_heads(divisor, own.shape[1])
            means.append((total / divisor[..., None]).to(own.dtype))
        # groups that other heads or batch rows have, and these do not, are hidden
        bias = size.log()[:, :, None]
        bias = bias if bias.shape[1] == 1 else repeat_heads(bias, x.query.shape[1])
        mask = x.dense_mask()
        if mask is not None:
            bias = self._seen(bias, mask, groups, size)
        return dataclasses.replace(x, key=means[0], value=means[1], mask=bias.to(x.query.dtype), is_causal=False, offset=None)

    def _seen(self, bias: Tensor, mask: Tensor, groups: Tensor, size: Tensor) -> Tensor:
        """The bias where a row sees all members of a group, -inf elsewhere; with the mean of what an additive mask adds to them."""
        heads = max(bias.shape[1], mask.shape[1])
        batch, keys, exact = max(bias.shape[0], mask.shape[0]), groups.shape[2], bias.dtype
        mask = mask.expand(batch, heads, -1, keys)
        hidden = ~mask if mask.dtype == torch.bool else mask < torch.finfo(mask.dtype).min / 2
        wide, whole = (t if t.shape[1] == 1 else repeat_heads(t, heads) for t in (groups, size))
        index = wide[:, :, None].expand(batch, heads, mask.shape[2], keys)
        none = torch.zeros(batch, heads, mask.shape[2], size.shape[2], dtype=exact, device=mask.device)
        shut = (none.scatter_add(3, index, hidden.to(exact)) > 0) | (whole == 0)[:, :, None]
        emptied = shut.all(dim=-1) & ~hidden.all(dim=-1)
        if bool(emptied.any()):
            row = int(emptied.nonzero()[0, -1])
            raise ReattendError(
                f"query row {row} sees no complete group of keys: leave its most recent columns in groups of one"
            )
        if mask.dtype != torch.bool:
            bias = bias + none.scatter_add(3, index, mask.masked_fill(hidden, 0).to(exact)) / whole.clamp_min(1)[:, :, None]
        return bias.expand(shut.shape).masked_fill(shut, float("-inf"))


@dataclass(frozen=True, eq=False, kw_only=True)
class Reorder(OperandEdit):
    """k_j, v_j = k, v of column order[j] (one may stand at several places); the mask stays where it is.

    order long [Tk], [B, Tk] or [B, heads, Tk] (of query heads, or of key heads where the edit names no heads).
    """

    order: Tensor
    indices = {"order": 1}
    per_key_head = ("order",)

    def __post_init__(self) -> None:
        if self.order.dtype != torch.long:
            raise ReattendError("order must be a long tensor [keys], [batch, keys] or [batch, heads, keys]")
        super().__post_init__()

    def _check_shapes(self, shape: Shape) -> None:
        super()._check_shapes(shape)
        if shape.keys is not None:
            self._check_size("order", self.order, 2, shape.keys, "keys")
            _check_within("order", self.order, shape.keys)

    def on_operands(self, x: Operands) -> Operands:
        keys = x.key.shape[2]
        if self.order.shape[2] != keys - x.appended:
            raise ReattendError(f"order names {self.order.shape[2]} columns, the call has {keys - x.appended} keys")
        index, key, value = _wide(self.order, x)
        tail = torch.arange(keys - x.appended, keys, device=index.device)
        index = torch.cat([index, tail.expand(*index.shape[:2], -1)], dim=2)[..., None]
        key, value = (t.gather(2, index.expand(-1, -1, -1, t.shape[3])) for t in (key, value))
        return dataclasses.replace(x, key=key, value=value)
