"""The table of ways: each row is taken by a named case, is chosen without reading a value, and an edit that no row knows just works."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from every_edit import a_call, rearrange, second, sharper
from reattend.interventions import (
    Band,
    Blocks,
    Call,
    Edit,
    Gain,
    Grouped,
    HeadGain,
    Instead,
    Keep,
    KeyBias,
    Lift,
    LowRankBias,
    Mix,
    PairBias,
    ReplaceKV,
    ScaleQuery,
    ScoreGain,
    Transfer,
    WeightMap,
    fused,
    reference,
)
from reattend.interventions.edits import OutputEdit, Rows, ScoreEdit, WeightEdit
from reattend.interventions.engine.tasks import Group, Task
from reattend.interventions.engine.ways import WAYS, compute
from reattend.interventions.families.guidance import BlurQuery, MixOwnAnd
from torch import Tensor

FIRST = torch.arange(1)


def bias(call: Call, **who) -> KeyBias:
    return KeyBias(bias=torch.rand(call.num_keys), **who)


def rows(call: Call) -> Tensor:
    """The last batch row from its second query row on."""
    named = torch.zeros(call.batch, call.num_queries, dtype=torch.bool)
    named[-1, call.num_queries // 2 :] = True
    return named


def one_query(call: Call) -> list[Edit]:
    """Where nothing is causal, as in denoisers."""
    call.is_causal = False
    return [BlurQuery(grid=torch.arange(12).view(3, 4), sigma=math.inf, rows=rows(call))]


def own_and_few(call: Call) -> list[Edit]:
    """Where nothing is causal, as in denoisers."""
    call.is_causal = False
    return [MixOwnAnd(columns=torch.arange(call.num_keys) < 4, strength=1.0)]


def grouped(call: Call, **who) -> Grouped:
    return Grouped(shares=torch.ones(call.num_queries, 1), columns=torch.arange(call.num_keys)[:, None] < 4, **who)


def over_heads(output: Tensor, other: Tensor, rows: Rows) -> Tensor:
    return output + other.mean(dim=1, keepdim=True)


# name of a way -> (query rows of its example, edits that take it)
EXAMPLES = {
    "untouched": (12, lambda call: []),
    "batch rows": (12, lambda call: [Gain(columns=FIRST, factor=0.5, rows=rows(call))]),
    "replaced in batch rows": (12, lambda call: [grouped(call, rows=torch.arange(call.batch)[:, None] == 0)]),
    "one additive row": (1, lambda call: [bias(call, heads=[1]), Gain(columns=FIRST, factor=0.5, heads=[2])]),
    "lifted share": (1, lambda call: [Lift(columns=torch.arange(3), share=0.6)]),
    "newest window": (1, lambda call: [Keep(pattern=Band(1, 3))]),
    "one query": (12, one_query),
    "batch rows and heads": (1, lambda call: [ScoreGain(factor=torch.rand(call.num_keys), rows=rows(call))]),
    "across heads": (12, lambda call: [WeightMap(function=lambda w, _: (w + w.mean(1, keepdim=True)) / 2, reads="heads")]),
    "few rows of all heads": (1, lambda call: [ScoreGain(factor=torch.rand(call.num_keys), heads=[1, 2])]),
    "rows with operands of their own": (
        12,
        lambda call: [ReplaceKV(columns=FIRST, value=torch.randn(1, 2, 1, 8), rows=rows(call))],
    ),
    "outputs across heads": (
        12,
        lambda call: [second(call, 4, combine=over_heads, reads="heads")],
    ),
    "replaced": (12, lambda call: [Instead(compute=sharper)]),
    "folded biases": (12, lambda call: [LowRankBias(U=torch.rand(12, 2), V=torch.rand(12, 2))]),
    "gathered": (12, lambda call: [Keep(pattern=Blocks(torch.eye(3).bool(), 4))]),
    "heads": (12, lambda call: [HeadGain(factor=0.5, heads=[1])]),
    "rearranged blocks": (12, lambda call: [rearrange(call, call.num_heads)]),
    "other scale": (12, lambda call: [ScaleQuery(factor=0.5)]),
    "kernel": (12, lambda call: [ScaleQuery(factor=0.5, heads=[1])]),
    "key biases": (12, lambda call: [bias(call)]),
    "band": (12, lambda call: [Keep(pattern=Band(1, 3))]),
    "towards values": (12, lambda call: [Mix(target="identity", strength=0.4)]),
    "own and columns": (12, own_and_few),
    "around columns": (12, lambda call: [Transfer(source=FIRST, strength=0.5)]),
    "factor on columns": (12, lambda call: [Gain(columns=FIRST, factor=0.5)]),
    "columns": (12, lambda call: [Gain(columns=FIRST, factor=0.5, renormalise=None)]),
    "materialised": (12, lambda call: [PairBias(bias=torch.rand(call.num_queries, call.num_keys))]),
}


def taken(call: Call, edits: list) -> tuple[Tensor, list[str]]:
    """The output, and the names of all rows that were taken on the way, cuts too."""
    names = []
    call.ways = Counter()

    def noting(asked):
        way = next(w for w in WAYS if w.scope == asked.scope and w.fits(asked) and w.prepare(asked) is not None)
        names.append(way.name)
        if isinstance(asked, Task):
            asked.compute = noting
        return compute(asked)

    return noting(Task(call, edits, noting)), names


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_way_is_taken_and_right(name):
    torch.manual_seed(0)
    queries, make = EXAMPLES[name]
    call = a_call(queries)
    edits = make(call)
    output, names = taken(call, edits)
    assert name in names
    torch.testing.assert_close(output, reference(call, edits), atol=2e-6, rtol=1e-5)
    if not next(way for way in WAYS if way.name == name).cut:
        call.ways = Counter()
        fused(call, edits)
        assert call.ways[name] == 1


def test_every_way_has_an_example():
    # on accelerators: test_triton.py, test_ways_of_accelerators.py
    elsewhere = {"columns in one kernel", "same edits on some heads", "towards the mean"}
    assert {way.name for way in WAYS} == set(EXAMPLES) | elsewhere


class Unreadable(torch.Tensor):
    """A tensor whose values nobody may ask for: what would do so fails."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in (
            "item",
            "tolist",
            "__bool__",
            "__int__",
            "__float__",
            "__index__",
            "nonzero",
            "cpu",
            "numpy",
        ):
            raise AssertionError("a value was read")
        return super().__torch_function__(function, types, args, kwargs or {})


def unreadable(edit: Edit) -> None:
    for name, value in list(vars(edit).items()):
        if isinstance(value, Tensor):
            object.__setattr__(edit, name, value.as_subclass(Unreadable))


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_way_is_chosen_without_reading_a_value(name):
    queries, make = EXAMPLES[name]
    call = a_call(queries, mask="holes")
    for edits in (make(call), [*make(call), bias(call, heads=[3])]):
        for edit in edits:
            unreadable(edit)
        call.mask = call.mask.as_subclass(Unreadable)  # type: ignore[union-attr]
        call.query, call.key, call.value = (t.as_subclass(Unreadable) for t in (call.query, call.key, call.value))
        task = Task(call, edits, compute)
        groups = [Group(call, heads, [edits[i] for i in chosen]) for chosen, heads in task.groups.items()]
        for asked in (task, *groups):
            for way in WAYS:
                if way.scope == asked.scope:
                    way.fits(asked)


def test_what_must_not_be_read_cannot_be():
    value = torch.ones(2, dtype=torch.bool).as_subclass(Unreadable)
    for read in (lambda: bool(value.any()), lambda: int(value.sum()), lambda: value.nonzero(), lambda: value.sum().item()):
        with pytest.raises(AssertionError, match="a value was read"):
            read()


@dataclass(frozen=True, eq=False, kw_only=True)
class Squared(WeightEdit):
    def on_weights(self, weights: Tensor, rows: Rows) -> Tensor:
        return weights.square()


@dataclass(frozen=True, eq=False, kw_only=True)
class NearestFirst(ScoreEdit):
    def on_scores(self, scores: Tensor, rows: Rows) -> Tensor:
        return scores - 0.1 * (rows.own[:, None] - torch.arange(scores.shape[3])).abs()


@dataclass(frozen=True, eq=False, kw_only=True)
class Clipped(OutputEdit):
    def on_output(self, output: Tensor, rows: Rows) -> Tensor:
        return output.clamp(-0.2, 0.2)


@pytest.mark.parametrize("queries", [1, 2, 12])
@pytest.mark.parametrize("own", [Squared, NearestFirst, Clipped])
def test_an_edit_with_a_formula_alone_works(own, queries):
    torch.manual_seed(0)
    for mask in ("causal", "holes"):
        call = a_call(queries, mask=mask)
        beside = [Gain(columns=FIRST, factor=0.5, heads=[0]), ScaleQuery(factor=1.5, heads=[3])]
        for heads, named in ((None, None), ([1, 3], None), ([1], rows(call)), (None, rows(call))):
            for others in ([], beside):
                edits = [*others, own(heads=heads, rows=named)]
                torch.testing.assert_close(fused(call, edits), reference(call, edits), atol=2e-6, rtol=1e-5)


def test_parts_are_counted_where_they_are_computed():
    call = a_call(12)
    call.ways = Counter()
    fused(call, [HeadGain(factor=0.5, heads=[1]), bias(call, heads=[2])])
    assert call.ways == {"kernel": 1, "key biases": 1}
    named = rows(call)
    fused(call, [bias(call, rows=named)])
    assert call.ways == {"kernel": 1, "key biases": 1, "materialised": 1}
