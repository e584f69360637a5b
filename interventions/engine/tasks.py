"""What the ways are asked for: a whole call with its edits (`Task`), or heads of it with the same edits (`Group`).

What both say of themselves without reading a value - sizes, kinds of edits - is what a way's `fits` goes by.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..call import Call
from ..edits import Edit, OperandEdit, Operands, OutputEdit, Rows, ScoreEdit, WeightEdit
from ..edits.base import heads_index, key_heads
from ..edits.row_values import found_in, values_of
from .biases import attend_biased, sum_biases
from .kernels import FEW_ROWS, attend, needs_gradient
from .reference_executor import at_chosen


class Task:
    """A call and the edits that act in it.

    compute: takes a task or a group through the table of ways: what a cut does with its parts. settled: batch rows and heads that no
    edit names are seen to already.
    """

    scope: ClassVar[str] = "call"

    def __init__(self, call: Call, edits: Sequence[Edit], compute: Callable[[Any], Tensor], settled: bool = False) -> None:
        self.call, self.edits, self.compute, self.settled = call, edits, compute, settled
        self.few = call.num_queries <= FEW_ROWS
        self.names_heads = self.names_rows = self.crosses = False
        for edit in edits:
            if edit.heads is not None:
                self.names_heads = True
            if edit.rows is not None:
                self.names_rows = True
            if edit.reads_heads:
                self.crosses = True
        self._groups: dict[tuple[int, ...], list[int]] | None = None

    @property
    def groups(self) -> dict[tuple[int, ...], list[int]]:
        """Heads with the same edits: {indices of edits: heads}."""
        if self._groups is None:
            self._groups = group_heads(self.call.num_heads, self.edits)
        return self._groups

    def again(self, call: Call, edits: Sequence[Edit], settled: bool = False) -> Tensor:
        """The output of a part of this task."""
        return self.compute(Task(call, edits, self.compute, settled))

    def group(self, heads: list[int], chosen: Sequence[int]) -> Tensor:
        """The output of some heads, all of which have the edits at these indices."""
        return self.compute(Group(self.call, heads, [self.edits[i] for i in chosen]))

    def finish(self, output: Tensor) -> Tensor:
        return output


class Group:
    """Heads of one call that share their edits, which are cut to them.

    x: what they attend with, after their edits of operands but for `pending`, a last one whose operands suit no kernel. biases: edits of
    scores that add a number per key on all rows; scores: the others; weights, outputs: by level, as given.
    """

    scope: ClassVar[str] = "group"

    def __init__(self, call: Call, heads: list[int], edits: Sequence[Edit]) -> None:
        self.call, self.heads = call, heads
        self.whole = len(heads) == call.num_heads
        self.few = call.num_queries <= FEW_ROWS
        if self.whole:
            self.edits = [e if e.heads is None else e.at_heads([e.heads.index(h) for h in heads]) for e in edits]
            query, key, value, mask, self.sinks = call.query, call.key, call.value, call.mask, call.sinks
        else:
            self.edits = [e.at_heads(heads if e.heads is None else [e.heads.index(h) for h in heads]) for e in edits]
            kv_heads = self.kv_heads
            query, key, value = take_heads(call.query, heads), take_heads(call.key, kv_heads), take_heads(call.value, kv_heads)
            mask = call.mask if call.mask is None or call.mask.shape[1] == 1 else call.mask[:, heads]
            self.sinks = None if call.sinks is None else call.sinks[heads]
        self.x = Operands(query, key, value, mask, call.is_causal, offset=call.num_keys - call.num_queries)
        operands: list[OperandEdit] = []
        self.biases: list[ScoreEdit] = []
        self.scores: list[ScoreEdit] = []
        self.weights: list[WeightEdit] = []
        self.outputs: list[OutputEdit] = []
        for edit in self.edits:
            if isinstance(edit, WeightEdit):
                self.weights.append(edit)
            elif isinstance(edit, ScoreEdit):
                (self.scores if edit.rows is not None or edit.per_key is None else self.biases).append(edit)
            elif isinstance(edit, OutputEdit):
                self.outputs.append(edit)
            elif isinstance(edit, OperandEdit):
                operands.append(edit)
        self.pending = operands.pop() if operands and operands[-1].widens else None
        # as the call has them
        self.original = not operands and self.pending is None
        for edit in operands:
            self.x = edit.at_kv_heads(self.kv_heads).on_operands(self.x)

    @property
    def kv_heads(self) -> list[int]:
        """The key heads of these heads: see `key_heads`."""
        shared = self.call.key.shape[1]
        return list(range(shared)) if self.whole else key_heads(self.heads, self.call.num_heads // shared)

    def complete(self) -> Operands:
        """What these heads attend with after all their edits of operands."""
        return self.x if self.pending is None else self.pending.at_kv_heads(self.kv_heads).on_operands(self.x)

    def finish(self, output: Tensor) -> Tensor:
        """The output after its edits, in the query's dtype."""
        if self.outputs:
            rows = self.rows(all_rows(self.x.query))
            for edit in self.outputs:
                output = at_chosen(edit, rows, edit.on_output(output, rows), output)
        return output.to(self.call.query.dtype)

    def rows(self, index: Tensor) -> Rows:
        """The rows `index` as formulas see them that do not ask what is visible."""
        x = self.x
        return Rows(index, None, x.query, x.key, x.value, self.call.scaling, x.offset, x.appended, x.mask, x.is_causal)

    def bias(self) -> Tensor | None:
        return sum_biases(self.biases, self.x)

    @property
    def hides_columns(self) -> bool:
        """Whether the kernel takes key biases without a mask of its own for every row."""
        return self.call.softcap is None and self.sinks is None and self.x.query.shape[-1] == self.x.value.shape[-1]

    @property
    def is_attended(self) -> bool:
        """Whether an intervention has left the untouched output and log-sum-exp of these heads on the call."""
        return self.original and any(set(self.heads) <= set(known) for known in self.call.attended)

    def kernel(self, bias: Tensor | None, need_lse: bool) -> tuple[Tensor, Tensor | None]:
        """Fused attention of these heads under key biases, with its log-sum-exp on request."""
        call, x = self.call, self.x
        if bias is not None:
            return attend_biased(x, bias, self.few, call.scaling, call.softcap, self.sinks, need_lse)
        if self.original and self.whole and not need_lse:
            return plain(call), None
        if self.original and need_lse:
            if self.whole:
                self._ask_original()
            for known, (output, lse) in call.attended.items():
                if known == tuple(self.heads):
                    return output, lse
                if set(self.heads) <= set(known):
                    index = [known.index(h) for h in self.heads]
                    return output[:, index], lse[:, index]
        return attend(x.query, x.key, x.value, x.mask, x.is_causal, call.scaling, call.softcap, self.sinks, need_lse)

    def _ask_original(self) -> None:
        """Leaves the output and log-sum-exp of the model's own kernel on the call, where it gives both and nobody wants gradients."""
        call = self.call
        if call.original_with_lse is None or call.attended or needs_gradient(call.query, call.key, call.value, call.mask):
            return
        found = call.original_with_lse()
        if found is not None:
            call.attended[tuple(range(call.num_heads))] = found


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


def named_rows(edits: Sequence[Edit], query: Tensor) -> Tensor:
    """Rows [R] that any of the edits names, in any batch row."""
    num_queries, device = query.shape[2], query.device
    rows = [edit.rows for edit in edits if edit.rows is not None]
    if len(rows) < len(edits):
        return torch.arange(num_queries, device=device)

    def find(first: Tensor) -> Tensor:
        named = first.any(dim=0)
        for other in rows[1:]:
            named = named | values_of(other).any(dim=0)
        return named.expand(num_queries).nonzero()[:, 0].to(device)

    if all(other is rows[0] for other in rows):
        return found_in(rows[0], ("named", num_queries, device), find)
    return find(values_of(rows[0]))


def group_heads(num_heads: int, edits: Sequence[Edit]) -> dict[tuple[int, ...], list[int]]:
    """Heads with the same edits: {indices of edits: heads}."""
    return _grouped(num_heads, tuple(edit.heads for edit in edits))


@functools.lru_cache(maxsize=1024)
def _grouped(num_heads: int, named: tuple[Sequence[int] | None, ...]) -> dict[tuple[int, ...], list[int]]:
    """Made once: every layer of every step asks for it. Not to be changed by those who get it."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for head in range(num_heads):
        groups.setdefault(tuple(i for i, heads in enumerate(named) if heads is None or head in heads), []).append(head)
    return groups


def take_heads(x: Tensor, heads: list[int]) -> Tensor:
    """Key heads [B, len(heads), ...] as a view where they are neighbours."""
    if heads == list(range(heads[0], heads[-1] + 1)):
        return x[:, heads[0] : heads[-1] + 1]
    if x.stride(1) == 0:
        return x[:, :1].expand(-1, len(heads), *x.shape[2:])  # all heads are one
    return x.index_select(1, heads_index(tuple(heads), x.device))
