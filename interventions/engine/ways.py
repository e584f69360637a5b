"""The fused executor: the numbers of `reference` without the n x n matrix, by the first way of one ordered table that fits.

A way sees the kinds, shapes, dtypes and device of what it is asked for before it is chosen, and its values only in `prepare`. Ways of the
whole call come first. The cuts among them - batch rows, heads with the same edits - take their parts through the table again; what is
left to a group of heads are its edits of scores and weights: those of operands are made before, those of outputs after.

A further way is a file with its functions and a row here. An edit that no other row knows is materialised: that asks for nothing but its
level and its formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..call import Call
from ..edits import Edit, Mix, MixValue, ScaleQuery
from . import (
    all_heads,
    bands,
    batch,
    blocks,
    columns,
    factors,
    folded,
    heads,
    lifted,
    materialised,
    one_kernel,
    one_query,
    one_row,
    own_columns,
    rearranged,
    uniform,
)
from .autocast import autocast_dtype, cast, without_autocast
from .kernels import attend
from .reference_executor import at_chosen, check_edits, chosen_pairs, rows_apart
from .tasks import Group, Task, all_rows, plain

READY = ()


def _ready(asked: Task | Group) -> Any:
    return READY


@dataclass(frozen=True)
class Way:
    """One exact way to an output [B, heads, Tq, Dv].

    scope: "call" (given a `Task`) or "group" (a `Group`: its output is that before edits of outputs). fits: whether it can, without
    reading a value. prepare: what it needs of the values, None where these make it a bad way: the next one is asked then. run: given what
    was prepared. cut: its parts go through the table again, so that it computes nothing itself.
    """

    name: str
    scope: str
    fits: Callable[[Any], bool]
    run: Callable[[Any, Any], Tensor]
    prepare: Callable[[Any], Any] = _ready
    cut: bool = False


def _is_scaled(task: Task) -> bool:
    """Whether all that is asked for is one factor on all scores, which a kernel takes as its scale."""
    if len(task.edits) != 1:
        return False
    edit = task.edits[0]
    scales = isinstance(edit, ScaleQuery) and not isinstance(edit.factor, Tensor)
    return scales and edit.heads is None and edit.rows is None


def _scaled(task: Task, _: object) -> Tensor:
    call, (edit,) = task.call, task.edits
    assert isinstance(edit, ScaleQuery)
    scale = call.scaling * float(edit.factor)
    return attend(call.query, call.key, call.value, call.mask, call.is_causal, scale, call.softcap, call.sinks)[0]


def _moves_towards_values(group: Group) -> bool:
    """Whether each row's weights are mixed with its own token alone."""
    for edit in group.weights:
        if not isinstance(edit, Mix) or not isinstance(edit.target, str) or edit.target != "identity":
            return False
    x = group.x
    return not group.scores and x.mask is None and x.offset is not None and not x.query.requires_grad


def _towards_values(group: Group, _: object) -> Tensor:
    """Mixes with the identity need no weights: (1 - s) o + s v."""
    output, rows = group.kernel(group.bias(), False)[0], group.rows(all_rows(group.x.query))
    for mix in group.weights:
        assert isinstance(mix, Mix)
        towards = mix.remember("as values", lambda mix=mix: MixValue(strength=mix.strength, rows=mix.rows))
        output = at_chosen(mix, rows, towards.on_output(output, rows), output)
    return output


def _rows_with_operands(task: Task, apart: Any) -> Tensor:
    """Rows with other operands than the rest: attention is computed with the edit and without, all rows or none in one go."""
    edit, (all_of_them, none_of_them) = apart
    # heads that it does not name look at others as they are without it
    alone = edit.heads is None or not task.crosses
    if alone and edit.rows.device.type == "cpu" and bool(edit.rows.all()):
        return task.again(task.call, all_of_them, task.settled)
    new, old = (task.again(task.call, edits, task.settled) for edits in (all_of_them, none_of_them))
    return torch.where(chosen_pairs(task.call, edit), new, old)


def _is_replaced(group: Group) -> bool:
    """Whether something takes attention's place on all rows: its own edit of outputs computes it."""
    return group.pending is None and any(edit.replaces and edit.rows is None for edit in group.outputs)


def _folded(group: Group, _: object) -> Tensor:
    """The heads with biases of low rank in their q and k go through the table again."""
    return compute(folded.folded(group))[..., : group.x.value.shape[3]]


WAYS: list[Way] = [
    Way("untouched", "call", lambda task: not task.edits, lambda task, _: plain(task.call)),
    Way(one_row.ROW, "call", one_row.is_row, one_row.run, one_row.find),
    Way(
        one_row.WINDOW,
        "call",
        one_row.is_newest,
        lambda task, band: one_row.through_window(task.call, band),
        one_row.find_newest,
    ),
    Way(lifted.NAME, "call", lifted.is_lifted, lifted.run, lifted.find),
    Way("other scale", "call", _is_scaled, _scaled),
    Way(one_query.NAME, "call", one_query.is_one, one_query.run),
    Way("replaced in batch rows", "call", batch.takes_place, batch.run_replaced, batch.find_replaced, cut=True),
    Way("batch rows", "call", batch.can_cut, batch.run_rows, batch.find_rows, cut=True),
    Way("batch rows and heads", "call", batch.may_leave_pairs, batch.run_pairs, batch.find_pairs, cut=True),
    Way(
        "rows with operands of their own",
        "call",
        lambda task: task.names_rows,
        _rows_with_operands,
        lambda task: rows_apart(list(task.edits)),
        cut=True,
    ),
    Way("outputs across heads", "call", all_heads.crosses_in_outputs, all_heads.across_outputs),
    Way("across heads", "call", lambda task: task.crosses, all_heads.across, all_heads.crossing_rows),
    Way("same edits on some heads", "call", all_heads.is_alone, all_heads.alone, cut=True),
    Way("few rows of all heads", "call", all_heads.can_share, all_heads.shared),
    Way("heads", "call", lambda task: True, heads.run, cut=True),
    Way(
        "replaced",
        "group",
        _is_replaced,
        lambda group, _: group.x.query.new_zeros(*group.x.query.shape[:3], group.x.value.shape[3]),
    ),
    Way(rearranged.NAME, "group", rearranged.is_rearranged, rearranged.run),
    Way("materialised", "group", lambda group: group.pending is not None, materialised.run, materialised.named),
    Way(
        "kernel",
        "group",
        lambda group: not (group.biases or group.scores or group.weights),
        lambda group, _: group.kernel(None, False)[0],
    ),
    Way("columns in one kernel", "group", one_kernel.is_known, one_kernel.run, one_kernel.restate),
    Way(
        "key biases",
        "group",
        lambda group: not (group.scores or group.weights),
        lambda group, _: group.kernel(group.bias(), False)[0],
    ),
    Way("band", "group", bands.is_band, bands.run),
    Way("folded biases", "group", folded.is_low_rank, _folded, cut=True),
    Way("gathered", "group", blocks.is_gathered, blocks.run),
    Way("towards the mean", "group", uniform.moves_to_mean, uniform.towards_mean),
    Way("towards values", "group", _moves_towards_values, _towards_values),
    Way(own_columns.NAME, "group", own_columns.is_own, own_columns.run, own_columns.plan),
    Way("around columns", "group", factors.is_avoidable, factors.around, factors.find),
    Way("factor on columns", "group", factors.is_factor, factors.corrected, factors.find),
    Way(
        "columns", "group", lambda group: not group.few and columns.can_restate(group), columns.corrected, columns.plan_columns
    ),
    Way("materialised", "group", lambda group: True, materialised.run, materialised.named),
]

_OF_SCOPE = {scope: [way for way in WAYS if way.scope == scope] for scope in ("call", "group")}


def fused(call: Call, edits: Sequence[Edit]) -> Tensor:
    """Output [B, H, Tq, Dv] in the query's dtype, or that of autocast. Raises ReattendError for heads that do not exist."""
    dtype = autocast_dtype(call.query.device)
    if dtype is not None:
        with without_autocast(call.query.device):
            return fused_as_it_is(cast(call, dtype), edits)
    return fused_as_it_is(call, edits)


def fused_as_it_is(call: Call, edits: Sequence[Edit]) -> Tensor:
    """`fused` where nobody casts, which is not asked."""
    if edits:
        run = one_row.known(call, edits)
        if run is not None:
            return run(call, edits)
    return compute(Task(call, check_edits(call, list(edits)), compute))


def compute(asked: Task | Group) -> Tensor:
    """What is asked for, by the first way that fits and whose values suit it; `call.ways` counts it."""
    for way in _OF_SCOPE[asked.scope]:
        if way.fits(asked):
            prepared = way.prepare(asked)
            if prepared is not None:
                counter = asked.call.ways
                if counter is not None and not way.cut:
                    counter[way.name] += 1
                return asked.finish(way.run(asked, prepared))
    raise AssertionError("the last way of each scope takes everything")
