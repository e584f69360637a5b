"""The fused executor: the same numbers as `reference`, without the n x n matrix.

Heads with the same edits form a group; heads without edits take the model's own path. Per group the cheapest exact way is chosen:

- key biases          one extra dimension of q and k inside the fused kernel (an additive row at decode)
- bands (`Keep`)      query blocks over the sink and window columns only
- known columns, mixes corrections of the fused output from its log-sum-exp (`correction`)
- anything else       only the rows it names are materialised, in chunks; at decode, all rows are few
- output edits        arithmetic on the output

The order of meaning is that of `reference`: operands, scores, weights, output; inside a level as given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .band import attend_band
from .batch import acting_rows, call_at, edit_at
from .call import Call
from .columns import bias_on_columns, plan_columns, single_factor, visible_on_columns
from .correction import column_weights, correct, correct_factor
from .edits import (
    Band,
    Edit,
    Gain,
    Keep,
    KeyBias,
    Mix,
    MixValue,
    OperandEdit,
    Operands,
    Rows,
    ScoreEdit,
    Transfer,
    WeightEdit,
)
from .edits.base import repeat_heads
from .kernels import attend, grouped_values, rows_per_chunk, score_rows, softmax_rows, statistics_dtype
from .reference_executor import at_chosen, check_edits

# Up to this many query rows a call counts as decode: its rows are materialised, which costs what the kernel would.
FEW_ROWS = 4
# Up to this many weights, a dozen passes over them cost less than the small operations of a correction.
FEW_WEIGHTS = 1 << 15


def fused(call: Call, edits: Sequence[Edit]) -> Tensor:
    """Output [B, H, Tq, Dv] in the query's dtype. Raises ReattendError for heads that do not exist."""
    edits = check_edits(call, list(edits))
    if not edits:
        return plain(call)
    acting = acting_rows(call, edits) if call.num_queries > FEW_ROWS else None
    if acting is not None:
        return _on_batch_rows(call, edits, acting)
    groups = group_heads(call.num_heads, edits)
    if len(groups) == 1:
        (chosen, heads), *_ = groups.items()
        return _Group(call, heads, [edits[i] for i in chosen]).run()
    untouched = groups.pop((), [])
    few = call.num_queries <= FEW_ROWS
    if few and _can_share_scores(edits, groups):
        return _few_rows(call, edits, untouched)
    if few or (untouched and not _splits_exactly(call)):
        # the model's own function on all heads, overwritten where heads have edits
        output = plain(call).clone() if untouched else None
    else:
        output = _split(call, untouched) if untouched else None
    if output is None:
        output = call.query.new_empty(call.batch, call.num_heads, call.num_queries, call.value.shape[3])
    for chosen, heads in groups.items():
        output[:, heads] = _Group(call, heads, [edits[i] for i in chosen]).run()
    return output


def _on_batch_rows(call: Call, edits: Sequence[Edit], acting: Tensor) -> Tensor:
    """Batch rows that no edit names keep the model's own output, bit for bit; the edits run on the others alone."""
    if acting.numel() == 0:
        return plain(call)
    output = plain(call).clone()
    own = output[acting]
    output[acting] = fused(call_at(call, acting, lambda: own), [edit_at(edit, acting) for edit in edits])
    return output


def _splits_exactly(call: Call) -> bool:
    """Whether SDPA on some heads gives the bits of SDPA on all: unless the memory layout would choose another kernel for a copy of them."""
    return call.original_is_sdpa and all(x.stride(-1) == 1 for x in (call.query, call.key, call.value))


def _split(call: Call, untouched: list[int]) -> Tensor:
    """An output with the untouched heads filled in: SDPA gives a head the same bits whichever others run beside it."""
    output = call.query.new_empty(call.batch, call.num_heads, call.num_queries, call.value.shape[3])
    group = _Group(call, untouched, [])
    output[:, untouched] = attend(*group.operands, call.is_causal, call.scaling, call.softcap, group.sinks)[0]
    return output


def _can_share_scores(edits: Sequence[Edit], groups: dict[tuple[int, ...], list[int]]) -> bool:
    """Whether one pass over all heads serves the edited ones: no edit changes operands or reads the heads' own q, k, v."""
    for edit in edits:
        if isinstance(edit, OperandEdit) or edit.level == "output":
            return False
        if isinstance(edit, Mix) and edit.target == "mean_query":
            return False
    return len(groups) > 0


def _few_rows(call: Call, edits: Sequence[Edit], untouched: list[int]) -> Tensor:
    """Decode with different edits on different heads: the rows of all heads at once, each edit on its heads' slice."""
    x = Operands(call.query, call.key, call.value, call.mask, call.is_causal, offset=call.num_keys - call.num_queries)
    index = torch.arange(call.num_queries, device=call.query.device)
    scores, visible = score_rows(x.query, x.key, x.mask, x.is_causal, call.scaling, call.softcap, index)
    rows = Rows(index, visible, x.query, x.key, x.value, call.scaling, x.offset, x.appended)

    def each(values: Tensor, level: type[Edit], method: str) -> Tensor:
        for edit in edits:
            if not isinstance(edit, level):
                continue
            if edit.heads is None:
                values = at_chosen(edit, rows, getattr(edit, method)(values, rows), values)
            else:
                heads = list(edit.heads)
                part = values[:, heads]
                shown = rows if visible is None or visible.shape[1] == 1 else replace(rows, visible=visible[:, heads])
                values = values.index_copy(
                    1,
                    torch.tensor(heads, device=values.device),
                    at_chosen(edit, shown, getattr(edit, method)(part, shown), part),
                )
        return values

    scores = each(scores, ScoreEdit, "on_scores")
    weights = each(softmax_rows(scores, call.sinks), WeightEdit, "on_weights")
    output = grouped_values(weights, x.value.to(weights.dtype)).to(call.query.dtype)
    if untouched:
        output = output.index_copy(1, torch.tensor(untouched, device=output.device), plain(call)[:, untouched])
    return output


def plain(call: Call) -> Tensor:
    """The call without edits, through the model's own function where there is one."""
    if call.original is not None:
        return call.original()
    return attend(call.query, call.key, call.value, call.mask, call.is_causal, call.scaling, call.softcap, call.sinks)[0]


def untouched_heads(call: Call, heads: Sequence[int]) -> tuple[Operands, Tensor]:
    """(operands, log-sum-exp [B, heads, Tq]) of some heads in ascending order, without edits.

    The output that comes with it is kept on the call: if the same heads are then edited, `fused` starts from it.
    """
    group = _Group(call, list(heads), [])
    x = Operands(*group.operands, call.is_causal, offset=call.num_keys - call.num_queries)
    output, lse = group._kernel(x, None, True)
    assert lse is not None
    call.attended[tuple(heads)] = output, lse
    return x, lse


def _attended(call: Call, heads: list[int]) -> tuple[Tensor, Tensor] | None:
    """The untouched output and log-sum-exp of these heads, if an intervention has left them on the call."""
    for known, (output, lse) in call.attended.items():
        if known == tuple(heads):
            return output, lse
        if set(heads) <= set(known):
            index = [known.index(h) for h in heads]
            return output[:, index], lse[:, index]
    return None


def group_heads(num_heads: int, edits: Sequence[Edit]) -> dict[tuple[int, ...], list[int]]:
    """Heads with the same edits: {indices of edits: heads}."""
    groups: dict[tuple[int, ...], list[int]] = {}
    if all(edit.heads is None for edit in edits):
        return {tuple(range(len(edits))): list(range(num_heads))}
    for head in range(num_heads):
        groups.setdefault(tuple(i for i, e in enumerate(edits) if e.heads is None or head in e.heads), []).append(head)
    return groups


class _Group:
    """Heads of one call that share their edits."""

    def __init__(self, call: Call, heads: list[int], edits: Sequence[Edit]) -> None:
        self.call, self.heads = call, heads
        self.whole = len(heads) == call.num_heads
        if self.whole:
            self.edits = [e if e.heads is None else e.at_heads([e.heads.index(h) for h in heads]) for e in edits]
            self.kv_heads = list(range(call.key.shape[1]))
            self.operands = (call.query, call.key, call.value, call.mask)
            self.sinks = call.sinks
            return
        self.edits = [e.at_heads(heads if e.heads is None else [e.heads.index(h) for h in heads]) for e in edits]
        self.kv_heads = _key_heads(heads, call.num_heads // call.key.shape[1])
        key, value = _take_heads(call.key, self.kv_heads), _take_heads(call.value, self.kv_heads)
        mask = call.mask if call.mask is None or call.mask.shape[1] == 1 else call.mask[:, heads]
        self.operands = (_take_heads(call.query, heads), key, value, mask)
        self.sinks = None if call.sinks is None else call.sinks[heads]

    def run(self) -> Tensor:
        """Output [B, heads, Tq, Dv]."""
        call = self.call
        levels: dict[str, list] = {"operands": [], "scores": [], "weights": [], "output": []}
        for edit in self.edits:
            levels[edit.level].append(edit)
        x = Operands(*self.operands, call.is_causal, offset=call.num_keys - call.num_queries)
        for edit in levels["operands"]:
            x = edit.at_kv_heads(self.kv_heads).on_operands(x)
        if levels["scores"] or levels["weights"]:
            result = self._attention(x, levels["scores"], levels["weights"])
        else:
            result = self._kernel(x, None, False)[0]
        if levels["output"]:
            rows = self._rows(x, torch.arange(x.query.shape[2], device=x.query.device))
            for edit in levels["output"]:
                result = at_chosen(edit, rows, edit.on_output(result, rows), result)
        return result.to(call.query.dtype)

    def _attention(self, x: Operands, scores: list[ScoreEdit], weights: list[WeightEdit]) -> Tensor:
        call = self.call
        few = x.query.shape[2] <= FEW_ROWS
        biases = [e for e in scores if isinstance(e, KeyBias) and e.rows is None]
        others = [e for e in scores if e not in biases]
        if not weights and call.softcap is None and call.sinks is None:
            if not others:
                return self._kernel(x, _sum_biases(biases, x), False)[0]
            if len(others) == 1 and _is_band(others[0]):
                return attend_band(x, others[0].pattern, _sum_biases(biases, x), call.scaling)  # type: ignore[union-attr]
        if not others and not x.query.requires_grad:
            if all(isinstance(e, Mix) and e.target == "identity" for e in weights) and x.mask is None and x.offset is not None:
                return self._towards_values(x, _sum_biases(biases, x), weights)
            small = few and x.query.shape[0] * x.query.shape[1] * x.key.shape[2] <= FEW_WEIGHTS
            single = None if small else single_factor(weights, x)
            if single is not None:
                return self._factor(x, _sum_biases(biases, x), *single)
        if few and (weights or others):
            return self._materialise(x, torch.arange(x.query.shape[2], device=x.query.device))
        dense = self._rows_to_materialise(x, others, weights)
        if dense is not None and dense.numel() == x.query.shape[2]:
            return self._materialise(x, dense)
        corrected = [] if dense is not None else weights
        bias = _sum_biases(biases, x)
        plan = plan_columns(corrected, x, self.sinks is not None, call) if corrected else None
        if corrected and plan is None:
            dense, corrected = _named_rows(corrected, x), []
            if dense.numel() == x.query.shape[2]:
                return self._materialise(x, dense)
        need_lse = plan is not None and plan.needs_statistics
        result, lse = self._kernel(x, bias, need_lse)
        if plan is not None:
            return self._correct(x, plan, result, lse, bias)
        if dense is not None and dense.numel():
            result = result.index_copy(2, dense, self._materialise(x, dense).to(result.dtype))
        return result

    def _kernel(self, x: Operands, bias: Tensor | None, need_lse: bool) -> tuple[Tensor, Tensor | None]:
        call = self.call
        if bias is None:
            untouched = all(new is old for new, old in zip((x.query, x.key, x.value, x.mask), self.operands))
            if untouched and self.whole and not need_lse:
                return plain(call), None
            known = _attended(call, self.heads) if untouched and need_lse else None
            if known is not None:
                return known
            return attend(x.query, x.key, x.value, x.mask, x.is_causal, call.scaling, call.softcap, self.sinks, need_lse)
        if x.query.shape[2] <= FEW_ROWS or call.softcap is not None or x.query.shape[-1] != x.value.shape[-1]:
            mask = x.dense_mask()
            row = bias[:, :, None, :]
            if mask is None:
                mask = row
            elif mask.dtype == torch.bool:
                mask = row.masked_fill(~mask, float("-inf"))
            else:
                mask = row + mask.to(row.dtype)
            mask = mask.to(x.query.dtype if call.softcap is None else row.dtype)
            return attend(x.query, x.key, x.value, mask, False, call.scaling, call.softcap, self.sinks, need_lse)
        query, key, value = with_bias_dimensions(x.query, x.key, x.value, bias, call.scaling)
        output, lse = attend(query, key, value, x.mask, x.is_causal, call.scaling, None, self.sinks, need_lse)
        return output[..., : x.value.shape[3]], lse

    def _materialise(self, x: Operands, index: Tensor) -> Tensor:
        """Rows `index` [R] with every score and weight edit applied to their whole maps, in chunks: [B, heads, R, Dv]."""
        call = self.call
        dtype = statistics_dtype(x.query)
        step = rows_per_chunk(x.query.shape[0], x.query.shape[1], x.key.shape[2])
        value = x.value.to(dtype)
        outputs = []
        for start in range(0, index.numel(), step):
            part = index[start : start + step]
            outputs.append(grouped_values(edited_weights(x, part, self.edits, call, self.sinks), value))
        return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]

    def _towards_values(self, x: Operands, bias: Tensor | None, mixes: Sequence[Any]) -> Tensor:
        """Mixes with the identity need no weights: (1 - s) o + s v."""
        result = self._kernel(x, bias, False)[0]
        rows = self._rows(x, torch.arange(x.query.shape[2], device=x.query.device))
        for mix in mixes:
            towards = mix.remember("as values", lambda mix=mix: MixValue(strength=mix.strength, rows=mix.rows))
            result = at_chosen(mix, rows, towards.on_output(result, rows), result)
        return result

    def _factor(self, x: Operands, bias: Tensor | None, edit: Gain | Transfer, columns: Tensor, chosen: Tensor) -> Tensor:
        """One factor on few columns, in chunks of rows; rows where the correction is not accurate enough are materialised."""
        call, dtype = self.call, statistics_dtype(x.query)
        result, lse = self._kernel(x, bias, True)
        assert lse is not None
        key, value = x.key[:, :, columns].to(dtype), x.value[:, :, columns].to(dtype)
        num_queries = x.query.shape[2]
        step = rows_per_chunk(x.query.shape[0], x.query.shape[1], 64 + columns.numel() + 2 * x.value.shape[3])
        pieces, unsafe = [], []
        for start in range(0, num_queries, step):
            stop = min(start + step, num_queries)
            index = torch.arange(start, stop, device=x.query.device)
            rows = self._rows(x, index)
            visible = visible_on_columns(x, index, columns)
            part = lse[:, :, start:stop].to(dtype)
            hidden = None if visible is None else ~visible
            added = bias_on_columns(x, bias, index, columns)
            weights = column_weights(x.query[:, :, start:stop], key, part, call.scaling, hidden, added, call.softcap)
            total = None if self.sinks is None else 1 - (self.sinks.to(dtype).view(1, -1, 1) - part).exp()[..., None]
            corrected, bad = correct_factor(result[:, :, start:stop], weights, value, edit, chosen, rows, total)
            pieces.append(corrected.to(result.dtype))
            unsafe.append(bad)
        result = torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]
        return self._mend(x, result, torch.cat(unsafe, dim=2) if len(unsafe) > 1 else unsafe[0])

    def _mend(self, x: Operands, result: Tensor, unsafe: Tensor) -> Tensor:
        """Materialises the rows that are flagged [B, H, Tq] in any batch row or head."""
        if not bool(unsafe.any()):
            return result
        index = unsafe.flatten(0, 1).any(dim=0).nonzero()[:, 0]
        return result.index_copy(2, index, self._materialise(x, index).to(result.dtype))

    def _rows(self, x: Operands, index: Tensor) -> Rows:
        return Rows(index, None, x.query, x.key, x.value, self.call.scaling, x.offset, x.appended)

    def _correct(self, x: Operands, plan, output: Tensor, lse: Tensor | None, bias: Tensor | None) -> Tensor:
        """Any planned column edits, in chunks of rows; unsafe rows are materialised."""
        call = self.call
        columns = plan.columns
        key, value = x.key[:, :, columns], x.value[:, :, columns]
        dtype = statistics_dtype(x.query)
        pieces, unsafe = [], []
        step = rows_per_chunk(x.query.shape[0], x.query.shape[1], max(64, columns.numel()) + 2 * x.value.shape[3])
        for start in range(0, x.query.shape[2], step):
            index = torch.arange(start, min(start + step, x.query.shape[2]), device=x.query.device)
            rows = self._rows(x, index)
            span = slice(start, start + index.numel())
            visible = visible_on_columns(x, index, columns)
            total = None
            if lse is None:
                weights = output.new_zeros(*output.shape[:2], index.numel(), 0, dtype=dtype)
            else:
                part = lse[:, :, span].to(dtype)
                weights = column_weights(
                    x.query[:, :, span],
                    key,
                    part,
                    call.scaling,
                    None if visible is None else ~visible,
                    bias_on_columns(x, bias, index, columns),
                    call.softcap,
                )
                if self.sinks is not None:
                    total = 1 - (self.sinks.to(dtype).view(1, -1, 1) - part).exp()[..., None]
            items = plan.items(rows, visible)
            result, bad = correct(output[:, :, span], weights, value, items, rows, total)
            pieces.append(result.to(output.dtype))
            unsafe.append(bad)
        result = torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]
        return self._mend(x, result, torch.cat(unsafe, dim=2) if len(unsafe) > 1 else unsafe[0])

    def _rows_to_materialise(self, x: Operands, others: list[ScoreEdit], weights: list[WeightEdit]) -> Tensor | None:
        """Rows that no identity covers, or None when every weight edit can be tried as a correction."""
        hard = list(others) + [
            e for e in weights if not isinstance(e, (Gain, Transfer, Mix)) or (isinstance(e, Mix) and not e.target_is_known)
        ]
        if not hard:
            return None
        return _named_rows([*others, *weights], x)


def edited_weights(x: Operands, index: Tensor, edits: Sequence[Edit], call: Call, sinks: Tensor | None) -> Tensor:
    """Weights [B, H, R, Tk] of the rows `index` after all score and weight edits."""
    scores, visible = score_rows(x.query, x.key, x.mask, x.is_causal, call.scaling, call.softcap, index)  # type: ignore[arg-type]
    rows = Rows(index, visible, x.query, x.key, x.value, call.scaling, x.offset, x.appended)  # type: ignore[arg-type]
    for edit in edits:
        if isinstance(edit, ScoreEdit):
            scores = at_chosen(edit, rows, edit.on_scores(scores, rows), scores)
    weights = softmax_rows(scores, sinks)
    for edit in edits:
        if isinstance(edit, WeightEdit):
            weights = at_chosen(edit, rows, edit.on_weights(weights, rows), weights)
    return weights


def row_weights(call: Call, edits: Sequence[Edit], index: Tensor) -> Tensor:
    """Weights [B, H, R, Tk] of the query rows `index` [R], after the edits: the maps that observers and pictures need, row by row."""
    edits = check_edits(call, list(edits))
    parts: dict[int, Tensor] = {}
    for chosen, heads in group_heads(call.num_heads, edits).items():
        group = _Group(call, heads, [edits[i] for i in chosen])
        x = Operands(*group.operands, call.is_causal, offset=call.num_keys - call.num_queries)
        for edit in group.edits:
            if isinstance(edit, OperandEdit):
                x = edit.at_kv_heads(group.kv_heads).on_operands(x)
        weights = edited_weights(x, index, group.edits, call, group.sinks)
        if len(heads) == call.num_heads:
            return weights
        parts.update(dict(zip(heads, weights.unbind(dim=1), strict=True)))
    return torch.stack([parts[h] for h in range(call.num_heads)], dim=1)


def with_bias_dimensions(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with 8 more dimensions whose product adds bias [B or 1, H or 1, Tk] to the scores; v is padded with zeros.

    The constant on q's side is a power of two and the bias is split into three parts of the working dtype, so that half precision
    loses nothing of it.
    """
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    constant = 2.0 ** round(torch.tensor(1.0 / scale).log2().item())
    rest = bias.to(torch.float32) / (scale * constant)
    parts = []
    for _ in range(3):
        part = rest.to(query.dtype)
        parts.append(part)
        rest = rest - part.to(torch.float32)
    extra_key = torch.zeros(*rest.shape, 8, dtype=key.dtype, device=key.device)
    for i, part in enumerate(parts):
        extra_key[..., i] = part
    if rest.shape[1] > 1 and key.shape[1] != heads:
        key, value = repeat_heads(key, heads), repeat_heads(value, heads)
    extra_query = torch.zeros(8, dtype=query.dtype, device=query.device)
    extra_query[:3] = constant
    query = torch.cat([query, extra_query.expand(batch, heads, rows, 8)], dim=3)
    key = torch.cat([key, extra_key.expand(batch, key.shape[1], keys, 8)], dim=3)
    return query, key, torch.nn.functional.pad(value, (0, 8))


def _sum_biases(biases: Sequence[KeyBias], x: Operands) -> Tensor | None:
    """All key biases of a group as one [B or 1, heads or 1, Tk] float32."""
    if not biases:
        return None
    total = biases[0].bias.to(statistics_dtype(x.query))
    for edit in biases[1:]:
        total = total + edit.bias.to(total.dtype)
    return torch.nn.functional.pad(total, (0, x.appended)) if x.appended else total


def _is_band(edit: ScoreEdit) -> bool:
    return isinstance(edit, Keep) and isinstance(edit.pattern, Band) and edit.rows is None


def _named_rows(edits: Sequence[Edit], x: Operands) -> Tensor:
    """Rows [R] that any of the edits names, in any batch row."""
    num_queries = x.query.shape[2]
    named = torch.zeros(num_queries, dtype=torch.bool, device=x.query.device)
    for edit in edits:
        if edit.rows is None:
            return torch.arange(num_queries, device=x.query.device)
        named |= edit.rows.to(named.device).any(dim=0)
    return named.nonzero()[:, 0]


def _take_heads(x: Tensor, heads: list[int]) -> Tensor:
    """Key heads [B, len(heads), ...] as a view where they are neighbours."""
    if heads == list(range(heads[0], heads[-1] + 1)):
        return x[:, heads[0] : heads[-1] + 1]
    return x[:, heads]


def _key_heads(heads: list[int], shared: int) -> list[int]:
    """Key heads for a group of query heads such that query head i of the group reads key head i // (len(heads) / len(kv)) of the list."""
    kv = sorted({h // shared for h in heads})
    per_kv = [sum(1 for h in heads if h // shared == k) for k in kv]
    if len(set(per_kv)) == 1:
        return kv
    return [h // shared for h in heads]
