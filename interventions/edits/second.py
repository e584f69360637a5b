"""Edits that bring in another attention: a second one of the same query, another branch's output, or one in attention's place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ReattendError
from .base import Rows, Shape, check_number
from .operands import Operands
from .outputs import OutputEdit
from .weights import at_rows

# Norms are not taken to be smaller, as in the authors' shared function.
SMALLEST_NORM = 1e-6


@dataclass(frozen=True, eq=False, kw_only=True)
class Second(OutputEdit):
    """O = combine(O, O2) with O2 = softmax(scale Q K2^T + mask) V2: a second attention of the same query over keys and values of its own.

    key [B or 1, Hkv or 1, m, D], value [.., m, Dv] (with heads named: as many heads as these). mask: bool (True = visible) or additive,
    [..., Tq or 1, m]; rows that see none of the second's keys keep their output. combine: how far towards O2, a number or [B, heads, Tq]
    with O = O + combine (O2 - O), or a function (O, O2, Rows) -> O, given some of the heads and rows at a time (`reads` says what it
    needs together). Sees q after the edits of operands.
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    combine: float | Tensor | Callable[[Tensor, Tensor, Rows], Tensor] = 1.0
    reads: str = ""  # type: ignore[misc]
    broadcast = {"key": 2, "value": 2, "mask": 2, "combine": 1}
    per_row = ("mask", "combine")
    per_key_head = ("key", "value")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_pair(0, 2)
        if self.mask is not None and self.mask.shape[3] not in (1, self.key.shape[2]):
            raise ReattendError(f"mask is for {self.mask.shape[3]} keys, the second attention has {self.key.shape[2]}")
        if not callable(self.combine):
            check_number("combine", self.combine)

    def _check_pair(self, *axes: int) -> None:
        if any(self.key.shape[axis] != self.value.shape[axis] for axis in axes):
            raise ReattendError(
                f"key and value must be [batch, key heads, m, dim] with the same m, got {list(self.key.shape)} and {list(self.value.shape)}"
            )

    def _check_shapes(self, shape: Shape) -> None:
        super()._check_shapes(shape)
        self._check_pair(1)  # after their heads were held against the call's, which says more

    @property
    def splits_batch(self) -> bool:  # type: ignore[override]
        return not callable(self.combine)

    @property
    def is_identity(self) -> bool:
        return super().is_identity or self.key.shape[2] == 0 or (isinstance(self.combine, (int, float)) and self.combine == 0)

    def on_output(self, output: Tensor, rows: Rows) -> Tensor:
        second, alive = self._attend(rows)
        second = second.to(output.dtype)
        if callable(self.combine):
            new = self.combine(output, second, rows)
            if new.shape != output.shape:
                raise ReattendError(f"combine changed the shape from {list(output.shape)} to {list(new.shape)}")
        else:
            share = (
                at_rows(self.combine[..., None].to(output.dtype), rows) if isinstance(self.combine, Tensor) else self.combine
            )
            new = output + share * (second - output)
        return new if alive is None else torch.where(alive, new, output)

    def _attend(self, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """(the second attention's output [B, heads, R, Dv], bool [.., R, 1] of rows that see any of it; None for all)."""
        query = rows.query[:, :, rows.index]
        key, value = (t.to(query.dtype).expand(query.shape[0], -1, -1, -1) for t in (self.key, self.value))
        mask = alive = None
        if self.mask is not None:
            mask = self.mask if self.mask.shape[2] == 1 else self.mask[:, :, rows.index]
            mask = mask.expand(*mask.shape[:2], query.shape[2], key.shape[2])
            alive = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2).any(dim=-1, keepdim=True)
            mask = mask | ~alive if mask.dtype == torch.bool else mask.masked_fill(~alive, 0.0).to(query.dtype)
        shared = key.shape[1] != query.shape[1]
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=rows.scale, enable_gqa=shared
        )
        return output, alive


def extrapolated(output: Tensor, other: Tensor, factor: float, limit: float, strength: float, norm: str = "l1") -> Tensor:
    """z moved away from `other`, [B, H, R, Dv] each, all heads of a token together: see `Extrapolate`. What `Second` can combine with."""
    away = factor * output - (factor - 1) * other
    order = 1 if norm == "l1" else 2
    size, grown = (
        torch.linalg.vector_norm(t.to(torch.promote_types(t.dtype, torch.float32)), order, dim=(1, 3), keepdim=True)
        for t in (output, away)
    )
    ratio = grown.clamp_min(SMALLEST_NORM) / size.clamp_min(SMALLEST_NORM)
    away = away * (ratio.clamp_max(limit) / ratio).to(output.dtype)
    return strength * away + (1 - strength) * output


@dataclass(frozen=True, eq=False, kw_only=True)
class Extrapolate(OutputEdit):
    """z = strength g min(R, limit) / R + (1 - strength) z with g = z + (factor - 1)(z - other), R = |g| / |z| over all heads of a token.

    Normalised attention guidance (arXiv 2505.21179). other: outputs [B or 1, H, Tq, Dv] to move away from, or long [B]: for each batch row
    the one whose outputs they are. factor >= 1 (1 = off), limit > 0, strength in [0, 1]; norm: "l1" (as published) or "l2". It cannot
    name heads: their norm would be another.
    """

    other: Tensor
    factor: float
    limit: float = 2.5
    strength: float = 0.25
    norm: str = "l1"
    broadcast = {"other": 2}
    per_row = ("other",)
    reads_operands = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads is not None:
            raise ReattendError("Extrapolate needs all heads of a token for their norm: heads must be None")
        check_number("factor", self.factor, 1)
        check_number("limit", self.limit, 0)
        check_number("strength", self.strength, 0, 1)
        if self.norm not in ("l1", "l2"):
            raise ReattendError(f'norm must be "l1" or "l2", got {self.norm!r}')
        if self.other.dtype == torch.long and self.other.dim() != 1:
            raise ReattendError("other must be outputs [batch, heads, queries, dim], or long [batch]: whose outputs they are")

    @property
    def reads(self) -> str:  # type: ignore[override]
        return "both" if self.other.dtype == torch.long else "heads"

    @property
    def is_identity(self) -> bool:
        return super().is_identity or self.factor == 1 or self.strength == 0

    def _check_shapes(self, shape: Shape) -> None:
        super()._check_shapes(shape)
        if self.other.dtype == torch.long:
            check_source("other", self.other, shape.batch, shape.batch, "batch rows")

    def on_output(self, output: Tensor, rows: Rows) -> Tensor:
        if self.other.dtype == torch.long:
            other = output[self.other]
        else:
            other = (self.other if self.other.shape[2] == 1 else self.other[:, :, rows.index]).to(output.dtype)
        return extrapolated(output, other, self.factor, self.limit, self.strength, self.norm)


@dataclass(frozen=True, eq=False, kw_only=True)
class TakeOutput(OutputEdit):
    """O_i = O_source[i]: rows take the output of other query rows (source long [Tq] or [B, Tq]), or batch rows that of others (batch long [B]).

    What is taken is the output after the edits named before it. Give one of the two.
    """

    source: Tensor | None = None
    batch: Tensor | None = None
    batched = ("source",)
    reads_operands = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.source is None) == (self.batch is None):
            raise ReattendError("TakeOutput needs either source (query rows) or batch (batch rows)")
        for name, given, most in (("source", self.source, 2), ("batch", self.batch, 1)):
            if given is not None and (given.dtype != torch.long or not 1 <= given.dim() <= most):
                raise ReattendError(f"{name} must be long, source [queries] or [batch, queries], batch [batch]")
        if self.source is not None:
            object.__setattr__(self, "source", self.source.view(-1, self.source.shape[-1]))

    @property
    def reads(self) -> str:  # type: ignore[override]
        return "" if self.batch is None else "batch"

    @property
    def reads_rows(self) -> bool:  # type: ignore[override]
        return self.source is not None

    def _check_shapes(self, shape: Shape) -> None:
        super()._check_shapes(shape)
        if self.batch is not None:
            check_source("batch", self.batch, shape.batch, shape.batch, "batch rows")
        if self.source is not None:
            self._check_size("source", self.source, 0, shape.batch, "batch rows")
            check_source("source", self.source, shape.queries, shape.queries, "query rows")

    def on_output(self, output: Tensor, rows: Rows) -> Tensor:
        if self.batch is not None:
            return output[self.batch]
        assert self.source is not None
        if output.shape[2] != self.source.shape[1]:
            raise ReattendError("TakeOutput was given some of the query rows only")
        if self.source.shape[0] == 1:
            return output.index_select(2, self.source[0])
        return output.gather(2, self.source[:, None, :, None].expand(-1, output.shape[1], -1, output.shape[3]))


@dataclass(frozen=True, eq=False, kw_only=True)
class Instead(OutputEdit):
    """O = compute(Operands, scale): whatever takes attention's place, after the edits of operands. It approximates, and is counted so.

    compute: (Operands with query [B, heads, Tq, D], key, value, mask, is_causal; scale) -> [B, heads, Tq, Dv], given some of the heads at
    a time; `reads` says what it needs together. Edits of scores and weights mean nothing to the rows that it names.
    """

    compute: Callable[[Operands, float], Tensor]
    reads: str = ""  # type: ignore[misc]
    approximate = True
    replaces = True
    splits_batch = False  # nobody knows what the function holds

    def on_output(self, output: Tensor, rows: Rows) -> Tensor:
        x = Operands(rows.query, rows.key, rows.value, rows.mask, rows.is_causal, rows.offset, rows.appended)
        new = self.compute(x, rows.scale)
        wanted = (*rows.query.shape[:3], output.shape[3])
        if new.shape != wanted:
            raise ReattendError(f"compute of Instead gave {list(new.shape)}, attention gives {list(wanted)}")
        return (new if new.shape[2] == rows.index.numel() else new[:, :, rows.index]).to(output.dtype)


def check_source(name: str, source: Tensor, count: int, within: int, what: str) -> None:
    """Raises ReattendError unless `source` [..., count] names one of `within` rows for each of `count`; accelerators are not read."""
    if source.shape[-1] != count:
        raise ReattendError(f"{name} names {source.shape[-1]} {what}, this call has {count}: give one for each")
    if source.device.type == "cpu" and source.numel():
        least, most = (int(x) for x in source.aminmax())
        if least < 0 or most >= within:
            raise ReattendError(f"{name} names row {least if least < 0 else most}, this call has {what} 0 to {within - 1}")
