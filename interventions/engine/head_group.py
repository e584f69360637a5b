"""Heads of one call that share their edits, computed in the cheapest exact way; the choice is `HeadGroup._attention`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..call import Call
from ..edits import (
    Band,
    Edit,
    Gain,
    Keep,
    KeyBias,
    Lift,
    Mix,
    MixValue,
    OperandEdit,
    Operands,
    Rearrange,
    Rows,
    ScoreEdit,
    Transfer,
    WeightEdit,
)
from .bands import attend_band
from .columns import bias_on_columns, plan_columns, single_factor, visible_on_columns
from .correction import column_scores, column_weights, correct, correct_factor, join_columns
from .kernels import attend, grouped_values, rows_per_chunk, score_rows, softmax_rows, statistics_dtype, with_bias_dimensions
from .rearranged import rearranged_attention
from .reference_executor import at_chosen

# Up to this many query rows a call counts as decode: its rows are materialised, which costs what the kernel would.
FEW_ROWS = 4
# Up to this many weights, a dozen passes over them cost less than the small operations of a correction.
FEW_WEIGHTS = 1 << 15
# A score so low that its weight is exactly 0 beside any other, and that half precision can hold.
HIDING = -1e4


def plain(call: Call) -> Tensor:
    """The call without edits, through the model's own function where there is one."""
    if call.original is not None:
        return call.original()
    return attend(call.query, call.key, call.value, call.mask, call.is_causal, call.scaling, call.softcap, call.sinks)[0]


def all_rows(query: Tensor) -> Tensor:
    """[Tq] long: every query row. Those of a decode step are made once, since every layer of every step asks for them."""
    count, device = query.shape[2], query.device
    return _few_rows(count, device) if count <= FEW_ROWS else torch.arange(count, device=device)


@functools.lru_cache(maxsize=64)
def _few_rows(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept longer than the pass that makes it
        return torch.arange(count, device=device)


def _attended(call: Call, heads: list[int]) -> tuple[Tensor, Tensor] | None:
    """The untouched output and log-sum-exp of these heads, if an intervention has left them on the call."""
    for known, (output, lse) in call.attended.items():
        if known == tuple(heads):
            return output, lse
        if set(heads) <= set(known):
            index = [known.index(h) for h in heads]
            return output[:, index], lse[:, index]
    return None


class HeadGroup:
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
        self.kv_heads = key_heads(heads, call.num_heads // call.key.shape[1])
        key, value = take_heads(call.key, self.kv_heads), take_heads(call.value, self.kv_heads)
        mask = call.mask if call.mask is None or call.mask.shape[1] == 1 else call.mask[:, heads]
        self.operands = (take_heads(call.query, heads), key, value, mask)
        self.sinks = None if call.sinks is None else call.sinks[heads]

    def edited_operands(self) -> Operands:
        """q, k, v and mask of these heads after their edits of operands."""
        x = Operands(*self.operands, self.call.is_causal, offset=self.call.num_keys - self.call.num_queries)
        for edit in self.edits:
            if isinstance(edit, OperandEdit):
                x = edit.at_kv_heads(self.kv_heads).on_operands(x)
        return x

    def run(self) -> Tensor:
        """Output [B, heads, Tq, Dv]."""
        call = self.call
        levels: dict[str, list] = {"operands": [], "scores": [], "weights": [], "output": []}
        for edit in self.edits:
            levels[edit.level].append(edit)
        x = Operands(*self.operands, call.is_causal, offset=call.num_keys - call.num_queries)
        last = levels["operands"][-1] if levels["operands"] else None
        alone = isinstance(last, Rearrange) and not levels["scores"] and not levels["weights"]
        for edit in levels["operands"][:-1] if alone else levels["operands"]:
            x = edit.at_kv_heads(self.kv_heads).on_operands(x)
        if alone and isinstance(last, Rearrange):
            result = rearranged_attention(x, last, call.scaling, call.softcap, self.sinks)
        elif isinstance(last, Rearrange):
            # its operands are as many times wider as there are groups: made for rows at a time, not for the kernel
            result = self._materialise(x, all_rows(x.query))
        elif levels["scores"] or levels["weights"]:
            result = self._attention(x, levels["scores"], levels["weights"])
        elif self.whole and not levels["operands"]:
            # output edits start from the model's own numbers: rows that they do not name keep their bits
            result = plain(call)
        else:
            result = self.kernel(x, None, False)[0]
        if levels["output"]:
            rows = self._rows(x, all_rows(x.query))
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
                return self.kernel(x, _sum_biases(biases, x), False)[0]
            if len(others) == 1 and _is_band(others[0]):
                return attend_band(x, others[0].pattern, _sum_biases(biases, x), call.scaling)  # type: ignore[union-attr]
        if not others and not x.query.requires_grad:
            if all(isinstance(e, Mix) and e.target == "identity" for e in weights) and x.mask is None and x.offset is not None:
                return self._towards_values(x, _sum_biases(biases, x), weights)
            small = few and x.query.shape[0] * x.query.shape[1] * x.key.shape[2] <= FEW_WEIGHTS
            single = None if small else single_factor(weights, x)
            if single is not None:
                bias = _sum_biases(biases, x)
                known = bias is None and _attended(call, self.heads) is not None
                if isinstance(single[0], Transfer) and not few and not known and self._can_hide(x):
                    return self._around_columns(x, bias, *single)
                return self._factor(x, bias, *single)
        if few and (weights or others):
            return self._materialise(x, all_rows(x.query))
        dense = self._rows_to_materialise(x, others, weights)
        if dense is not None and dense.numel() == x.query.shape[2]:
            return self._materialise(x, dense)
        corrected = [] if dense is not None else weights
        bias = _sum_biases(biases, x)
        plan = plan_columns(corrected, x, self.sinks is not None, call) if corrected else None
        if corrected and plan is None:
            dense, corrected = named_rows(corrected, x.query), []
            if dense.numel() == x.query.shape[2]:
                return self._materialise(x, dense)
        need_lse = plan is not None and plan.needs_statistics
        result, lse = self.kernel(x, bias, need_lse)
        if plan is not None:
            return self._correct(x, plan, result, lse, bias)
        if dense is not None and dense.numel():
            result = result.index_copy(2, dense, self._materialise(x, dense).to(result.dtype))
        return result

    def kernel(self, x: Operands, bias: Tensor | None, need_lse: bool) -> tuple[Tensor, Tensor | None]:
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
        result = self.kernel(x, bias, False)[0]
        rows = self._rows(x, all_rows(x.query))
        for mix in mixes:
            towards = mix.remember("as values", lambda mix=mix: MixValue(strength=mix.strength, rows=mix.rows))
            result = at_chosen(mix, rows, towards.on_output(result, rows), result)
        return result

    def _factor(
        self, x: Operands, bias: Tensor | None, edit: Gain | Lift | Transfer, columns: Tensor, chosen: Tensor
    ) -> Tensor:
        """One factor on few columns, in chunks of rows; rows where the correction is not accurate enough are materialised."""
        call, dtype = self.call, statistics_dtype(x.query)
        result, lse = self.kernel(x, bias, True)
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
        flagged = torch.cat(unsafe, dim=2) if len(unsafe) > 1 else unsafe[0]
        if (
            isinstance(edit, Transfer)
            and self._can_hide(x)
            and int(flagged.flatten(0, 1).any(0).sum()) > max(16, num_queries // 16)
        ):
            around = self._around_columns(x, bias, edit, columns, chosen)
            return torch.where(flagged[..., None], around.to(result.dtype), result)
        return self._mend(x, result, flagged)

    def _can_hide(self, x: Operands) -> bool:
        """Whether the kernel takes key biases without a mask of its own for every row."""
        return self.call.softcap is None and self.sinks is None and x.query.shape[-1] == x.value.shape[-1]

    def _around_columns(
        self, x: Operands, bias: Tensor | None, edit: Gain | Lift | Transfer, columns: Tensor, chosen: Tensor
    ) -> Tensor:
        """A transfer from few columns to all others: the kernel runs without these columns, which then join with what is left to them.

        Away from a sink that holds nearly all of a row, a correction of the whole row would amplify the kernel's rounding.
        """
        assert isinstance(edit, Transfer)
        call, dtype = self.call, statistics_dtype(x.query)
        hidden = torch.zeros(*chosen.shape[:2], x.key.shape[2], dtype=dtype, device=x.key.device)
        hidden[..., columns] = chosen[:, :, 0].to(dtype) * HIDING
        result, lse = self.kernel(x, hidden if bias is None else hidden + bias, True)
        assert lse is not None
        key, value = x.key[:, :, columns].to(dtype), x.value[:, :, columns].to(dtype)
        step = rows_per_chunk(x.query.shape[0], x.query.shape[1], 64 + columns.numel() + 2 * x.value.shape[3])
        pieces = []
        for start in range(0, x.query.shape[2], step):
            index = torch.arange(start, min(start + step, x.query.shape[2]), device=x.query.device)
            span = slice(start, start + index.numel())
            added = bias_on_columns(x, bias, index, columns)
            scores = column_scores(x.query[:, :, span].to(dtype), key, call.scaling, added)
            visible = visible_on_columns(x, index, columns)
            scores = scores.masked_fill(~(chosen if visible is None else chosen & visible), float("-inf"))
            joined = join_columns(result[:, :, span], lse[:, :, span].to(dtype), scores, value, edit, self._rows(x, index))
            pieces.append(joined.to(result.dtype))
        return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]

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
        return named_rows([*others, *weights], x.query)


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


def named_rows(edits: Sequence[Edit], query: Tensor) -> Tensor:
    """Rows [R] that any of the edits names, in any batch row."""
    num_queries = query.shape[2]
    named = torch.zeros(num_queries, dtype=torch.bool, device=query.device)
    for edit in edits:
        if edit.rows is None:
            return torch.arange(num_queries, device=query.device)
        named |= edit.rows.to(named.device).any(dim=0)
    return named.nonzero()[:, 0]


def take_heads(x: Tensor, heads: list[int]) -> Tensor:
    """Key heads [B, len(heads), ...] as a view where they are neighbours."""
    if heads == list(range(heads[0], heads[-1] + 1)):
        return x[:, heads[0] : heads[-1] + 1]
    return x[:, heads]


def key_heads(heads: list[int], shared: int) -> list[int]:
    """Key heads for a group of query heads such that query head i of the group reads key head i // (len(heads) / len(kv)) of the list."""
    kv = sorted({h // shared for h in heads})
    per_kv = [sum(1 for h in heads if h // shared == k) for k in kv]
    if len(set(per_kv)) == 1:
        return kv
    return [h // shared for h in heads]
