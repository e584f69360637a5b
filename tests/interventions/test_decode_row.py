"""One additive row at decode: equal to the reference for all that it takes and every mixture, made once, and never where it would be wrong."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from every_edit import a_call
from reattend.interventions import Band, Call, Edit, Gain, HeadGain, Keep, KeyBias, Lift, ScaleQuery, Transfer, fused, reference
from reattend.interventions.edits.base import KEPT
from reattend.interventions.engine import decode_row as module
from reattend.interventions.engine.decode_row import decode_row, facts_of, takes
from torch import Tensor

DTYPES = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 0.03, torch.float16: 0.004}
KEYS = 14


def some(call: Call) -> Tensor:
    """Columns that differ between batch rows."""
    chosen = torch.zeros(call.batch, call.num_keys, dtype=torch.bool)
    for row in range(call.batch):
        chosen[row, 1 + row : 4 + 2 * row] = True
    return chosen


def kinds(call: Call, heads: list[int] | None = None, rows: Tensor | None = None) -> dict[str, Edit]:
    who = {"heads": heads, "rows": rows}
    count = call.num_heads if heads is None else len(heads)
    return {
        "bias": KeyBias(bias=torch.randn(call.batch, call.num_keys), **who),
        "bias of heads": KeyBias(bias=torch.randn(1, count, call.num_keys), **who),
        "hidden": KeyBias(bias=some(call).float() * -1e4, **who),
        "gain": Gain(columns=some(call), factor=3.0, **who),
        "gain per head": Gain(columns=[0, 2, 5], factor=torch.rand(call.batch, count, 1), **who),
        "nothing": Gain(columns=some(call), factor=0.0, **who),
        "transfer": Transfer(source=[0, 3], **who),
        "window": Keep(pattern=Band(1, 9), **who),
        "window from each first column": Keep(pattern=Band(2, 8, first=torch.arange(call.batch)), **who),
        "sharper": ScaleQuery(factor=1.7, **who),
        "sharper per row": ScaleQuery(factor=torch.rand(call.batch, count, 1), **who),
        "head gain": HeadGain(factor=0.3, **who),
        "head gain per row": HeadGain(factor=torch.randn(call.batch, count), **who),
    }


NAMES = list(kinds(a_call(1, KEYS)))


def rows_of(call: Call) -> Tensor:
    rows = torch.zeros(call.batch, 1, dtype=torch.bool)
    rows[1:] = True
    return rows


def right(call: Call, edits: list[Edit], tolerance: float = 1e-5) -> None:
    call.ways = Counter()
    output = fused(call, edits)
    assert list(call.ways) == ["one additive row"]
    torch.testing.assert_close(output, reference(call, edits), atol=tolerance, rtol=tolerance)
    plain = fused(call, [])
    for row, head in itertools.product(range(call.batch), range(call.num_heads)):
        if not any((e.heads is None or head in e.heads) and (e.rows is None or bool(e.rows[row])) for e in edits):
            assert torch.equal(output[row, head], plain[row, head]), "a pair that no edit names keeps its bits"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["none", "holes", "additive"])
@pytest.mark.parametrize("name", NAMES)
def test_each_kind(name, mask, dtype):
    torch.manual_seed(0)
    for kv in (4, 2, 1):
        call = a_call(1, KEYS, kv=kv, mask="none" if mask == "none" else "holes", dtype=dtype)
        if mask == "additive":
            call.mask = torch.zeros(call.mask.shape, dtype=dtype).masked_fill(~call.mask, torch.finfo(dtype).min)
        for heads, rows in ((None, None), ([1], None), ([3, 0], rows_of(call)), (None, rows_of(call)), ([0, 1, 2, 3], None)):
            right(call, [kinds(call, heads, rows)[name]], DTYPES[dtype])


@pytest.mark.parametrize("first, second", list(itertools.combinations(NAMES, 2)))
def test_two_kinds(first, second):
    torch.manual_seed(1)
    call = a_call(1, KEYS, mask="holes")
    rows = rows_of(call)
    for heads, other in ((None, None), ([1, 2], [2, 3]), ([1], None), ([0], [3])):
        for one, two in ((first, second), (second, first)):
            right(call, [kinds(call, heads)[one], kinds(call, other, rows)[two]])


@pytest.mark.parametrize("mask", ["causal", "holes"])
@pytest.mark.parametrize("name", [n for n in NAMES if "window" not in n])
def test_a_few_rows_alike(name, mask):
    torch.manual_seed(2)
    call = a_call(3, KEYS, mask=mask)
    for heads, rows in ((None, None), ([2, 1], None), ([1], rows_of(call))):
        right(call, [kinds(call, heads, rows)[name], kinds(call)["gain"]])


def at_columns(call: Call, *columns: int) -> Tensor:
    chosen = torch.zeros(call.num_keys, dtype=torch.bool)
    chosen[list(columns)] = True
    return chosen


def test_rows_that_hold_nothing_else_keep_what_they_hold():
    torch.manual_seed(3)
    call = a_call(1, 6, mask="none")
    call.mask = torch.zeros(3, 1, 1, 6, dtype=torch.bool)
    call.mask[0, ..., :2] = True
    call.mask[1, ..., :3] = True
    call.mask[2] = True
    first, second, third = at_columns(call, 0, 1), at_columns(call, 2, 3, 4), at_columns(call, 2, 5)
    for edits in (
        [Transfer(source=first)],
        [Gain(columns=first, factor=0.0)],
        [KeyBias(bias=~first * -1e4), Transfer(source=first)],
        [KeyBias(bias=first * 1e4), Transfer(source=first)],
        # later edits do not bring back what earlier ones took
        [Transfer(source=first), Transfer(source=second)],
        [Transfer(source=second), Transfer(source=first)],
        [Gain(columns=first, factor=0.0), Gain(columns=second, factor=0.0), Transfer(source=third)],
        [Transfer(source=first), Gain(columns=~first, factor=0.0), Gain(columns=third, factor=0.0)],
        [KeyBias(bias=third * -1e4), Transfer(source=~third)],
    ):
        right(call, edits)
    # whoever is outside a window is further out than one who has lost all its weight, or is hidden
    for edits in (
        [Keep(pattern=Band(0, 3))],
        [Keep(pattern=Band(0, 3)), Gain(columns=~first, factor=0.0)],
        [Keep(pattern=Band(0, 3)), Transfer(source=first), Gain(columns=~first, factor=0.0)],
        [Keep(pattern=Band(1, 2)), KeyBias(bias=~first * -1e4)],
    ):
        right(call, edits, 2e-3 if len(edits) == 2 and isinstance(edits[1], KeyBias) else 1e-4)


def test_a_sink_that_holds_nearly_all():
    torch.manual_seed(4)
    call = a_call(1, 10, mask="none")
    call.key[:, :, 0] = 40 * call.query[:, ::2, 0] / call.query[:, ::2, 0].norm(dim=-1, keepdim=True)
    for edit in (
        Transfer(source=[0]),
        Gain(columns=[0], factor=1e-6),
        Gain(columns=[0], factor=0.0),
        KeyBias(bias=torch.eye(10)[0] * -9),
    ):
        right(call, [edit])


def test_what_is_no_row_is_left_to_other_ways():
    call = a_call(1, KEYS)
    column = [0]
    for edit in (
        Transfer(source=column, strength=0.5),  # by how much the others grow differs by row
        Transfer(source=column, target=[3]),
        Gain(columns=column, factor=-1.0),
        Gain(columns=column, factor=torch.tensor([[[-1.0]]])),
        Gain(columns=column, factor=2.0, renormalise=None),
        Gain(columns=column, factor=2.0, renormalise=[4, 5]),
        Lift(columns=column, share=0.3),
    ):
        for edits in ([edit], [KeyBias(bias=torch.rand(KEYS)), edit]):
            call.ways = Counter()
            torch.testing.assert_close(fused(call, edits), reference(call, edits), atol=1e-5, rtol=1e-5)
            assert "one additive row" not in call.ways
    for options in ({"softcap": 5.0}, {"sinks": torch.randn(4)}):
        call = a_call(1, KEYS, **options)
        for edit in (KeyBias(bias=torch.rand(KEYS)), Gain(columns=column, factor=2.0)):
            call.ways = Counter()
            torch.testing.assert_close(fused(call, [edit]), reference(call, [edit]), atol=1e-5, rtol=1e-5)
            assert "one additive row" not in call.ways


def test_a_small_window_is_taken_out_of_a_long_cache():
    call = a_call(1, 40, mask="none")
    for edits, way in (
        ([Keep(pattern=Band(2, 8))], "newest window"),
        ([Keep(pattern=Band(0, 8))], "newest window"),
        ([Keep(pattern=Band(2, 8, first=torch.ones(3).long()))], "band"),
        ([Keep(pattern=Band(2, 30))], "one additive row"),
        ([Keep(pattern=Band(2, 8), heads=[1])], "one additive row"),
    ):
        call.ways = Counter()
        torch.testing.assert_close(fused(call, edits), reference(call, edits), atol=1e-5, rtol=1e-5)
        assert list(call.ways) == [way]


def test_layers_that_share_edits_share_the_row(monkeypatch):
    made = []
    row = module._row
    monkeypatch.setattr(module, "_row", lambda *given: (made.append(given), row(*given))[1])
    call = a_call(1, KEYS, mask="holes")
    edits = [KeyBias(bias=torch.rand(KEYS)), Gain(columns=[0], factor=2.0, heads=[1])]
    for _ in range(3):
        fused(call, edits)
    assert len(made) == 1
    one = edits[0]
    for heads in ([0], [1, 2], [0], None):
        fused(call, [one.on_heads(heads)])
    assert len(made) == 3, "one more for its whole, and one for all its lists of heads"
    # what lives longer than a step keeps few of them
    for keys in range(20, 50):
        fused(a_call(1, keys), [edit := edits[1]])
    assert len(edit.of_any_heads["rows"]) <= KEPT


def test_a_mask_that_changes_in_place_is_read_again():
    torch.manual_seed(5)
    call = a_call(1, KEYS, mask="holes")
    edits = [KeyBias(bias=torch.rand(KEYS))]
    right(call, edits)
    call.mask[..., 2:5] = call.mask[..., 2:5].logical_not()
    right(call, edits)
    call.mask = call.mask.clone().logical_not()
    call.mask[..., 0] = True
    right(call, edits)
    with torch.inference_mode():
        call = a_call(1, KEYS, mask="holes")
        right(call, edits)
        call.mask[..., 3:6] = call.mask[..., 3:6].logical_not()
        right(call, edits)


def test_rows_made_in_inference_mode_serve_gradients():
    call = a_call(1, KEYS, mask="none")
    edits = [Gain(columns=[0], factor=0.5)]
    with torch.inference_mode():
        fused(call, edits)
    call.value.requires_grad_()
    fused(call, edits).sum().backward()
    assert call.value.grad is not None


def test_a_bias_that_is_learned_gets_its_gradient_in_every_pass():
    torch.manual_seed(6)
    call = a_call(1, KEYS, mask="none", dtype=torch.float64)
    bias = torch.randn(KEYS, dtype=torch.float64, requires_grad=True)
    edits = [KeyBias(bias=bias), KeyBias(bias=torch.rand(KEYS).double(), heads=[1])]
    for run in (fused, fused, reference):
        found = torch.autograd.grad(run(call, edits).square().sum(), bias)[0]
        wanted = torch.autograd.grad(reference(call, edits).square().sum(), bias)[0]
        torch.testing.assert_close(found, wanted)


def test_the_row_of_a_call():
    call = a_call(1, 4, mask="none")
    facts = facts_of(call)
    half = Gain(columns=[1], factor=0.5)
    row = decode_row(facts, [half])
    assert row is not None and row.gain is None and row.named is None
    torch.testing.assert_close(row.bias.exp(), torch.tensor([[[1.0, 0.5, 1.0, 1.0]]]))
    row = decode_row(facts, [half.on_heads([2]), HeadGain(factor=3.0, heads=[0], rows=torch.tensor([[True], [False], [True]]))])
    assert row is not None and row.bias is not None and row.gain is not None and row.named is not None
    assert row.bias.shape == (1, 4, 4) and row.gain.tolist() == [[3, 1, 1, 1], [1, 1, 1, 1], [3, 1, 1, 1]]
    assert row.named.tolist() == [[True, False, True, False], [False, False, True, False], [True, False, True, False]]
    assert not takes(Gain(columns=[1], factor=torch.ones(1, 1, 1)), facts._replace(device=torch.device("meta"))), (
        "it would be read"
    )
