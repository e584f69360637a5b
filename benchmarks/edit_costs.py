"""Records docs/edits.json: by which way each edit is computed and what that costs, beside attention without edits in the same run.

    python benchmarks/edit_costs.py      # then python benchmarks/edits_page.py

A causal prefill of 2048 rows and one decode row over 8192 keys; 8 heads on 2 key heads of 64 dimensions, float32, thread CPU time.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

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
)
from timing import ratios

FILE = Path(__file__).resolve().parents[1] / "docs" / "edits.json"
HEADS, KEY_HEADS, DIM, BLOCK = 8, 2, 64, 128


def mean_value(x: Operands, scale: float) -> torch.Tensor:
    return x.value.mean(dim=2, keepdim=True).repeat_interleave(HEADS // KEY_HEADS, dim=1).expand_as(x.query)


def halves(count: int) -> torch.Tensor:
    """[count, 2]: 1 where a place lies in the first half, or the second."""
    return torch.nn.functional.one_hot(torch.arange(count) * 2 // max(2, count), 2).float()


def examples(call: Call) -> dict[str, Edit]:
    """{what is measured: one typical edit}; the name of its class comes first."""
    rows, keys, last = call.num_queries, call.num_keys, torch.arange(call.num_queries) >= call.num_queries - 64
    few = list(range(4))
    extra = torch.randn(1, KEY_HEADS, 77, DIM)
    own = torch.randn(1, HEADS, rows, DIM)
    blocks = (torch.rand(1, 1, -(-rows // BLOCK), keys // BLOCK) < 0.2).index_fill(3, torch.tensor([0]), True)
    found: dict[str, Edit] = {
        "ScaleQuery": ScaleQuery(factor=1.1),
        "ReplaceKV, 77 columns": ReplaceKV(columns=torch.arange(77), key=extra, value=extra),
        "AppendKV, 77 columns": AppendKV(key=extra, value=extra),
        "PoolKV, pairs": PoolKV(groups=(torch.arange(keys) + 1) // 2),
        "Reorder": Reorder(order=torch.randperm(keys)),
        "KeyBias": KeyBias(bias=torch.randn(keys)),
        "ScoreGain, last 64 rows": ScoreGain(factor=torch.rand(keys), rows=last),
        "PairBias": PairBias(bias=torch.randn(rows, keys)),
        "LowRankBias, rank 4": LowRankBias(U=torch.randn(rows, 4), V=torch.randn(keys, 4)),
        "SetScores, 4 columns": SetScores(columns=few, scores=0.5),
        "Keep, a band of 256 with 4 sinks": Keep(pattern=Band(4, 256)),
        "Gain, 4 columns": Gain(columns=few, factor=0.5),
        "Gain, all columns of the last 64 rows": Gain(columns=list(range(keys // 2)), factor=2.0, rows=last),
        "Lift, 4 columns": Lift(columns=few, share=0.3),
        "Transfer, from 4 columns to all others": Transfer(source=few, strength=0.5),
        "Mix with identity": Mix(target="identity", strength=0.3),
        "Mix with uniform": Mix(target="uniform", strength=0.3),
        "WeightMap, last 64 rows": WeightMap(function=lambda weights, _: weights.square(), rows=last),
        "HeadGain": HeadGain(factor=0.5),
        "HeadMix": HeadMix(target=torch.randn(HEADS, DIM), strength=0.5),
        "MixValue": MixValue(strength=0.3),
        "Second, 77 keys": Second(key=extra, value=extra, combine=0.5),
        "Extrapolate from a given output": Extrapolate(other=own, factor=3.0),
        "TakeOutput": TakeOutput(source=torch.arange(rows).flip(0)),
        "Instead, a mean of values": Instead(compute=mean_value),
        "Grouped, two halves": Grouped(shares=halves(rows), columns=halves(keys) > 0),
    }  # fmt: skip
    if rows > 1:
        found["Keep, 20 % of the blocks"] = Keep(pattern=Blocks(blocks, BLOCK))
    else:
        found["Keep, 512 chosen columns"] = Keep(pattern=Chosen(torch.arange(keys - 512, keys).expand(1, KEY_HEADS, -1)))
    return found


def measured(title: str, rows: int, keys: int, rounds: int, repeat: int) -> dict[str, dict[str, dict[str, str]]]:
    query, key, value = (torch.randn(1, h, n, DIM) for h, n in ((HEADS, rows), (KEY_HEADS, keys), (KEY_HEADS, keys)))
    call = Call(query, key, value, is_causal=rows > 1)
    variants, ways = {"plain": lambda: fused(call, [])}, {}
    for name, edit in examples(call).items():
        seen = Call(query, key, value, is_causal=rows > 1, ways=Counter())
        fused(seen, [edit])
        ways[name] = ", ".join(seen.ways or ())
        variants[name] = lambda edit=edit: fused(call, [edit])
    found: dict[str, dict[str, dict[str, str]]] = {}
    for name, ratio in list(ratios(variants, rounds=rounds, repeat=repeat).items())[1:]:
        edit, _, what = name.partition(" ")
        where = f"{title}{': ' + what if what else ''}"
        found.setdefault(edit.rstrip(","), {})[where] = {"way": ways[name], "ratio": f"{ratio:.2f}"}
    return found


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    prefill = measured("prefill", 2048, 2048, 7, 1)
    decode = measured("decode", 1, 8192, 15, 10)
    both = {name: {**prefill.get(name, {}), **decode.get(name, {})} for name in dict.fromkeys([*prefill, *decode])}
    FILE.write_text(json.dumps(both, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
