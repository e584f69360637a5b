"""Edits refuse bad arguments with one clear sentence, and never give NaN at their extremes."""

from __future__ import annotations

import pytest
import torch
from every_edit import a_call, examples
from reattend import interventions
from reattend.interventions import (
    AppendKV,
    Band,
    Call,
    Edit,
    Gain,
    HeadGain,
    HeadMix,
    Keep,
    KeyBias,
    Mix,
    MixValue,
    PairBias,
    PoolKV,
    ProjectKey,
    ReattendError,
    Reorder,
    ReplaceKV,
    ScaleQuery,
    Transfer,
    WeightMap,
    fused,
    reference,
    reference_with_weights,
    row_weights,
)
from reattend.interventions.edits import Operands, Rows
from reattend.interventions.engine.columns import single_factor
from reattend.interventions.engine.correction import column_weights, correct_factor
from reattend.interventions.engine.kernels import attend

BAD = {
    r"factor must be finite and in \[-inf, inf\], got nan": lambda: Gain(columns=[0], factor=float("nan")),
    'renormalise must be "row"': lambda: Gain(columns=[0], factor=0.5, renormalise="rows"),
    r"strength must be finite and in \[0, 1\], got 1.5": lambda: Transfer(source=[0], strength=1.5),
    'how must be "proportional" or "even"': lambda: Transfer(source=[0], how="fair"),
    r"strength must be finite and in \[0, 1\], got 2": lambda: Mix(target="identity", strength=2.0),
    "target must be one of identity, uniform": lambda: Mix(target="nothing", strength=0.5),
    "heads must be distinct": lambda: HeadGain(factor=1.5, heads=[1, 1]),
    "heads must be distinct and not negative": lambda: HeadGain(factor=1.5, heads=[-1]),
    "rows must be a bool tensor": lambda: HeadGain(factor=1.5, rows=torch.tensor([1, 2])),
    "bias must be finite": lambda: KeyBias(bias=torch.tensor([0.0, float("-inf")])),
    r"bias must have 2 to 4 dimensions": lambda: PairBias(bias=torch.zeros(3)),
    "pattern must be a bool tensor": lambda: Keep(pattern=torch.zeros(3, 3)),
    "window must be 1 or more, got 0": lambda: Band(1, 0),
    "sinks must be 0 or more, got -1": lambda: Band(-1, 1),
    r"strength must be finite and in \[0, 1\], got -0.1": lambda: HeadMix(target=torch.zeros(2, 4), strength=-0.1),
    r"factor must be finite and in \[-inf, inf\], got inf": lambda: HeadGain(factor=float("inf")),
    r"strength must be finite and in \[0, 1\], got -0.5": lambda: MixValue(strength=-0.5),
    "factor must be finite and in": lambda: ScaleQuery(factor=float("nan")),
    "ReplaceKV needs key, value or both": lambda: ReplaceKV(columns=torch.tensor([0])),
    "key and value must be": lambda: AppendKV(key=torch.zeros(1, 1, 2, 4), value=torch.zeros(1, 1, 3, 4)),
    "groups must be a long tensor, one group number per key": lambda: PoolKV(groups=torch.zeros(3)),
    "order must be a long tensor": lambda: Reorder(order=torch.zeros(3)),
    "projection must be": lambda: ProjectKey(projection=torch.zeros(3, 4)),
    "columns must be a bool tensor": lambda: Gain(columns=torch.zeros(3), factor=0.5),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ReattendError, match=message):
        BAD[message]()


def small(n=6, heads=2, **options) -> Call:
    torch.manual_seed(0)
    return Call(*torch.randn(3, 1, heads, n, 8), **options)


def test_errors_at_the_call():
    with pytest.raises(ReattendError, match="head 2 does not exist: attention has heads 0 to 1"):
        fused(small(), [HeadGain(factor=0.5, heads=[2])])
    with pytest.raises(ReattendError, match="column 9 is outside the 6 keys"):
        fused(small(), [Transfer(source=[9], strength=0.5)])
    with pytest.raises(ReattendError, match="a column set has 4 columns, the call has 6 keys"):
        fused(small(), [Gain(columns=torch.ones(4, dtype=torch.bool), factor=0.5, renormalise=None)])
    with pytest.raises(ReattendError, match="projection door"):
        fused(small(), [ProjectKey(projection=torch.eye(8))])
    with pytest.raises(ReattendError, match="changed the shape"):
        fused(small(), [WeightMap(function=lambda w, rows: w[..., :2])])
    with pytest.raises(ReattendError, match="mask must have 4 dimensions"):
        small(mask=torch.ones(6, 6, dtype=torch.bool))


@pytest.mark.parametrize(
    "edit",
    [
        KeyBias(bias=torch.full((6,), -1e4)),
        KeyBias(bias=torch.tensor([1e4, 0, 0, 0, 0, -1e4])),
        Gain(columns=[0, 1, 2, 3, 4, 5], factor=0.0),
        Gain(columns=[0], factor=1e9),
        Transfer(source=[0, 1, 2, 3, 4, 5], strength=1.0),
        Transfer(source=[0], target=[5], strength=1.0),
        Transfer(source=[0], target=[5], strength=1.0, how="even"),
        Keep(pattern=torch.zeros(6, 6, dtype=torch.bool)),
        WeightMap(function=lambda w, rows: w / 0),
        WeightMap(function=lambda w, rows: -w),
        ScaleQuery(factor=1e4),
    ],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_stay_finite(edit, dtype):
    call = small(is_causal=True)
    call.query, call.key, call.value = call.query.to(dtype), call.key.to(dtype), call.value.to(dtype)
    assert torch.isfinite(fused(call, [edit])).all()
    _, weights = reference_with_weights(call, [edit])
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-3, rtol=0)


def test_emptied_rows_keep_their_weights():
    call = small(is_causal=True)
    plain = reference_with_weights(call, [])[1]
    for edit in (
        Gain(columns=list(range(6)), factor=0.0),
        Transfer(source=list(range(6)), strength=1.0),
        Keep(pattern=torch.zeros(6, 6, dtype=torch.bool)),
        WeightMap(function=lambda w, rows: w / 0),
    ):
        assert torch.equal(reference_with_weights(call, [edit])[1], plain)
    # row 0 sees only column 0: there is nobody to give to
    moved = reference_with_weights(call, [Transfer(source=[0], strength=1.0)])[1]
    assert torch.equal(moved[:, :, 0], plain[:, :, 0]) and (moved[:, :, 1:, 0] == 0).all()


def test_single_token_and_single_key():
    call = small(n=1)
    for edit in (Transfer(source=[0], strength=0.5), Mix(target="uniform", strength=0.5), KeyBias(bias=torch.ones(1))):
        torch.testing.assert_close(fused(call, [edit]), call.value, atol=1e-6, rtol=0)


def test_pool_keeps_causality_and_counts():
    call = small(n=6, is_causal=True)
    groups = torch.tensor([0, 1, 1, 1, 2, 3])
    _, weights = reference_with_weights(call, [PoolKV(groups=groups)])
    assert weights.shape[-1] == 4
    assert (weights[0, 0, 2] > 0).tolist() == [True, False, False, False]
    assert (weights[0, 0, 3] > 0).tolist() == [True, True, False, False]
    torch.testing.assert_close(
        fused(call, [PoolKV(groups=groups)]), reference(call, [PoolKV(groups=groups)]), atol=1e-5, rtol=1e-5
    )
    same = Call(call.query, call.key[:, :, :1].expand(-1, -1, 6, -1), call.value)
    # equal keys: a pooled key stands for all its members, so the mean is what it was
    torch.testing.assert_close(fused(same, [PoolKV(groups=groups)]), fused(same, []), atol=1e-5, rtol=1e-5)
    with pytest.raises(ReattendError, match="query row 0 sees no complete group"):
        fused(call, [PoolKV(groups=torch.tensor([0, 0, 1, 2, 3, 4]))])
    with pytest.raises(ReattendError, match="PoolKV has merged the columns"):
        reference(call, [PoolKV(groups=groups), Mix(target="identity", strength=0.5)])


def test_append_replace_reorder_by_hand():
    call = small(n=4)
    key, value = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8)
    by_hand = attend(call.query, torch.cat([call.key, key], 2), torch.cat([call.value, value], 2))[0]
    torch.testing.assert_close(fused(call, [AppendKV(key=key, value=value)]), by_hand)
    replaced = call.value.clone()
    replaced[:, :, 2] = value[:, :, 0]
    torch.testing.assert_close(
        fused(call, [ReplaceKV(columns=torch.tensor([2]), value=value)]), attend(call.query, call.key, replaced)[0]
    )
    order = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(fused(call, [Reorder(order=order)]), fused(call, []), atol=1e-6, rtol=1e-5)


def test_project_key_by_hand():
    key, projection = torch.randn(2, 3, 5, 4), torch.randn(3, 4, 4)
    rows = torch.tensor([True, False, False, True, True])
    new = ProjectKey(projection=projection, strength=0.5, heads=[1], rows=rows).on_key(key)
    expected = key.clone()
    expected[:, 1][:, rows] += 0.5 * key[:, 1][:, rows] @ projection[1].T
    torch.testing.assert_close(new, expected)


def test_the_correction_needs_only_five_tensors():
    """(o, lse, q, K_cols, V_cols) give the edited row: what a paged server or a sharded model can hand over."""
    call = small(n=40, heads=3, is_causal=True)
    output, lse = attend(call.query, call.key, call.value, is_causal=True, need_lse=True)
    columns = torch.tensor([0, 7])
    row = slice(20, 21)
    query, key, value = call.query[:, :, row], call.key[:, :, columns], call.value[:, :, columns]
    weights = column_weights(query, key, lse[:, :, row], call.scaling)
    everything = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    here = Rows(torch.tensor([0]), None, query, key, value, call.scaling, 0)
    for edit in (Gain(columns=columns, factor=0.3), Transfer(source=columns, strength=0.6)):
        corrected, unsafe = correct_factor(output[:, :, row], weights, value, edit, everything, here)
        assert not unsafe.any()
        torch.testing.assert_close(corrected, reference(call, [edit])[:, :, row], atol=1e-5, rtol=1e-5)


def test_single_factor_is_found_where_it_applies():
    call = small(n=40)
    x = Operands(call.query, call.key, call.value, None, False, offset=0)
    assert single_factor([Transfer(source=[0], strength=0.5)], x) is not None
    assert single_factor([Transfer(source=[0], target=[1], strength=0.5)], x) is None
    assert single_factor([Gain(columns=[0], factor=0.5, renormalise=None)], x) is None


def test_row_weights_are_the_reference_rows():
    call = small(n=12, heads=4, is_causal=True)
    edits = [
        KeyBias(bias=torch.randn(12), heads=[1, 2]),
        Transfer(source=[0], strength=0.5, heads=[3]),
        ScaleQuery(factor=1.5, heads=[0]),
    ]
    index = torch.tensor([3, 11])
    torch.testing.assert_close(
        row_weights(call, edits, index), reference_with_weights(call, edits)[1][:, :, index], atol=1e-6, rtol=1e-5
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_equals_the_reference(dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, h, 300, 64, device="cuda", dtype=dtype) for h in (6, 2, 2))
    padding = torch.ones(2, 1, 300, 300, dtype=torch.bool, device="cuda").tril()
    padding[1, :, :, :20] = False
    for call in (
        Call(query, key, value, is_causal=True),
        Call(query, key, value, mask=padding),
        Call(query[:, :, -1:], key, value),
    ):
        exact = Call(call.query.double(), call.key.double(), call.value.double(), call.mask, call.is_causal)
        for edits in (
            [Transfer(source=[0, 30], strength=0.5)],
            [KeyBias(bias=torch.linspace(-1, 1, 300, device="cuda"))],
            [Mix(target="identity", strength=0.3), Gain(columns=[5], factor=0.1)],
            [Keep(pattern=Band(4, 64))],
        ):
            expected, got = reference(exact, edits), fused(call, edits)
            rows = slice(20, None) if call.num_queries > 1 else slice(None)
            tolerance = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
            assert (got.double() - expected)[:, :, rows].abs().max() < tolerance * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_key_biases_on_some_heads_at_decode(rows, dtype):
    """Other biases for other heads, shared and per row and head, in one kernel; heads without any keep their bits."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, h, n, 8, dtype=dtype) for h, n in ((6, rows), (2, 11), (2, 11)))
    mask = torch.ones(2, 1, rows, 11, dtype=torch.bool).tril(11 - rows)
    mask[1, ..., :3] = False
    call = Call(query, key, value, mask)
    edits = [
        KeyBias(bias=torch.randn(11), heads=[1, 4]),
        KeyBias(bias=torch.randn(2, 2, 11), heads=[4, 5]),
        KeyBias(bias=torch.randn(2, 11), heads=[1]),
    ]
    found = fused(call, edits)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, reference(call, edits), atol=tolerance, rtol=tolerance)
    plain = fused(call, [])
    assert torch.equal(found[:, [0, 2, 3]], plain[:, [0, 2, 3]])
    assert (found - plain).abs().amax(dim=(0, 2, 3))[[1, 4, 5]].min() > 0.05


def test_the_same_edit_for_other_heads():
    edit = KeyBias(bias=torch.randn(2, 5))
    some = edit.on_heads([1, 3])
    assert some.heads == (1, 3) and some.bias is edit.bias and edit.on_heads((1, 3)) is some
    assert edit.on_heads(None) is edit and edit.heads is None
    with pytest.raises(ReattendError, match="axis of heads"):
        KeyBias(bias=torch.randn(2, 2, 5), heads=[0, 1]).on_heads([2, 3])


def test_every_edit_has_an_example():
    """The tests of all edits run the examples; `ProjectKey` acts at a projection, not in a call."""
    shown = {type(make()) for make in examples(a_call(6)).values()}
    exported = [getattr(interventions, name) for name in interventions.__all__]
    edits = [c for c in exported if isinstance(c, type) and issubclass(c, Edit) and not c.__name__.endswith("Edit")]
    assert [c.__name__ for c in edits if c not in shown] == ["ProjectKey"]
