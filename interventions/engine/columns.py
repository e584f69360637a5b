"""The way of edits of known columns: which ones must be at hand, each edit restated on them, and the kernel's output corrected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..edits import Edit, Gain, Mix, Operands, Rows, Transfer, WeightEdit
from ..edits.base import Columns, column_mask, repeat_heads, versions
from .correction import ColumnEdit, ColumnSet, Component, column_weights, correct
from .kernels import attend, rows_per_chunk, statistics_dtype, visible_rows
from .materialised import mend
from .tasks import Group

# Above this share of the keys a correction costs more than materialising the rows.
LARGEST_SHARE = 0.25


@dataclass
class Plan:
    columns: Tensor
    edits: Sequence[Edit]
    sets: list[dict[str, tuple[Tensor, bool]]]
    operands: Operands
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
        for edit, sets in zip(self.edits, self.sets, strict=True):
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


def factor_columns(edits: Sequence[WeightEdit], x: Operands) -> Columns | None:
    """The columns of the one factor that all edits come to, else None."""
    return edits[0].one_factor if len(edits) == 1 and edits[0].rows is None and not x.appended else None


def single_factor(edits: Sequence[WeightEdit], x: Operands) -> tuple[WeightEdit, Tensor, Tensor] | None:
    """(edit, columns [m] long, chosen bool [B, H, 1, m]) if the edits are one factor on few columns (see `correct_factor`), else None."""
    columns = factor_columns(edits, x)
    if columns is None:
        return None
    num_keys, device = x.key.shape[2], x.key.device

    def find() -> tuple[Tensor, Tensor] | None:
        mask = column_mask(columns, num_keys, device)
        index = mask.flatten(0, 1).any(dim=0).nonzero()[:, 0]
        return None if index.numel() > most_columns(num_keys) else (index, mask[:, :, None, index])

    found = edits[0].remember_size("columns", (num_keys, device), find)
    return None if found is None else (edits[0], *found)


def most_columns(num_keys: int) -> int:
    return max(64, int(LARGEST_SHARE * num_keys))


def can_restate(group: Group) -> bool:
    """Whether a correction knows all edits of weights, and what their targets need: which keys a row sees is then not read from a mask."""
    x, edits = group.x, group.weights
    if group.scores or not all(isinstance(e, (Gain, Transfer)) or (isinstance(e, Mix) and e.target_is_known) for e in edits):
        return False
    targets = {_target(edit) for edit in edits}
    if x.mask is not None and targets != {""}:
        return False
    return not ("mean_query" in targets and x.is_causal) and not ("identity" in targets and x.offset is None)


def _target(edit: Edit) -> str:
    """The map besides the row's own that an edit brings in: "uniform", "identity", "mean_query" or ""."""
    if isinstance(edit, Mix):
        return str(edit.target)
    return "uniform" if isinstance(edit, Transfer) and edit.how == "even" else ""


def plan_columns(group: Group) -> Plan | None:
    """A plan for edits that `can_restate`, or None where materialising is the better way."""
    x, edits = group.x, tuple(group.weights)
    key = edits[1:], versions(edits[1:]), x.key.shape[2], x.appended, x.key.device
    restated = edits[0].remember_size("plan", key, lambda: _restate(edits, x))
    if restated is None:
        return None
    index, sets = restated
    targets = {_target(edit) for edit in edits}
    mean = None
    if "mean_query" in targets:
        query = x.query.to(statistics_dtype(x.query)).mean(dim=2, keepdim=True)
        key, value = x.key.to(query.dtype), x.value.to(query.dtype)
        output, lse = attend(query, key, value, scale=group.call.scaling, need_lse=True)
        assert lse is not None
        mean = output, column_weights(query, key[:, :, index], lse, group.call.scaling)
    return Plan(
        columns=index,
        edits=edits,
        sets=sets,
        operands=x,
        needs_statistics=index.numel() > 0 or group.sinks is not None,
        uniform_output=mean_of_visible(x) if "uniform" in targets else None,
        mean_query=mean,
    )


def _restate(edits: Sequence[Edit], x: Operands) -> tuple[Tensor, list[dict[str, tuple[Tensor, bool]]]] | None:
    """(the columns that must be at hand [m] long, each edit's sets on them), or None where these are too many."""
    num_keys, device = x.key.shape[2], x.key.device
    limit = most_columns(num_keys)
    sets: list[dict[str, tuple[Tensor, bool]]] = []
    columns = torch.zeros(num_keys, dtype=torch.bool, device=device)
    for edit in edits:
        named = {}
        for name, mask in _masks(edit, num_keys - x.appended, x.appended, device).items():
            inside, outside = mask.flatten(0, 1).any(dim=0), ~mask.flatten(0, 1).all(dim=0)
            small = int(inside.sum()) <= limit
            if not small and int(outside.sum()) > limit:
                return None
            columns |= inside if small else outside
            named[name] = mask, not small
        sets.append(named)
    index = columns.nonzero()[:, 0]
    if index.numel() > limit:
        return None
    return index, [{name: (mask[:, :, index][:, :, None], rest) for name, (mask, rest) in named.items()} for named in sets]


def _masks(edit: Edit, own: int, appended: int, device: torch.device) -> dict[str, Tensor]:
    """The column sets of an edit, bool [B, H, Tk] each; columns that were appended belong to no set but to "all others"."""

    def mask_of(columns: Columns) -> Tensor:
        return torch.nn.functional.pad(column_mask(columns, own, device), (0, appended))

    if isinstance(edit, Gain):
        masks = {"columns": mask_of(edit.columns)}
        if isinstance(edit.renormalise, Tensor):
            masks["renormalise"] = mask_of(edit.renormalise)
        return masks
    if isinstance(edit, Transfer):
        source = mask_of(edit.source)
        return {"source": source, "target": ~source if edit.target is None else mask_of(edit.target) & ~source}
    return {}


def corrected(group: Group, plan: Plan) -> Tensor:
    """Any planned column edits, in chunks of rows; unsafe rows are materialised."""
    call, x, bias, columns = group.call, group.x, group.bias(), plan.columns
    output, lse = group.kernel(bias, plan.needs_statistics)
    key, value = x.key[:, :, columns], x.value[:, :, columns]
    dtype = statistics_dtype(x.query)
    pieces, flags = [], []
    width = max(64, columns.numel()) + 2 * x.value.shape[3]
    step = rows_per_chunk(x.query.shape[0], x.query.shape[1], width, x.query.device)
    for start in range(0, x.query.shape[2], step):
        index = torch.arange(start, min(start + step, x.query.shape[2]), device=x.query.device)
        rows = group.rows(index)
        span = slice(start, start + index.numel())
        visible = visible_on_columns(x, index, columns)
        total = None
        if lse is None:
            weights = output.new_zeros(*output.shape[:2], index.numel(), 0, dtype=dtype)
        else:
            part = lse[:, :, span].to(dtype)
            hidden = None if visible is None else ~visible
            added = bias_on_columns(x, bias, index, columns)
            weights = column_weights(x.query[:, :, span], key, part, call.scaling, hidden, added, call.softcap)
            if group.sinks is not None:
                total = 1 - (group.sinks.to(dtype).view(1, -1, 1) - part).exp()[..., None]
        new, unsafe = correct(output[:, :, span], weights, value, plan.items(rows, visible), rows, total)
        pieces.append(new.to(output.dtype))
        flags.append(unsafe)
    output = torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]
    return mend(group, output, torch.cat(flags, dim=2) if len(flags) > 1 else flags[0])


def mean_of_visible(x: Operands) -> Tensor:
    """Mean value over the keys that each row sees [B, H, Tq or 1, Dv], without a mask tensor."""
    value = x.value.to(statistics_dtype(x.value))
    if not x.is_causal:
        mean = value.mean(dim=2, keepdim=True)
    else:
        sums = value.cumsum(dim=2)
        counts = torch.arange(1, value.shape[2] + 1, device=value.device, dtype=value.dtype)
        mean = (sums / counts[:, None])[:, :, value.shape[2] - x.query.shape[2] :]
    return repeat_heads(mean, x.query.shape[1])
