"""`HeldKV`: the columns that a cache still holds, each head its own, are all that is attended to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ReattendError
from .base import Shape, key_heads, repeat_heads
from .operands import OperandEdit, Operands


@dataclass(frozen=True, eq=False, kw_only=True)
class HeldKV(OperandEdit):
    """K, V = key, value, which stand for the call's columns `columns`; all other columns are gone.

    columns long [B, h, m], ascending; key [B, h, m, D] and value [B, h, m, Dv], where h are the key heads of the query heads that the
    edit names (all of them where it names none); valid bool [B, h, m], False where a place is not used, None = all are. Who sees what
    follows from the call's mask at these columns. Edits that name columns cannot come after it: the columns are others.
    """

    columns: Tensor
    key: Tensor
    value: Tensor
    valid: Tensor | None = None
    batched = ("columns", "key", "value", "valid")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.columns.dtype != torch.long or self.columns.dim() != 3:
            raise ReattendError("columns of HeldKV must be a long tensor [batch, key heads, columns]")
        for name, held in (("key", self.key), ("value", self.value)):
            if held.dim() != 4 or held.shape[:3] != self.columns.shape:
                raise ReattendError(f"{name} of HeldKV must be {list(self.columns.shape)} and a dim, got {list(held.shape)}")
        if self.valid is not None and (self.valid.dtype != torch.bool or self.valid.shape != self.columns.shape):
            raise ReattendError(f"valid of HeldKV must be bool {list(self.columns.shape)}, as columns")

    def _check_shapes(self, shape: Shape) -> None:
        heads = shape.heads if self.heads is None else len(self.heads)
        self._check_size("columns", self.columns, 0, shape.batch, "batch rows")
        if heads % self.columns.shape[1] or heads // self.columns.shape[1] != shape.heads // shape.kv_heads:
            raise ReattendError(
                f"columns of HeldKV are of {self.columns.shape[1]} key heads, but {heads} query heads of this call share "
                f"{heads * shape.kv_heads // shape.heads}"
            )
        if self.columns.device.type == "cpu" and self.columns.numel() and shape.keys is not None:
            least, most = (int(x) for x in self.columns.aminmax())
            if least < 0 or most >= shape.keys:
                raise ReattendError(
                    f"columns names column {least if least < 0 else most}, outside the {shape.keys} keys of the call"
                )

    def fitted(self, heads: int, kv_heads: int) -> HeldKV:
        return (
            self if self.heads is not None else self.remember(("fitted", heads), lambda: self._copy(heads=tuple(range(heads))))
        )

    def at_heads(self, positions: Sequence[int]) -> HeldKV:
        assert self.heads is not None
        if list(positions) == list(range(len(self.heads))):
            return self._copy(heads=None)
        own = key_heads(positions, len(self.heads) // self.columns.shape[1])
        parts = {name: getattr(self, name) for name in self.batched}
        return self._copy(heads=None, **{name: part[:, own] for name, part in parts.items() if part is not None})

    def at_kv_heads(self, index: Sequence[int]) -> HeldKV:
        return self  # what it holds is of its own heads already

    def on_operands(self, x: Operands) -> Operands:
        heads, columns = x.query.shape[1], self.columns.to(x.key.device)
        # the last row sees every column
        mask = x.mask if x.query.shape[2] == 1 else x.dense_mask()
        if mask is not None:
            index = columns if mask.shape[1] == 1 else repeat_heads(columns, heads)
            lead = (max(mask.shape[0], index.shape[0]), index.shape[1], mask.shape[2])
            mask = mask.expand(*lead, -1).gather(3, index[:, :, None].expand(*lead, -1))
            mask = repeat_heads(mask, heads)
        if self.valid is not None:
            valid = repeat_heads(self.valid, heads)[:, :, None].to(x.key.device)
            if mask is None:
                mask = valid
            else:
                mask = mask & valid if mask.dtype == torch.bool else mask.masked_fill(~valid, float("-inf"))
        key, value = (own.to(x.key.dtype).expand(x.query.shape[0], -1, -1, -1) for own in (self.key, self.value))
        return dataclasses.replace(x, key=key, value=value, mask=mask, is_causal=False, offset=None)
