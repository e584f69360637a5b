"""Plans a correction: which columns must be at hand for a list of weight edits, and each edit restated on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import Call
from ..edits import Edit, Gain, Lift, Mix, Operands, Rows, Transfer
from ..edits.base import column_mask, repeat_heads
from .correction import ColumnEdit, ColumnSet, Component, column_weights
from .kernels import attend, statistics_dtype, visible_rows

# Above this share of the keys a correction costs more than materialising the rows.
LARGEST_SHARE = 0.25


@dataclass
class Plan:
    columns: Tensor
    sets: list[tuple[Edit, dict[str, tuple[Tensor, bool]]]]
    operands: Operands
    call: Call
    needs_statistics: bool
    uniform_output: Tensor | None
    mean_query: tuple[Tensor, Tensor] | None

    def items(self, rows: Rows, visible: Tensor | None) -> list[ColumnEdit]:
        """The edits restated for the rows of one chunk."""
        x = self.operands
        dtype = statistics_dtype(x.query)
        shown = torch.ones(1, 1, 1, self.columns.numel(), dtype=torch.bool, device=self.columns.device)
        shown = shown if visible is None else visible
        items = []
        for edit, sets in self.sets:
            item = ColumnEdit(edit, {name: ColumnSet(inside, rest) for name, (inside, rest) in sets.items()})
            even = isinstance(edit, Transfer) and edit.how == "even"
            if even or (isinstance(edit, Mix) and edit.target == "uniform"):
                item.visible, item.count = shown, self._count(rows.index, dtype)
                item.target = self._uniform(rows.index, shown, item.count, dtype)
            elif isinstance(edit, Mix) and edit.target == "identity":
                item.target = self._identity(rows, dtype)
            elif isinstance(edit, Mix):
                item.target = self._mean_query(rows.index, dtype)
            items.append(item)
        return items

    def _ones(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        q = self.operands.query
        return torch.ones(q.shape[0], q.shape[1], index.numel(), 1, dtype=dtype, device=q.device)

    def _count(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        x = self.operands
        if x.is_causal:
            return (index + (x.key.shape[2] - x.query.shape[2]) + 1).to(dtype)[None, None, :, None]
        return torch.full((1, 1, 1, 1), float(x.key.shape[2]), dtype=dtype, device=index.device)

    def _uniform(self, index: Tensor, shown: Tensor, count: Tensor, dtype: torch.dtype) -> Component:
        assert self.uniform_output is not None
        ones = self._ones(index, dtype)
        output = self.uniform_output if self.uniform_output.shape[2] == 1 else self.uniform_output[:, :, index]
        weights = (shown.to(dtype) / count).expand(*ones.shape[:3], -1)
        return Component(ones, output.expand(*ones.shape[:3], -1), weights, ones)

    def _identity(self, rows: Rows, dtype: torch.dtype) -> Component:
        ones = self._ones(rows.index, dtype)
        output = repeat_heads(self.operands.value[:, :, rows.own], ones.shape[1]).to(dtype)
        weights = (self.columns[None] == rows.own[:, None]).to(dtype).expand(*ones.shape[:3], -1)
        return Component(ones, output, weights, ones)

    def _mean_query(self, index: Tensor, dtype: torch.dtype) -> Component:
        assert self.mean_query is not None
        output, weights = self.mean_query
        ones = self._ones(index, dtype)
        return Component(ones, output.to(dtype).expand(*ones.shape[:3], -1), weights.expand(*ones.shape[:3], -1), ones)


def visible_on_columns(x: Operands, index: Tensor, columns: Tensor) -> Tensor | None:
    """Bool [B or 1, H or 1, R, m]: whether the rows `index` see the columns; None if they see every key."""
    visible = visible_rows(x.mask, False, index, x.query.shape[2], x.key.shape[2])
    if visible is not None:
        visible = visible.expand(*visible.shape[:3], x.key.shape[2])[..., columns]
    if x.is_causal:
        causal = (columns[None] <= index[:, None] + (x.key.shape[2] - x.query.shape[2]))[None, None]
        visible = causal if visible is None else visible & causal
    return visible


def bias_on_columns(x: Operands, bias: Tensor | None, index: Tensor, columns: Tensor) -> Tensor | None:
    """Everything added to the scores of the columns besides q k: key biases [B or 1, H or 1, Tk] and an additive mask."""
    total = None if bias is None else bias[:, :, None, columns]
    if x.mask is not None and x.mask.dtype != torch.bool:
        part = x.mask if x.mask.shape[2] == 1 else x.mask[:, :, index]
        part = part.expand(*part.shape[:3], x.key.shape[2])[..., columns].to(statistics_dtype(x.query))
        total = part if total is None else total + part
    return total


def single_factor(edits: Sequence[Edit], x: Operands) -> tuple[Gain | Lift | Transfer, Tensor, Tensor] | None:
    """(edit, columns [m] long, chosen bool [B, H, 1, m]) if the edits are one factor on few columns (see `correct_factor`), else None."""
    if len(edits) != 1 or edits[0].rows is not None or x.appended:
        return None
    edit = edits[0]
    if isinstance(edit, Lift) or (isinstance(edit, Gain) and edit.renormalise == "row"):
        columns = edit.columns
    elif isinstance(edit, Transfer) and edit.target is None and edit.how == "proportional":
        columns = edit.source
    else:
        return None
    num_keys, device = x.key.shape[2], x.key.device

    def find() -> tuple[Tensor, Tensor] | None:
        mask = column_mask(columns, num_keys, device)  # type: ignore[arg-type]
        index = mask.flatten(0, 1).any(dim=0).nonzero()[:, 0]
        if index.numel() > max(64, int(LARGEST_SHARE * num_keys)):
            return None
        return index, mask[:, :, None, index]

    found = edit.remember(("columns", num_keys, device), find)
    return None if found is None else (edit, *found)


def plan_columns(edits: Sequence[Edit], x: Operands, has_sinks: bool, call: Call) -> Plan | None:
    """A plan for these edits (Gain, Transfer, Mix with a known target), or None where materialising is the better way."""
    num_keys, device = x.key.shape[2], x.key.device
    own = num_keys - x.appended
    small: list[Tensor] = []
    sets: list[tuple[Edit, dict[str, tuple[Tensor, bool]]]] = []
    limit = max(64, int(LARGEST_SHARE * num_keys))

    def register(mask: Tensor, already_padded: bool = False) -> tuple[Tensor, bool] | None:
        mask = mask if already_padded or not x.appended else torch.nn.functional.pad(mask, (0, x.appended))
        any_row = mask.flatten(0, 1).any(dim=0)
        all_rows = mask.flatten(0, 1).all(dim=0)
        if int(any_row.sum()) <= limit:
            small.append(any_row)
            return mask, False
        if int((~all_rows).sum()) <= limit:
            small.append(~all_rows)
            return mask, True
        return None

    for edit in edits:
        named: dict[str, tuple[Tensor, bool]] = {}
        masks: dict[str, Tensor] = {}
        padded: set[str] = set()
        if isinstance(edit, Gain):
            masks["columns"] = column_mask(edit.columns, own, device)  # type: ignore[arg-type]
            if isinstance(edit.renormalise, Tensor):
                masks["renormalise"] = column_mask(edit.renormalise, own, device)
        elif isinstance(edit, Transfer):
            source = torch.nn.functional.pad(column_mask(edit.source, own, device), (0, x.appended))  # type: ignore[arg-type]
            if edit.target is None:
                target = ~source
            else:
                target = torch.nn.functional.pad(column_mask(edit.target, own, device), (0, x.appended)) & ~source  # type: ignore[arg-type]
            masks = {"source": source, "target": target}
            padded = {"source", "target"}
        for name, mask in masks.items():
            entry = register(mask, name in padded)
            if entry is None:
                return None
            named[name] = entry
        sets.append((edit, named))

    needs_uniform = any(
        (isinstance(e, Mix) and e.target == "uniform") or (isinstance(e, Transfer) and e.how == "even") for e in edits
    )
    needs_mean = any(isinstance(e, Mix) and e.target == "mean_query" for e in edits)
    needs_identity = any(isinstance(e, Mix) and e.target == "identity" for e in edits)
    if (needs_uniform or needs_identity) and x.mask is not None:
        return None  # which keys a row sees, and whether it sees itself, is then only known from the mask, row by row
    if needs_mean and (x.mask is not None or x.is_causal):
        return None
    if needs_identity and x.offset is None:
        return None

    columns = torch.zeros(num_keys, dtype=torch.bool, device=device)
    for part in small:
        columns |= part
    index = columns.nonzero()[:, 0]
    if index.numel() > limit:
        return None
    restated = [
        (edit, {name: (mask[:, :, index][:, :, None], rest) for name, (mask, rest) in named.items()}) for edit, named in sets
    ]
    mean = None
    if needs_mean:
        query = x.query.to(statistics_dtype(x.query)).mean(dim=2, keepdim=True)
        key, value = x.key.to(query.dtype), x.value.to(query.dtype)
        output, lse = attend(query, key, value, scale=call.scaling, need_lse=True)
        assert lse is not None
        mean = output, column_weights(query, key[:, :, index], lse, call.scaling)  # type: ignore[arg-type]
    return Plan(
        columns=index,
        sets=restated,
        operands=x,
        call=call,
        needs_statistics=index.numel() > 0 or has_sinks,
        uniform_output=_mean_of_visible(x) if needs_uniform else None,
        mean_query=mean,
    )


def _mean_of_visible(x: Operands) -> Tensor:
    """Mean value over the keys that each row sees [B, H, Tq or 1, Dv], without a mask tensor."""
    value = x.value.to(statistics_dtype(x.value))
    if not x.is_causal:
        mean = value.mean(dim=2, keepdim=True)
    else:
        sums = value.cumsum(dim=2)
        counts = torch.arange(1, value.shape[2] + 1, device=value.device, dtype=value.dtype)
        mean = (sums / counts[:, None])[:, :, value.shape[2] - x.query.shape[2] :]
    return repeat_heads(mean, x.query.shape[1])
