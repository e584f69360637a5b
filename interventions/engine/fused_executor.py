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

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..call import Call
from ..edits import Edit, KeyBias, Mix, OperandEdit, Operands, OutputEdit, Rows
from .all_heads import group_heads, heads_index, rows_of_all_heads
from .batch import acting_rows, call_at, edit_at, named_pairs
from .head_group import FEW_ROWS, HeadGroup, all_rows, edited_weights, named_rows, plain
from .kernels import attend, grouped_values, rows_per_chunk, statistics_dtype
from .reference_executor import at_chosen, check_edits


def fused(call: Call, edits: Sequence[Edit]) -> Tensor:
    """Output [B, H, Tq, Dv] in the query's dtype. Raises ReattendError for heads that do not exist."""
    edits = check_edits(call, list(edits))
    if not edits:
        return plain(call)
    if all(edit.rows is None for edit in edits):
        return _edited(call, edits)
    acting = acting_rows(call, edits) if call.num_queries > FEW_ROWS else None
    if acting is not None:
        return _on_batch_rows(call, edits, acting)
    named = named_pairs(call, edits)
    if named is None:
        return _edited(call, edits)
    # batch rows and heads that were computed beside the named ones, but are not: the model's own numbers
    original = functools.cache(functools.partial(plain, call))
    output = _edited(replace(call, original=original), edits)
    return torch.where(named[:, :, None, None], output, original())


def _edited(call: Call, edits: Sequence[Edit]) -> Tensor:
    """`fused` but for batch rows that an edit does not name."""
    if any(edit.reads_heads for edit in edits):
        return _across_heads(call, edits)
    groups = group_heads(call.num_heads, edits)
    if len(groups) == 1:
        (chosen, heads), *_ = groups.items()
        return HeadGroup(call, heads, [edits[i] for i in chosen]).run()
    untouched = groups.pop((), [])
    few = call.num_queries <= FEW_ROWS
    if few and _are_biases(call, edits):
        return _few_biased(call, edits, untouched)
    if few and _can_share_scores(edits, groups):
        output = rows_of_all_heads(call, edits, all_rows(call.query))[1].to(call.query.dtype)
        return _with_untouched(call, output, untouched)
    if few or (untouched and not _splits_exactly(call)):
        # the model's own function on all heads, overwritten where heads have edits
        output = plain(call).clone() if untouched else None
    else:
        output = _split(call, untouched) if untouched else None
    if output is None:
        output = call.query.new_empty(call.batch, call.num_heads, call.num_queries, call.value.shape[3])
    for chosen, heads in groups.items():
        output[:, heads] = HeadGroup(call, heads, [edits[i] for i in chosen]).run()
    return output


def _across_heads(call: Call, edits: Sequence[Edit]) -> Tensor:
    """Edits some of which look across heads: the rows that these name hold all heads together, the others have the rest of the edits."""
    crossing = [edit for edit in edits if edit.reads_heads]
    index = all_rows(call.query) if call.num_queries <= FEW_ROWS else named_rows(crossing, call.query)
    heads = None
    if all(edit.heads is not None for edit in crossing):
        heads = sorted({head for edit in crossing for head in edit.heads or ()})
    whole = heads is None and index.numel() == call.num_queries
    output = None if whole else fused(call, [edit for edit in edits if not edit.reads_heads])
    if output is not None and not index.numel():
        return output
    step = rows_per_chunk(call.batch, call.num_heads, call.num_keys)
    chunks = [rows_of_all_heads(call, edits, part)[1].to(call.query.dtype) for part in index.split(step)]
    new = torch.cat(chunks, dim=2) if len(chunks) > 1 else chunks[0]
    if output is None:
        return new
    if heads is None:
        return output.index_copy(2, index, new)
    chosen = heads_index(tuple(heads), output.device)
    return output.index_copy(1, chosen, output.index_select(1, chosen).index_copy(2, index, new.index_select(1, chosen)))


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
    group = HeadGroup(call, untouched, [])
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


def _are_biases(call: Call, edits: Sequence[Edit]) -> bool:
    """Whether the edits are key biases that a fused kernel takes as they are."""
    plain_scores = call.softcap is None and call.sinks is None
    return plain_scores and all(isinstance(edit, KeyBias) and edit.rows is None for edit in edits)


def _few_biased(call: Call, edits: Sequence[Edit], untouched: list[int]) -> Tensor:
    """Decode with key biases on some heads: one kernel for all heads with a row of biases each, for less than taking heads apart."""
    whole = HeadGroup(call, list(range(call.num_heads)), [])
    bias = None
    for edit in edits:
        assert isinstance(edit, KeyBias)
        own = edit.bias.to(statistics_dtype(call.query))
        if edit.heads is not None:
            spread = own.new_zeros(own.shape[0], call.num_heads, own.shape[2])
            own = spread.index_copy(1, heads_index(edit.heads, own.device), own.expand(-1, len(edit.heads), -1))
        bias = own if bias is None else bias + own
    x = Operands(*whole.operands, call.is_causal, offset=call.num_keys - call.num_queries)
    output = whole.kernel(x, bias, False)[0]
    return _with_untouched(call, output, untouched)


def _with_untouched(call: Call, output: Tensor, untouched: list[int]) -> Tensor:
    """The output with the model's own numbers for the heads that have no edit."""
    if not untouched:
        return output
    index = heads_index(tuple(untouched), output.device)
    return output.index_copy(1, index, plain(call).index_select(1, index))


def untouched_heads(call: Call, heads: Sequence[int]) -> tuple[Operands, Tensor]:
    """(operands, log-sum-exp [B, heads, Tq]) of some heads in ascending order, without edits.

    The output that comes with it is kept on the call: if the same heads are then edited, `fused` starts from it.
    """
    group = HeadGroup(call, list(heads), [])
    x = Operands(*group.operands, call.is_causal, offset=call.num_keys - call.num_queries)
    output, lse = group.kernel(x, None, True)
    assert lse is not None
    if torch.is_grad_enabled() or not any(own.requires_grad for own in (x.query, x.key, x.value)):
        # where the output will have a gradient, one that was only read has none to give
        call.attended[tuple(heads)] = output, lse
    return x, lse


def row_weights(call: Call, edits: Sequence[Edit], index: Tensor) -> Tensor:
    """Weights [B, H, R, Tk] of the query rows `index` [R], after the edits: the maps that observers and pictures need, row by row."""
    edits = check_edits(call, list(edits))
    if any(edit.reads_heads for edit in edits):
        return rows_of_all_heads(call, edits, index)[0]
    parts: dict[int, Tensor] = {}
    for heads, group, x in _edited_operands(call, edits):
        weights = edited_weights(x, index, group.edits, call, group.sinks)
        if len(heads) == call.num_heads:
            return weights
        parts.update(dict(zip(heads, weights.unbind(dim=1), strict=True)))
    return torch.stack([parts[h] for h in range(call.num_heads)], dim=1)


def row_outputs(call: Call, edits: Sequence[Edit], index: Tensor) -> Tensor:
    """Outputs [B, H, R, Dv] of the query rows `index` [R] after the edits, in statistics dtype: what `fused` gives for these rows."""
    edits = check_edits(call, list(edits))
    if any(edit.reads_heads for edit in edits):
        return rows_of_all_heads(call, edits, index)[1]
    parts: dict[int, Tensor] = {}
    for heads, group, x in _edited_operands(call, edits):
        weights = edited_weights(x, index, group.edits, call, group.sinks)
        output = grouped_values(weights, x.value.to(weights.dtype))
        rows = Rows(index, None, x.query, x.key, x.value, call.scaling, x.offset, x.appended)
        for edit in group.edits:
            if isinstance(edit, OutputEdit):
                output = at_chosen(edit, rows, edit.on_output(output, rows), output)
        if len(heads) == call.num_heads:
            return output
        parts.update(dict(zip(heads, output.unbind(dim=1), strict=True)))
    return torch.stack([parts[h] for h in range(call.num_heads)], dim=1)


def _edited_operands(call: Call, edits: Sequence[Edit]) -> Iterator[tuple[list[int], HeadGroup, Operands]]:
    """Heads with the same edits, and their operands after the edits of operands."""
    for chosen, heads in group_heads(call.num_heads, edits).items():
        group = HeadGroup(call, heads, [edits[i] for i in chosen])
        yield heads, group, group.edited_operands()
