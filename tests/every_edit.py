"""One example of every edit of attention, for tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from reattend.interventions import (
    AppendKV,
    Band,
    Blocks,
    Call,
    Chosen,
    Edit,
    Extrapolate,
    Gain,
    Grouped,
    HeadGain,
    HeadMix,
    HeldKV,
    Instead,
    Keep,
    KeyBias,
    Lift,
    LowRankBias,
    Mix,
    MixValue,
    Operands,
    PairBias,
    PoolKV,
    Rearrange,
    Reorder,
    ReplaceKV,
    ScaleQuery,
    ScoreGain,
    Second,
    SetScores,
    TakeOutput,
    TakeWeights,
    TokenMap,
    Transfer,
    WeightMap,
)
from reattend.interventions.edits.second import extrapolated
from reattend.interventions.engine.kernels import attend
from reattend.interventions.families.composition import Correlate
from reattend.interventions.families.guidance import BlurQuery, MixOwnAnd, Soften
from reattend.interventions.families.layout import Redistribute
from reattend.interventions.families.sinks import GiveBack, SoundMap, VisualSinks
from reattend.interventions.rotary import Rotary
from torch import Tensor


def loudest(weights: Tensor, rows: Any) -> Tensor:
    """Every row of the head with the largest single weight is copied into the other heads by half: looks across heads."""
    largest = weights.amax(dim=-1, keepdim=True)
    share = (largest * 8).softmax(dim=1)
    return 0.5 * weights + 0.5 * (share * weights).sum(dim=1, keepdim=True)


def shared_by_batch(weights: Tensor, rows: Any) -> Tensor:
    """Half of what the batch gives in the mean: looks across batch rows."""
    return 0.5 * weights + 0.5 * weights.mean(dim=0, keepdim=True)


def correlate(call: Call, h: int, **who: Any) -> Edit:
    """Up to two places of the thing; calls have as many keys as they like."""
    query, key = torch.randn(2, call.batch, h, call.num_queries, call.query.shape[3], dtype=call.query.dtype)
    count = min(2, call.num_queries)
    return Correlate(query=query, key=key[:, :, :count], columns=torch.arange(count), **who)


def examples(call: Call, heads: list[int] | None = None, rows: Tensor | None = None) -> dict[str, Callable[[], Edit]]:
    """{name: makes the edit} for these heads and rows of a call; per-row and per-head tensors wherever the edit takes them."""
    b, t, n, d = call.batch, call.num_queries, call.num_keys, call.query.shape[3]
    h, kv = call.num_heads if heads is None else len(heads), call.key.shape[1]
    dtype, who = call.query.dtype, {"heads": heads, "rows": rows}

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=dtype)

    columns = torch.zeros(b, h, n, dtype=torch.bool)
    columns[..., 0] = True
    columns[..., min(2, n - 1)] = torch.rand(b, h) > 0.5
    per_row = rand(b, h, t) * 0.9
    return {
        "scale query": lambda: ScaleQuery(factor=0.5 + rand(b, h, t), **who),
        "blur query": lambda: BlurQuery(grid=torch.arange(t)[None], sigma=1.0, **who),
        "key bias": lambda: KeyBias(bias=rand(b, h, n), **who),
        "score gain": lambda: ScoreGain(factor=rand(b, h, n), **who),
        "pair bias": lambda: PairBias(bias=rand(b, h, t, n), **who),
        "low-rank bias": lambda: LowRankBias(U=rand(b, h, t, 2), V=3 * rand(b, h, n, 2), **who),
        "low-rank bias of all heads": lambda: LowRankBias(U=rand(t, 3), V=rand(b, n, 3) * 3, **who),
        "set scores": lambda: SetScores(columns=columns, scores=rand(b, h, t, 1), **who),
        "set all scores": lambda: SetScores(scores=rand(b, h, t, n), **who),
        "keep": lambda: Keep(pattern=torch.rand(b, h, t, n) > 0.4, **who),
        "band": lambda: Keep(pattern=Band(1, 3), **who),
        "blocks": lambda: Keep(pattern=some_blocks(b, h, t, n), **who),
        "blocks of all heads": lambda: Keep(pattern=Blocks((torch.arange(-(-n // 5)) != 1).expand(-(-t // 2), -1), (2, 5)), **who),
        "chosen": lambda: Keep(pattern=Chosen(chosen(b, h, n), torch.rand(b, h, 4) > 0.1), **who),
        "gain": lambda: Gain(columns=columns, factor=per_row, **who),
        "gain below zero": lambda: Gain(columns=columns, factor=-per_row, renormalise=None, **who),
        "gain over a set": lambda: Gain(columns=columns, factor=0.4, renormalise=~columns, **who),
        "gain without a sum": lambda: Gain(columns=columns, factor=0.4, renormalise=None, **who),
        "lift": lambda: Lift(columns=columns, share=per_row, **who),
        "transfer": lambda: Transfer(source=columns, strength=per_row, **who),
        "transfer to a set": lambda: Transfer(source=columns, target=torch.arange(n) > n // 2, strength=0.7, **who),
        "transfer in even shares": lambda: Transfer(source=columns, strength=per_row, how="even", **who),
        "mix with itself": lambda: Mix(target="identity", strength=per_row, **who),
        "mix with uniform": lambda: Mix(target="uniform", strength=per_row, **who),
        "mix with the mean query": lambda: Mix(target="mean_query", strength=per_row, **who),
        "mix with the largest": lambda: Mix(target="argmax", strength=per_row, **who),
        "mix with a map": lambda: Mix(target=rand(t, n), strength=per_row, **who),
        "weight map": lambda: WeightMap(function=lambda w, r: w.square() + 0.1 * w, **who),
        "give back": lambda: GiveBack(found=sinks_on_an_image(b, n), key_start=0, move=0.4, rho=0.9, summ=0.01, **who),
        "sound map": lambda: SoundMap(function=lambda w, r: w * (1 + w), **who),
        "weight map across heads": lambda: WeightMap(function=loudest, reads="heads", **who),
        "weight map across the batch": lambda: WeightMap(function=shared_by_batch, reads="batch", **who),
        "mix own and columns": lambda: MixOwnAnd(columns=columns, strength=0.6, **who),
        "soften": lambda: Soften(temperature=2.0, strength=0.5, **who),
        "correlate": lambda: correlate(call, h, **who),
        "redistribute": lambda: Redistribute(columns=columns, belongs=torch.rand(b, h, t, n) > 0.5, strength=0.8, **who),
        "head gain": lambda: HeadGain(factor=rand(b, h), **who),
        "head mix": lambda: HeadMix(target=rand(b, h, call.value.shape[3]), strength=rand(b, h), **who),
        "mix value": lambda: MixValue(strength=per_row, **who),
        "second": lambda: second(call, h, combine=per_row, **who),
        "second by a function": lambda: second(call, h, combine=lambda o, other, rows: 2 * o - 0.5 * other, **who),
        "second across heads": lambda: second(
            call, h, combine=lambda o, other, rows: extrapolated(o, other, 3.0, 2.5, 0.5), reads="heads", **who
        ),
        "take output": lambda: TakeOutput(**taken(b, t), **who),
        "take output of batch rows": lambda: TakeOutput(batch=torch.arange(b).roll(1), **who),
        "take weights": lambda: take_weights(call, h, **who),
        "take all weights": lambda: take_weights(call, h, others=True, **who),
        "instead": lambda: Instead(compute=sharper, **who),
        "instead across heads": lambda: Instead(compute=sharper, reads="heads", **who),
        "grouped": lambda: Grouped(shares=rand(b, t, 3), columns=torch.arange(n)[:, None] % 3 == torch.arange(3) % min(n, 3), **who),
        "extrapolate": lambda: Extrapolate(other=torch.randn(b, call.num_heads, t, call.value.shape[3]).to(dtype), factor=2.0, rows=rows),
        "extrapolate from batch rows": lambda: Extrapolate(other=torch.arange(b).roll(1), factor=2.0, norm="l2", rows=rows),
        "rearrange": lambda: rearrange(call, h, heads=heads),
        "append": lambda: AppendKV(key=rand(b, kv, 2, d), value=rand(b, kv, 2, call.value.shape[3])),
        "replace": lambda: ReplaceKV(columns=torch.tensor([0]), key=rand(1, kv, 1, d), value=rand(b, kv, 1, call.value.shape[3])),
        "pool": lambda: PoolKV(groups=(torch.arange(n) - 1).clamp_min(0)),
        "append for some": lambda: AppendKV(
            key=rand(b, kv, 2, d), value=rand(b, kv, 2, call.value.shape[3]), visible=torch.rand(b, h, t, 2) > 0.3, **who
        ),
        "replace per head": lambda: ReplaceKV(
            columns=chosen(b, h, n), key=rand(b, kv, 4, d), value=rand(1, kv, 4, call.value.shape[3]), **who
        ),
        "pool for some": lambda: PoolKV(groups=merged(b, h, n), **who),
        "reorder per head": lambda: Reorder(order=shuffled(b, h, n), **who),
        "reorder": lambda: Reorder(order=torch.stack([torch.randperm(n) for _ in range(b)])),
        "held": lambda: held(call),
    }  # fmt: skip


def second(call: Call, count: int, **options: Any) -> Second:
    """A second attention over five keys of its own, of which no row sees the first."""
    b, d, dtype = call.batch, call.query.shape[3], call.query.dtype
    key, value = torch.randn(b, count, 5, d).to(dtype), torch.randn(1, count, 5, call.value.shape[3]).to(dtype)
    return Second(key=key, value=value.expand(b, -1, -1, -1), mask=torch.arange(5).expand(call.num_queries, -1) > 0, **options)


def take_weights(call: Call, count: int, **more: Any) -> TakeWeights:
    """The weights of another query and other keys, two columns of which are mixed, of which something of the own ones stays."""
    b, t, n, d, dtype = call.batch, call.num_queries, call.num_keys, call.query.shape[3], call.query.dtype
    named: dict[str, Any] = {"transfer": torch.rand(b, 2, 2).to(dtype), "own": torch.rand(1, 2).to(dtype)}
    query, key = torch.randn(b, count, t, d).to(dtype), torch.randn(b, count, n, d).to(dtype)
    return TakeWeights(query=query, key=key, columns=torch.tensor([0, min(2, n - 1)]), **named, **more)


def taken(batch: int, queries: int) -> dict[str, Tensor]:
    """Where `TakeOutput` takes from: for every row another one of its batch row; a row that has none beside it takes another batch row's."""
    if queries == 1:
        return {"batch": torch.arange(batch).roll(1)}
    away = 1 + torch.arange(batch)[:, None] % (queries - 1)
    return {"source": (torch.arange(queries) + away) % queries}


def shuffled(batch: int, heads: int, keys: int) -> Tensor:
    """Another order for each head in which one column stands twice and one is missing: without that, rows that see all keys stay the same."""
    order = torch.rand(batch, heads, keys).argsort(dim=-1)
    order[..., 1] = order[..., 0]
    return order


def sharper(x: Operands, scale: float) -> Tensor:
    """What stands for attention: a sharper one."""
    return attend(x.query, x.key, x.value, x.mask, x.is_causal, 2 * scale)[0]


def merged(batch: int, heads: int, keys: int) -> Tensor:
    """Two neighbours of each head's columns in one group, never the first column, so that every row sees a group."""
    place, start = torch.arange(keys), torch.arange(heads)[:, None] % 2 + 1
    return (place - (place > start).long()).expand(batch, -1, -1)


def sinks_on_an_image(batch: int, keys: int) -> VisualSinks:
    """The second half of the keys as an image, with a sink on its first column and one before it."""
    image = (torch.arange(keys) >= keys // 2).expand(batch, -1)
    sinks = ((torch.arange(keys) == keys // 2) | (torch.arange(keys) == 0)).expand(batch, -1)
    return VisualSinks(sinks, TokenMap(batch, keys, keys, {"image": image, "bos": torch.arange(keys)[None] == 0}))


def some_blocks(batch: int, heads: int, queries: int, keys: int) -> Blocks:
    """Blocks of 4 x 3, the second of each row of them gone, beside a column and rows that are dense."""
    keep = torch.rand(batch, heads, -(-queries // 4), -(-keys // 3)) > 0.4
    keep[..., 1] = False
    return Blocks(keep, (4, 3), [0], (torch.arange(queries) % 5 == 3).expand(batch, -1))


def chosen(batch: int, heads: int, keys: int) -> Tensor:
    """Four columns of each head, the first one among them, so that every row sees one."""
    drawn = [torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(keys - 1)])[:4] for _ in range(batch * heads)]
    return torch.stack(drawn).view(batch, heads, -1)


def held(call: Call) -> HeldKV:
    """Four columns of each key head, some of which are not used, with keys and values of their own."""
    columns, (b, kv, _, d) = chosen(call.batch, call.key.shape[1], call.num_keys).sort(dim=-1).values, call.key.shape
    valid = (torch.rand(b, kv, 4) > 0.2) | (columns == 0)
    key, value = (torch.rand(b, kv, 4, width, dtype=call.query.dtype) for width in (d, call.value.shape[3]))
    return HeldKV(columns=columns, key=key, value=value, valid=valid)


# what acts on the operands of whole calls, or (for `Rearrange`) is cut to heads and rows in ways of its own, or needs several rows
WHOLE = (
    "append",
    "replace",
    "pool",
    "reorder",
    "held",
    "pool for some",
    "rearrange",
    "extrapolate",
    "extrapolate from batch rows",
    "blur query",
)


def rearrange(call: Call, h: int, **who: Any) -> Rearrange:
    """Two segments of two columns each, met at turned distances by the rows after them."""
    b, t, n, d = call.batch, call.num_queries, call.num_keys, call.query.shape[3]
    spans = torch.tensor([[[1, 3], [3, 5]]], dtype=torch.int32).expand(b, -1, -1)
    steps = torch.zeros(b, h, t, 3, dtype=torch.int32)
    behind = torch.arange(n - t, n) >= 5
    steps[:, :, behind, 1:] = torch.randint(-5, 5, (b, h, int(behind.sum()), 2), dtype=torch.int32)
    rotary = Rotary(100.0 ** (-torch.arange(0, d, 2) / d))
    first = torch.zeros(b, dtype=torch.int32)
    return Rearrange(spans=spans, steps=steps, first=first, start=n - t, rotary=rotary, **who)


def a_call(
    queries: int, keys: int = 12, *, kv: int = 2, mask: str = "causal", batch: int = 3, dtype=torch.float32, **options: Any
) -> Call:
    """Four heads. mask: "causal", "none", or "holes", a tensor that hides some keys and what is later."""
    query, key, value = (torch.randn(batch, m, n, 8, dtype=dtype) for m, n in ((4, queries), (kv, keys), (kv, keys)))
    hidden = None
    if mask == "holes":
        hidden = (torch.rand(batch, 1, queries, keys) > 0.25) & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        hidden[..., 0] = True
    return Call(query, key, value, hidden, mask == "causal", **options)
