"""One call of attention on a device: edits beside the untouched kernel and beside eager attention, which holds the whole matrix."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from gpu_parts import DASH, Part, Table, shown
from reattend.interventions import Call, Edit, Gain, HeadGain, KeyBias, Mix, Transfer, fused
from torch import Tensor

UNTOUCHED, EAGER = "untouched SDPA", "eager attention"
COLUMN_EDITS = ("transfer of 3 columns", "gain of 3 columns")


class Heads(NamedTuple):
    """heads query heads on kv key heads of dim dimensions, and the numbers of keys at which they are measured."""

    heads: int
    kv: int
    dim: int
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.heads} heads on {self.kv} of {self.dim} dimensions"


# the first one is what the targets ask; then what decides over kernels
SHAPES = [
    Heads(32, 8, 128, (1024, 4096, 16384)),
    Heads(32, 8, 64, (1024, 4096, 16384)),
    Heads(16, 8, 256, (4096,)),
    Heads(32, 4, 128, (4096,)),
    Heads(32, 2, 128, (4096,)),
]
TOY = [Heads(4, 2, 16, (64, 96))]


def edits(keys: int, device: torch.device) -> dict[str, list[Edit]]:
    """Made once, as recipes share theirs between the layers of a step."""
    bias = torch.linspace(-1, 0, keys, device=device)
    three = torch.arange(keys, device=device) < 3
    return {
        "pass-through": [],
        "key bias": [KeyBias(bias=bias)],
        "key bias on 4 heads": [KeyBias(bias=bias, heads=[0, 1, 2, 3])],
        "transfer of 3 columns": [Transfer(source=three, strength=0.5)],
        "gain of 3 columns": [Gain(columns=three, factor=0.5)],
        "head gain": [HeadGain(factor=0.5)],
        "identity mix": [Mix(target="identity", strength=0.3)],
    }


def measure(part: Part) -> None:
    dtype = torch.float32 if part.dry else torch.bfloat16
    part.say(
        f"{str(dtype).removeprefix('torch.')}, batch 1; ratios to the untouched call, medians of rounds in turning order. A call is timed in a "
        "row of calls, so that one row shows what the host does where that takes longer than the device."
    )
    for i, heads in enumerate(TOY if part.dry else SHAPES):
        for phase in ("prefill", "one row"):
            sizes = [n for n in heads.sizes if part.reached(f"{heads}, {phase}, {n} keys")]
            if not sizes:
                continue
            at = sizes[min(1, len(sizes) - 1)]
            what = "operations" if part.dry else "launches"
            columns = [f"n = {n}" for n in sizes] + [f"{what} at {at}", f"MiB at {at}", "way"]
            table = part.table(f"{phase}, {heads}", columns)
            for n in sizes:
                if part.reached(f"{heads}, {phase}, {n} keys"):
                    one_size(part, table, phase, heads, n, dtype, what if n == at else "", main=i == 0)


def one_size(part: Part, table: Table, phase: str, heads: Heads, n: int, dtype: torch.dtype, counted: str, main: bool) -> None:
    """One column of a table; counted: what launches are called where they are counted too, "" where not."""
    device = part.device.device
    variants: dict[str, Callable[[], Tensor]] = {}
    ways: dict[str, Counter[str]] = {}

    def prepare() -> None:
        rows = n if phase == "prefill" else 1
        query = torch.randn(1, heads.heads, rows, heads.dim, dtype=dtype, device=device)
        key, value = (torch.randn(1, heads.kv, n, heads.dim, dtype=dtype, device=device) for _ in range(2))
        plain = functools.partial(F.scaled_dot_product_attention, query, key, value, is_causal=rows > 1, enable_gqa=True)
        variants[UNTOUCHED] = plain
        for name, chosen in edits(n, device).items():
            # a call of its own each time: a model makes one for each layer
            make = functools.partial(Call, query, key, value, is_causal=rows > 1, original=plain)
            ways[name] = Counter()
            run = functools.partial(edited, make, chosen)
            if part.attempt(table, name, functools.partial(run, ways[name])):
                variants[name] = run
        # n x n values in the dtype and in float32 at once
        if n <= 4096:
            hidden = torch.full((n, n), float("-inf"), dtype=dtype, device=device).triu(1) if rows > 1 else None
            run = functools.partial(eager, query, key, value, hidden)
            if part.attempt(table, EAGER, run):
                variants[EAGER] = run

    def timed() -> None:
        found = part.device.ratios(variants, rounds=1 if part.dry else 9)
        for name, (milliseconds, ratio) in found.items():
            cell = f"{milliseconds:.3f} ms" if name == UNTOUCHED else shown(ratio)
            part.set(table, name, {f"n = {n}": cell})
            if main:
                part.figure(f"call, {phase}, {n}, {name}", ratio)
        if EAGER not in found:
            part.set(table, EAGER, {f"n = {n}": DASH})
        for name, counter in ways.items():
            part.set(table, name, {"way": ", ".join(counter)})

    def beside() -> None:
        for name, function in variants.items():
            launches, extra = part.device.launches(function), part.device.extra_mib(function)
            part.set(table, name, {f"{counted} at {n}": shown(launches, 0), f"MiB at {n}": shown(extra, 0)})

    if part.attempt(table, UNTOUCHED, prepare) and part.attempt(table, UNTOUCHED, timed) and counted:
        part.attempt(table, UNTOUCHED, beside)
    variants.clear()
    part.device.release()


def edited(make: Callable[[], Call], edits: list[Edit], ways: Counter[str] | None = None) -> Tensor:
    call = make()
    call.ways = ways
    return fused(call, edits)


def eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """As models without fused attention compute it: key heads repeated, an additive mask, weights in float32."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    scores = scores if mask is None else scores + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value
