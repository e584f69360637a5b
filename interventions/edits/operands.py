"""Edits of q, k and v: `ProjectKey` on a projection's output, the others on a call's operands before its scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

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
    # whether `on_operands` itself tells the rows that it names from others; elsewhere attention is computed with and without it
    tells_rows: ClassVar[bool] = False
    # whether its operands have so many more dimensions that they are made for rows at a time only, not for a kernel
    widens: ClassVar[bool] = False

    def on_operands(self, x: Operands) -> Operands:
        raise NotImplementedError

    def on_all_rows(self) -> OperandEdit:
        """The same edit for all rows."""
        return self.remember("on all rows", lambda: self._copy(rows=None))

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
        return self._copy(**cut) if cut else self


@dataclass(frozen=True, eq=False, kw_only=True)
class ScaleQuery(OperandEdit):
    """S *= factor, by scaling q. factor: number or tensor broadcastable to [B, heads, Tq]; above 1 sharpens, 0 makes rows uniform."""

    factor: float | Tensor
    broadcast = {"factor": 1}
    per_row = ("factor",)
    tells_rows = True

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
