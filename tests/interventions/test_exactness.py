"""fused == reference, for random shapes, masks, head groups, edits and compositions (hypothesis draws a seed and a few switches)."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reattend.interventions import (
    AppendKV,
    Band,
    Blocks,
    Call,
    Chosen,
    Gain,
    HeadGain,
    HeadMix,
    Keep,
    KeyBias,
    Lift,
    LowRankBias,
    Mix,
    MixValue,
    PairBias,
    PoolKV,
    Reorder,
    ReplaceKV,
    ScaleQuery,
    ScoreGain,
    Second,
    SetScores,
    TakeOutput,
    Transfer,
    WeightMap,
    fused,
    reference,
    reference_with_weights,
    row_outputs,
)


def make_call(rng: random.Random, dtype=torch.float32, self_attention: bool | None = None) -> Call:
    batch, kv, shared, dim = rng.choice([1, 2, 3]), rng.choice([1, 2, 3]), rng.choice([1, 2, 3]), rng.choice([4, 8, 16])
    queries = rng.choice([1, 2, 3, 7, 20, 33])
    extra = rng.choice([0, 0, 1, 5, 12])
    keys = queries + (0 if self_attention else extra)
    query, key, value = (torch.randn(batch, h, n, dim) for h, n in ((kv * shared, queries), (kv, keys), (kv, keys)))
    query = query * rng.choice([1.0, 3.0])
    if rng.random() < 0.3:  # memory layouts as models produce them: heads inside tokens, or channels last
        order = rng.choice([(0, 2, 1, 3), (0, 1, 3, 2)])
        query, key, value = (x.permute(order).contiguous().permute(order) for x in (query, key, value))
    mask, causal = None, rng.random() < 0.6
    kind = rng.choice(["none", "none", "bool", "additive", "padding"])
    if kind == "bool":
        mask = torch.rand(batch, 1, queries, keys) > 0.3
        mask[..., 0] = True
    elif kind == "additive":
        mask = torch.randn(batch, rng.choice([1, kv * shared]), queries, keys)
        mask[torch.rand_like(mask) > 0.8] = torch.finfo(torch.float32).min
        mask[..., 0] = 0
        mask = mask.to(dtype)
    elif kind == "padding":
        pads = torch.tensor([rng.randrange(0, max(1, keys // 3) + 1) for _ in range(batch)])
        mask = (torch.arange(keys)[None] >= pads[:, None])[:, None, None, :].expand(batch, 1, queries, keys)
    if mask is not None and causal:
        tril = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        mask = mask & tril if mask.dtype == torch.bool else mask.masked_fill(~tril, torch.finfo(dtype).min)
        causal = False
    return Call(
        query.to(dtype), key.to(dtype), value.to(dtype), mask, causal,
        softcap=rng.choice([None, None, None, 2.0]),
        sinks=torch.randn(kv * shared) if rng.random() < 0.2 else None,
    )  # fmt: skip


def some_columns(rng, call, heads):
    n = call.num_keys
    shape = rng.choice([(n,), (call.batch, n), (call.batch, heads, n)])
    columns = torch.zeros(shape, dtype=torch.bool)
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        columns[..., rng.randrange(n)] = True
    if len(shape) > 1:
        columns &= torch.rand(shape) > 0.3
    return ~columns if rng.random() < 0.15 else columns


def some_rows(call):
    """For each row one that sees a key, since nobody knows what the others give."""
    alive = rows_with_a_key(call).expand(call.batch, 1, call.num_queries, 1)[:, 0, :, 0].all(dim=0).nonzero()[:, 0]
    return alive[torch.randint(len(alive), (call.num_queries,))] if len(alive) else torch.arange(call.num_queries)


def some_blocks(rng, call, heads, shared):
    rows, columns = (rng.choice([1, 3, 5, 16]) for _ in range(2))
    lists = rng.choice([1, heads, call.key.shape[1] if shared else 1])
    keep = torch.rand(
        rng.choice([1, call.batch]), lists, -(-call.num_queries // rows), -(-call.num_keys // columns)
    ) > rng.choice([0.3, 0.7])
    return Blocks(
        keep, (rows, columns), rng.choice([None, [0], torch.rand(call.batch, call.num_keys) > 0.8]),
        rng.choice([None, torch.rand(call.num_queries) > 0.8]),
    )  # fmt: skip


def make_edit(rng: random.Random, call: Call):
    n, t = call.num_keys, call.num_queries
    named = None if rng.random() < 0.5 else sorted(rng.sample(range(call.num_heads), rng.randint(1, call.num_heads)))
    h = call.num_heads if named is None else len(named)
    rows = None
    if rng.random() < 0.3:
        rows = torch.rand(rng.choice([(t,), (call.batch, t), (call.batch, 1)])) > 0.5
    who = {"heads": named, "rows": rows}
    strength = rng.choice([0.0, 0.3, 1.0, torch.rand(call.batch, h, t), torch.rand(t)])
    kinds = {
        "scale": lambda: ScaleQuery(factor=rng.choice([0.0, 0.5, 1.3, torch.rand(call.batch, h, 1)]), **who),
        "keybias": lambda: KeyBias(bias=torch.randn(rng.choice([(n,), (call.batch, n), (call.batch, h, n)])) * rng.choice([1, 5]), **who),
        "scoregain": lambda: ScoreGain(factor=torch.rand(rng.choice([(n,), (call.batch, n), (call.batch, h, n)])), **who),
        "pairbias": lambda: PairBias(bias=torch.randn(rng.choice([(t, n), (call.batch, h, t, n)])), **who),
        "band": lambda: Keep(
            pattern=Band(
                rng.choice([0, 1, 3]), rng.choice([1, 4, 9]), dense_after=rng.choice([None, n // 2, torch.randint(-3, n, (call.batch,))]),
                dense_until=rng.choice([None, n // 2 + 2, torch.randint(0, n + 2, (call.batch,))]),
            ),
            **who,
        ),
        "keep": lambda: Keep(pattern=torch.rand(t, n) > 0.5, **who),
        "blocks": lambda: Keep(pattern=some_blocks(rng, call, h, named is None), **who),
        "chosen": lambda: Keep(
            pattern=Chosen(torch.rand(rng.choice([1, call.batch]), rng.choice([1, h]), n).argsort(dim=-1)[..., : rng.randint(0, n)]), **who
        ),
        "lowrank": lambda: LowRankBias(
            U=torch.randn(rng.choice([(t, 2), (call.batch, h, t, 2)])), V=torch.randn(rng.choice([(n, 2), (call.batch, n, 2), (1, h, n, 2)])),
            **who,
        ),
        "setscores": lambda: SetScores(scores=torch.randn(t, 1), columns=some_columns(rng, call, h), **who),
        "second": lambda: Second(
            key=torch.randn(1, 1, 3, call.key.shape[3]), value=torch.randn(1, 1, 3, call.value.shape[3]),
            mask=rng.choice([None, torch.rand(t, 3) > 0.4]), combine=rng.choice([0.5, torch.rand(call.batch, h, t)]), **who,
        ),
        "take": lambda: TakeOutput(source=some_rows(call), **who),
        "gain": lambda: Gain(
            columns=some_columns(rng, call, h), factor=rng.choice([0.0, 0.1, 0.7, 3.0, torch.rand(call.batch, h, t)]),
            renormalise=rng.choice(["row", None, some_columns(rng, call, h)]), **who,
        ),
        "gain below zero": lambda: Gain(
            columns=some_columns(rng, call, h), factor=rng.choice([-0.5, -2.0, -torch.rand(call.batch, h, t)]), renormalise=None, **who
        ),
        "transfer": lambda: Transfer(
            source=some_columns(rng, call, h), target=rng.choice([None, some_columns(rng, call, h)]), strength=strength,
            how=rng.choice(["proportional", "even"]), **who,
        ),
        "lift": lambda: Lift(
            columns=some_columns(rng, call, h), share=rng.choice([0.1, 0.5, 0.95, torch.rand(call.batch, h, t) * 0.99]),
            exact=rng.choice([False, True]), largest=rng.choice([3.0, 100.0]), least=rng.choice([0.0, 0.0, 0.02]), **who,
        ),
        "mix": lambda: Mix(target=rng.choice(["identity", "uniform", "mean_query", torch.rand(t, n)]), strength=strength, **who),
        "map": lambda: WeightMap(function=lambda w, rows: w.square(), **who),
        "headgain": lambda: HeadGain(factor=rng.choice([0.0, 1.4, torch.randn(h), torch.randn(call.batch, h)]), **who),
        "headmix": lambda: HeadMix(target=torch.randn(h, call.value.shape[3]), strength=rng.choice([0.2, torch.rand(h)]), **who),
        "mixvalue": lambda: MixValue(strength=strength, **who),
        "append": lambda: AppendKV(
            key=torch.randn(call.batch, call.key.shape[1], 2, call.key.shape[3]),
            value=torch.randn(call.batch, call.key.shape[1], 2, call.value.shape[3]),
        ),
        "replace": lambda: ReplaceKV(columns=torch.tensor([rng.randrange(n)]), value=torch.randn(1, call.key.shape[1], 1, call.value.shape[3])),
        "reorder": lambda: Reorder(order=torch.randperm(n)),
        "append for some": lambda: AppendKV(
            key=torch.randn(1, call.key.shape[1], 2, call.key.shape[3]), value=torch.randn(1, call.key.shape[1], 2, call.value.shape[3]),
            visible=rng.choice([None, torch.rand(t, 2) > 0.3]), **who,
        ),
        "replace per head": lambda: ReplaceKV(
            columns=torch.rand(call.batch, h, n).argsort(dim=-1)[..., :1], value=torch.randn(1, call.key.shape[1], 1, call.value.shape[3]),
            **who,
        ),
        "reorder per head": lambda: Reorder(order=torch.rand(call.batch, h, n).argsort(dim=-1), **who),
    }  # fmt: skip
    return kinds[rng.choice(list(kinds))]()


def rows_with_a_key(call: Call) -> torch.Tensor:
    """Bool [B, 1, Tq, 1]: rows that see at least one key (what a fully masked row gives is nobody's business but must be finite)."""
    if call.mask is None:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool)
    visible = call.mask if call.mask.dtype == torch.bool else call.mask > torch.finfo(call.mask.dtype).min / 2
    return visible.any(dim=-1, keepdim=True).all(dim=1, keepdim=True)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**9), count=st.integers(1, 4))
def test_fused_equals_reference(seed, count):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    call = make_call(rng)
    edits = [make_edit(rng, call) for _ in range(count)]
    expected, got = reference(call, edits), fused(call, edits)
    assert torch.isfinite(expected).all() and torch.isfinite(got).all()
    keep = rows_with_a_key(call)
    torch.testing.assert_close(got * keep, expected * keep, atol=1e-5, rtol=1e-5)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**9), count=st.integers(0, 3))
def test_single_rows_are_rows_of_the_whole(seed, count):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    call = make_call(rng)
    edits = [make_edit(rng, call) for _ in range(count)]
    index = torch.tensor(sorted(rng.sample(range(call.num_queries), rng.randint(1, call.num_queries))))
    keep = rows_with_a_key(call).expand(-1, -1, call.num_queries, -1)[:, :, index]
    expected = reference(call, edits)[:, :, index]
    torch.testing.assert_close(row_outputs(call, edits, index) * keep, expected * keep, atol=1e-5, rtol=1e-5)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**9), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_stays_within_its_own_error(seed, dtype):
    """Against a float64 reference on the same inputs, an edited call errs no more than rounding its result and the untouched kernel do."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    call = make_call(rng, dtype)
    edits = [make_edit(rng, call) for _ in range(2)]
    exact = Call(
        call.query.double(), call.key.double(), call.value.double(),
        call.mask if call.mask is None or call.mask.dtype == torch.bool else call.mask.double().clamp_min(-3e38),
        call.is_causal, call.scale, call.softcap, None if call.sinks is None else call.sinks.double(),
    )  # fmt: skip
    if call.mask is not None and call.mask.dtype != torch.bool:
        hidden = call.mask <= torch.finfo(dtype).min / 2
        exact.mask = call.mask.double().masked_fill(hidden, float("-inf"))
    expected, got = reference(exact, edits), fused(call, edits)
    assert torch.isfinite(got).all()
    keep = rows_with_a_key(call)
    largest = max(1.0, call.value.abs().max().item(), expected.abs().max().item())
    unit = torch.finfo(dtype).eps
    assert ((got.double() - expected) * keep).abs().max() <= 6 * unit * largest


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**9))
def test_rows_sum_to_one(seed):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    call = make_call(rng)
    call.sinks = None
    edits = [
        KeyBias(bias=torch.randn(call.num_keys)),
        Gain(columns=some_columns(rng, call, call.num_heads), factor=0.2),
        Transfer(source=some_columns(rng, call, call.num_heads), strength=0.5, how=rng.choice(["even", "proportional"])),
        Mix(target=rng.choice(["identity", "uniform", "mean_query", "argmax"]), strength=0.4),
    ]
    _, weights = reference_with_weights(call, rng.sample(edits, rng.randint(1, 4)))
    assert (weights >= 0).all()
    sums = weights.sum(dim=-1, keepdim=True)
    keep = rows_with_a_key(call).expand_as(sums)
    torch.testing.assert_close(sums[keep], torch.ones_like(sums[keep]), atol=1e-5, rtol=0)


IDENTITIES = [
    lambda c: ScaleQuery(factor=1),
    lambda c: Gain(columns=[0], factor=1),
    lambda c: Lift(columns=[0], share=0),
    lambda c: Transfer(source=[0], strength=0),
    lambda c: Mix(target="uniform", strength=0),
    lambda c: MixValue(strength=0),
    lambda c: HeadGain(factor=1),
    lambda c: HeadMix(target=torch.ones(c.num_heads, c.value.shape[3]), strength=0),
    lambda c: KeyBias(bias=torch.ones(c.num_keys), heads=[]),
    lambda c: PoolKV(groups=torch.arange(c.num_keys)),
    lambda c: ReplaceKV(columns=torch.empty(0, dtype=torch.long), value=torch.empty(1, c.key.shape[1], 0, c.value.shape[3])),
]


@pytest.mark.parametrize("number", range(len(IDENTITIES)))
def test_strength_zero_is_bit_identical(number):
    torch.manual_seed(number)
    for seed in range(10):
        call = make_call(random.Random(seed))
        assert torch.equal(fused(call, [IDENTITIES[number](call)]), fused(call, []))


def test_heads_without_edits_are_bit_identical():
    torch.manual_seed(0)
    for seed in range(40):
        rng = random.Random(seed)
        call = make_call(rng)
        if call.num_heads == 1:
            continue
        edited = rng.randrange(call.num_heads)
        others = [h for h in range(call.num_heads) if h != edited]
        for edit in (KeyBias(bias=torch.randn(call.num_keys), heads=[edited]), Gain(columns=[0], factor=0.3, heads=[edited])):
            out, plain = fused(call, [edit]), fused(call, [])
            assert torch.equal(out[:, others], plain[:, others])


def test_order_inside_a_level_is_the_order_given_and_levels_have_their_own():
    torch.manual_seed(0)
    call = Call(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), is_causal=True)
    move, gain = Transfer(source=[0], target=[1], strength=1.0), Gain(columns=[1], factor=0.5)
    assert not torch.allclose(fused(call, [move, gain]), fused(call, [gain, move]))
    bias = KeyBias(bias=torch.randn(5))
    torch.testing.assert_close(fused(call, [move, bias]), fused(call, [bias, move]), atol=0, rtol=0)
    # by hand: scores first, then the weights in the order given
    scores = call.query @ call.key.transpose(2, 3) * call.scaling + bias.bias[:, :, None]
    weights = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), float("-inf")).softmax(-1)
    moved = weights.clone()
    moved[..., 1:, 1] += moved[..., 1:, 0]
    moved[..., 1:, 0] = 0
    moved[..., 1] *= 0.5
    moved = moved / moved.sum(-1, keepdim=True)
    moved[..., 0, :] = weights[..., 0, :]
    # row 1 held only columns 0 and 1; all of it is on column 1 now
    torch.testing.assert_close(fused(call, [bias, move, gain]), moved @ call.value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [None, (1, 2)])
@pytest.mark.parametrize("logit", [4.0, 9.0, 20.0, 200.0])
def test_transfer_away_from_a_column_that_holds_the_row(logit, heads):
    """From a first token with nearly all of the weight, or all that float32 can tell: the kernel runs without it, nothing is subtracted."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 40, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    query[..., 0], key[..., 0] = 4.0, 0.0
    key[:, :, 0] = torch.tensor([logit] + [0.0] * 15)
    columns = torch.zeros(40, dtype=torch.bool)
    columns[:2] = True
    for fraction in (0.5, 1.0, torch.rand(2, 1, 40)):
        edits = [Transfer(source=columns, strength=fraction, heads=heads), KeyBias(bias=torch.randn(40), heads=heads)]
        for chosen in (edits[:1], edits):
            call = Call(query, key, value, is_causal=True)
            torch.testing.assert_close(fused(call, chosen), reference(call, chosen), rtol=2e-5, atol=2e-5)
