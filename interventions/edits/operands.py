"""Edits of q, k and v: `ProjectKey` on a projection's output, the others on a call's operands before its scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ReattendError
from .base import Edit, Shape, check_number


@dataclass
class Operands:
    """query [B, H, Tq, D], key [B, Hkv, Tk, D], value [B, Hkv, Tk, Dv], their mask; offset and appended as in `Rows`."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    is_causal: bool
    offset: int | None
    appended: int = 0

    def dense_mask(self) -> Tensor | None:
        """The mask as a tensor, with causality written out; needed by edits that change the number or order of keys."""
        if not self.is_causal:
            return self.mask
        tq, tk = self.query.shape[2], self.key.shape[2]
        causal = torch.ones(tq, tk, dtype=torch.bool, device=self.key.device).tril(tk - tq)[None, None]
        if self.mask is None:
            return causal
        if self.mask.dtype == torch.bool:
            return self.mask & causal
        return self.mask.masked_fill(~causal, float("-inf"))


@dataclass(frozen=True, eq=False, kw_only=True)
class OperandEdit(Edit):
    level = "operands"
    # whether its operands have so many more dimensions that they are made for rows at a time only, not for a kernel
    widens: ClassVar[bool] = False

    def on_operands(self, x: Operands) -> Operands:
        raise NotImplementedError

    def _check_shapes(self, shape: Shape) -> None:
        super()._check_shapes(shape)
        for name in ("key", "value"):
            value = getattr(self, name, None)
            if value is not None:
                self._check_size(name, value, 0, shape.batch, "batch rows")
                self._check_size(name, value, 1, shape.kv_heads, "key heads")

    def at_kv_heads(self, index: Sequence[int]) -> OperandEdit:
        """The same edit with its own keys and values cut to these key/value heads."""
        cut = {}
        for name in ("key", "value"):
            own = getattr(self, name, None)
            if isinstance(own, Tensor) and own.shape[1] > 1:
                cut[name] = own[:, list(index)]
        return dataclasses.replace(self, **cut) if cut else self


@dataclass(frozen=True, eq=False, kw_only=True)
class ScaleQuery(OperandEdit):
    """S *= factor, by scaling q. factor: number or tensor broadcastable to [B, heads, Tq]; above 1 sharpens, 0 makes rows uniform."""

    factor: float | Tensor
    broadcast = {"factor": 1}
    per_row = ("factor",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("factor", self.factor)

    @property
    def is_identity(self) -> bool:
        return super().is_identity or (not isinstance(self.factor, Tensor) and self.factor == 1)

    def on_operands(self, x: Operands) -> Operands:
        factor = self.factor[..., None].to(x.query.dtype) if isinstance(self.factor, Tensor) else self.factor
        scaled = x.query * factor
        if self.rows is not None:
            scaled = torch.where(self.rows[:, None, :, None], scaled, x.query)
        return dataclasses.replace(x, query=scaled)


@dataclass(frozen=True, eq=False, kw_only=True)
class ReplaceKV(OperandEdit):
    """Puts other keys and/or values at some columns. columns [m] long; key [B, Hkv, m, D] and value [B, Hkv, m, Dv] or None."""

    columns: Tensor
    key: Tensor | None = None
    value: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows is not None or self.heads is not None:
            raise ReattendError("ReplaceKV acts on all heads and rows: heads and rows must be None")
        if self.columns.dtype != torch.long or self.columns.dim() != 1:
            raise ReattendError("columns must be a 1-d long tensor of key columns")
        if self.key is None and self.value is None:
            raise ReattendError("ReplaceKV needs key, value or both")
        for name, value in (("key", self.key), ("value", self.value)):
            if value is not None and (value.dim() != 4 or value.shape[2] != self.columns.numel()):
                raise ReattendError(
                    f"{name} must be [batch, key heads, {self.columns.numel()}, dim] for {self.columns.numel()} columns, got shape "
                    f"{list(value.shape)}"
                )

    @property
    def is_identity(self) -> bool:
        return self.columns.numel() == 0

    def on_operands(self, x: Operands) -> Operands:
        key, value = x.key, x.value
        if self.key is not None:
            key = key.index_copy(2, self.columns, self.key.to(key.dtype).expand(*key.shape[:2], -1, -1))
        if self.value is not None:
            value = value.index_copy(2, self.columns, self.value.to(value.dtype).expand(*value.shape[:2], -1, -1))
        return dataclasses.replace(x, key=key, value=value)


@dataclass(frozen=True, eq=False, kw_only=True)
class AppendKV(OperandEdit):
    """Adds m extra columns that every row sees: key [B, Hkv, m, D], value [B, Hkv, m, Dv]."""

    key: Tensor
    value: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows is not None or self.heads is not None:
            raise ReattendError("AppendKV acts on all heads and rows: heads and rows must be None")
        if self.key.dim() != 4 or self.value.dim() != 4 or self.key.shape[:3] != self.value.shape[:3]:
            raise ReattendError("key and value must be [batch, key heads, m, dim] with the same m")

    @property
    def is_identity(self) -> bool:
        return self.key.shape[2] == 0

    def on_operands(self, x: Operands) -> Operands:
        mask, extra = x.dense_mask(), self.key.shape[2]
        if mask is not None:
            fill = torch.ones if mask.dtype == torch.bool else torch.zeros
            mask = torch.cat([mask, fill(*mask.shape[:3], extra, dtype=mask.dtype, device=mask.device)], dim=3)
        key = torch.cat([x.key, self.key.to(x.key.dtype).expand(*x.key.shape[:2], -1, -1)], dim=2)
        value = torch.cat([x.value, self.value.to(x.value.dtype).expand(*x.value.shape[:2], -1, -1)], dim=2)
        return dataclasses.replace(x, key=key, value=value, mask=mask, is_causal=False, appended=x.appended + extra)


@dataclass(frozen=True, eq=False, kw_only=True)
class PoolKV(OperandEdit):
    """Merges groups of keys: columns of the same group become their mean key and mean value, standing for `size` keys (+log size).

    groups [Tk] long: group of each column, numbered 0..m-1 in the order the pooled columns shall have. A row sees a pooled
    column only when it sees all its members (so causality holds); a row that sees no complete group is an error.
    """

    groups: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows is not None or self.heads is not None:
            raise ReattendError("PoolKV acts on all heads and rows: heads and rows must be None")
        if self.groups.dtype != torch.long or self.groups.dim() != 1:
            raise ReattendError("groups must be a 1-d long tensor, one group number per key")

    @property
    def is_identity(self) -> bool:
        return torch.equal(self.groups, torch.arange(self.groups.numel(), device=self.groups.device))

    def on_operands(self, x: Operands) -> Operands:
        if self.groups.numel() != x.key.shape[2]:
            raise ReattendError(f"groups names {self.groups.numel()} columns, the call has {x.key.shape[2]} keys")
        exact = torch.float64 if x.key.dtype == torch.float64 else torch.float32
        size = torch.bincount(self.groups).to(exact)
        member = torch.zeros(len(size), x.key.shape[2], dtype=exact, device=x.key.device)
        member[self.groups, torch.arange(x.key.shape[2], device=x.key.device)] = 1
        mean = member / size[:, None]
        key = (mean @ x.key.to(exact)).to(x.key.dtype)
        value = (mean @ x.value.to(exact)).to(x.value.dtype)
        bias = size.log()[None, None, None]
        mask = x.dense_mask()
        if mask is not None:
            hidden = ~mask if mask.dtype == torch.bool else mask < torch.finfo(mask.dtype).min / 2
            pooled_hidden = (hidden.to(exact) @ member.T) > 0
            emptied = pooled_hidden.all(dim=-1) & ~hidden.all(dim=-1)
            if bool(emptied.any()):
                row = int(emptied.nonzero()[0, -1])
                raise ReattendError(
                    f"query row {row} sees no complete group of keys: leave its most recent columns in groups of one"
                )
            bias = bias.expand(*pooled_hidden.shape).masked_fill(pooled_hidden, float("-inf"))
            if mask.dtype != torch.bool:
                bias = bias + mask.masked_fill(hidden, 0).to(exact) @ mean.T
        return dataclasses.replace(x, key=key, value=value, mask=bias.to(x.query.dtype), is_causal=False, offset=None)


@dataclass(frozen=True, eq=False, kw_only=True)
class Reorder(OperandEdit):
    """Column j of the call becomes the key and value of column order[j]; the mask stays where it is. order [Tk] or [B, Tk] long."""

    order: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows is not None or self.heads is not None:
            raise ReattendError("Reorder acts on all heads and rows: heads and rows must be None")
        if self.order.dtype != torch.long or self.order.dim() not in (1, 2):
            raise ReattendError("order must be a long tensor [keys] or [batch, keys]")

    def _check_shapes(self, shape: Shape) -> None:
        super()._check_shapes(shape)
        if self.order.dim() == 2:
            self._check_size("order", self.order, 0, shape.batch, "batch rows")

    def on_operands(self, x: Operands) -> Operands:
        keys = x.key.shape[2]
        if self.order.shape[-1] != keys - x.appended:
            raise ReattendError(f"order names {self.order.shape[-1]} columns, the call has {keys - x.appended} keys")
        order = self.order.view(-1, keys - x.appended)
        tail = torch.arange(keys - x.appended, keys, device=order.device).expand(order.shape[0], -1)
        order = torch.cat([order, tail], dim=1)[:, None, :, None]

        def take(t: Tensor) -> Tensor:
            return t.gather(2, order.expand(t.shape[0], t.shape[1], -1, t.shape[3]))

        return dataclasses.replace(x, key=take(x.key), value=take(x.value))


@dataclass(frozen=True, eq=False, kw_only=True)
class ProjectKey(Edit):
    """k += strength * P k on the key projection's output of chosen new tokens, before RoPE and cache.

    projection: [D, D], [Hkv, D, D] or [B, Hkv, D, D]. `heads` are key/value heads, `rows` the tokens of this forward pass. feature:
    None, or the function f of k' = f^-1(f(k) + strength * P f(k)), "tanh" or "elu"; sums outside f's range stop at its bounds.
    Worked out in float32; other tokens and heads stay as they are. Runs at the projection, not inside a call's attention.
    """

    projection: Tensor = field(kw_only=False)
    strength: float = 1.0
    feature: str | None = None
    level = "projection"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("strength", self.strength)
        if self.projection.dim() not in (2, 3, 4) or self.projection.shape[-1] != self.projection.shape[-2]:
            raise ReattendError("projection must be [head_dim, head_dim], [key heads, ...] or [batch, key heads, ...]")
        if self.feature not in (None, "tanh", "elu"):
            raise ReattendError(f"feature must be None, 'tanh' or 'elu', got {self.feature!r}")

    @property
    def is_identity(self) -> bool:
        return super().is_identity or self.strength == 0

    def on_key(self, key: Tensor) -> Tensor:
        """key [B, Hkv, T, D] -> the same shape and dtype."""
        for axis, what in ((-3, "key heads"), (-4, "batch rows")):
            if self.projection.dim() >= -axis and self.projection.shape[axis] not in (1, key.shape[axis]):
                raise ReattendError(
                    f"projection has {self.projection.shape[axis]} {what}, this key projection {key.shape[axis]}: give {key.shape[axis]}"
                )
        if self.heads and max(self.heads) >= key.shape[1]:
            raise ReattendError(f"head {max(self.heads)} does not exist: this key projection has heads 0 to {key.shape[1] - 1}")
        wide = key.float()
        lifted = wide if self.feature is None else _lift(wide, self.feature)
        change = self.strength * (lifted @ self.projection.to(key.device, torch.float32).transpose(-1, -2))
        new = key + change.to(key.dtype) if self.feature is None else _lower(lifted + change, self.feature).to(key.dtype)
        keep = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=key.device)
        if self.rows is not None:
            keep = keep & self.rows.to(key.device)[:, None, :, None]
        if self.heads is not None:
            named = torch.zeros(key.shape[1], dtype=torch.bool, device=key.device)
            named[list(self.heads)] = True
            keep = keep & named[None, :, None, None]
        return torch.where(keep, new, key)


# How close to its bounds an inverse is still taken: beyond, tanh and elu are flat and their inverses endless.
EDGE = 1e-4


def _lift(x: Tensor, feature: str) -> Tensor:
    return x.tanh() if feature == "tanh" else torch.nn.functional.elu(x)


def _lower(y: Tensor, feature: str) -> Tensor:
    if feature == "tanh":
        return y.clamp(-1 + EDGE, 1 - EDGE).atanh()
    return torch.where(y > 0, y, y.clamp(-1 + EDGE, 0).log1p())
