"""What an edit costs, as ratios to the untouched model measured in the same run.

    python benchmarks/overhead.py            # one attention call, then SmolLM2 end to end
    python benchmarks/overhead.py --quick    # smaller sizes, fewer rounds

Prints Markdown tables: docs/performance.md holds a recorded run.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from reattend.comparison.loading import packaged_smollm2
from reattend.hooks import Edits, Plan, attach, sites
from reattend.interventions import Call, Gain, HeadGain, KeyBias, Mix, Transfer, WeightMap, fused
from timing import extra_memory, ratios, table

HEADS, KEY_HEADS, DIM = 9, 3, 64  # SmolLM2-135M


def boost_last_columns(weights: torch.Tensor, rows: object) -> torch.Tensor:
    """A stand-in for a row method such as VAR: two group sums, a move between groups, row sums kept."""
    sinks, rest = weights[..., :3], weights[..., 3:]
    moved = 0.4 * sinks.sum(-1, keepdim=True)
    return torch.cat([sinks * 0.6, rest * (1 + moved / rest.sum(-1, keepdim=True).clamp_min(1e-30))], dim=-1)


def edits_for(call: Call) -> dict[str, list]:
    rows = torch.arange(call.num_queries) >= call.num_queries - 40
    return {
        "pass-through": [],
        "key bias": [KeyBias(bias=bias_of(call.num_keys))],
        "transfer of 3 columns": [Transfer(source=first_three(call.num_keys), strength=0.5)],
        "gain of 1 column": [Gain(columns=first_three(call.num_keys), factor=0.5)],
        "head gain": [HeadGain(factor=0.5)],
        "identity mix": [Mix(target="identity", strength=0.3)],
        "var-like, last 40 rows": [WeightMap(function=boost_last_columns, rows=rows)],
    }


def bias_of(keys: int) -> torch.Tensor:
    return torch.linspace(-1, 0, keys)


def first_three(keys: int) -> torch.Tensor:
    columns = torch.zeros(keys, dtype=torch.bool)
    columns[:3] = True
    return columns


def one_call(sizes: list[int], rounds: int) -> None:
    prefill: dict[str, dict[str, float]] = {}
    decode: dict[str, dict[str, float]] = {}
    for n in sizes:
        query, key, value = (torch.randn(1, h, n, DIM) for h in (HEADS, KEY_HEADS, KEY_HEADS))
        for target, q in ((prefill, query), (decode, query[:, :, -1:].contiguous())):
            causal = q.shape[2] > 1

            def plain(q=q, key=key, value=value, causal=causal) -> torch.Tensor:
                return F.scaled_dot_product_attention(q, key, value, is_causal=causal, enable_gqa=True)

            call = Call(q, key, value, is_causal=causal, original=plain)
            variants = {"untouched SDPA": plain}
            variants |= {name: (lambda e=e, c=call: fused(c, e)) for name, e in edits_for(call).items()}
            if n <= 4096:
                variants["eager, materialised transfer"] = lambda c=call: eager_transfer(c)
            repeat = 1 if causal else 20
            for name, ratio in ratios(variants, rounds, repeat).items():
                target.setdefault(name, {})[f"n = {n}"] = ratio
    print(table("One attention call, prefill (9 heads on 3 key heads, 64 dimensions, float32)", prefill), "\n")
    print(table("One attention call, one query row on n keys", decode), "\n")


def eager_transfer(call: Call) -> torch.Tensor:
    """The same three-column transfer the usual way: the whole matrix, then the product with V."""
    key, value = (t.repeat_interleave(HEADS // KEY_HEADS, dim=1) for t in (call.key, call.value))
    scores = call.query @ key.transpose(2, 3) * call.scaling
    if call.is_causal:
        n = call.num_queries
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
    weights = scores.softmax(dim=-1)
    taken = 0.5 * weights[..., :3].sum(-1, keepdim=True)
    rest = weights[..., 3:].sum(-1, keepdim=True)
    up = torch.where(rest > 0, 1 + taken / rest.clamp_min(1e-30), 1.0)
    weights = torch.cat([torch.where(rest > 0, 0.5, 1.0) * weights[..., :3], weights[..., 3:] * up], dim=-1)
    return weights @ value


MEMORY = """
import sys, torch
from reattend.interventions import Call, KeyBias, Mix, Transfer, fused, reference
torch.set_num_threads(1)
n, what = int(sys.argv[1]), sys.argv[2]
q, k, v = (torch.randn(1, h, n, 64) for h in (9, 3, 3))
call = Call(q, k, v, is_causal=True)
edits = {"untouched SDPA": [], "key bias": [KeyBias(bias=torch.zeros(n))], "transfer of 3 columns": [Transfer(source=[0, 1, 2], strength=0.5)],
         "identity mix": [Mix(target="identity", strength=0.3)]}
edits["materialised"] = edits["transfer of 3 columns"]
# what a first use loads is not counted
fused(Call(q[:, :, :64], k[:, :, :64], v[:, :, :64], is_causal=True), edits["transfer of 3 columns"])
fused(Call(q[:, :, :64], k[:, :, :64], v[:, :, :64], is_causal=True), [])
def measured():
    return (reference if what == "materialised" else fused)(call, edits[what])
"""


def memory(sizes: list[int]) -> None:
    rows = {
        what: {f"n = {n}": extra_memory(MEMORY, str(n), what) for n in sizes if what != "materialised" or n <= 4096}
        for what in ("untouched SDPA", "key bias", "transfer of 3 columns", "identity mix", "materialised")
    }
    print(table("Growth of peak memory during one call, MiB (output included)", rows, digits=0), "\n")


def end_to_end(prompt: int, new: int, rounds: int) -> None:
    model, _ = packaged_smollm2()
    table_of_sites = sites(model)
    ids = torch.randint(100, 40000, (1, prompt), generator=torch.Generator().manual_seed(0))

    def prefill() -> None:
        with torch.no_grad():
            model(ids, use_cache=True)

    def decode() -> None:
        with torch.no_grad():
            model.generate(ids[:, :256], max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)

    def under(edits_at, work):
        def run() -> None:
            with attach(model, [Plan("bench", [Edits(table_of_sites, edits_at)])]):
                work()

        return run

    cache: dict[tuple[str, int, int], list] = {}

    def same(name: str):
        def intervention(call: Call) -> list:
            # a real recipe also builds its edits once per step and shares them between layers
            key = (name, call.num_queries, call.num_keys)
            if key not in cache:
                if len(cache) > 8:
                    cache.clear()
                cache[key] = edits_for(call)[name]
            return cache[key]

        return intervention

    names = list(edits_for(Call(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8))))
    result: dict[str, dict[str, float]] = {}
    for label, work in ((f"prefill of {prompt}", prefill), (f"256 + {new} decode steps", decode)):
        variants = {"untouched": work} | {name: under(same(name), work) for name in names}

        def eager(work=work) -> None:
            model.set_attn_implementation("eager")
            work()
            model.set_attn_implementation("sdpa")

        variants["untouched, eager attention"] = eager
        for name, ratio in ratios(variants, rounds).items():
            result.setdefault(name, {})[label] = ratio
    print(table("SmolLM2-135M end to end, every layer edited", result), "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    one_call([1024] if arguments.quick else [1024, 4096, 8192], 3 if arguments.quick else 5)
    memory([2048, 4096] if arguments.quick else [2048, 4096, 8192])
    end_to_end(512 if arguments.quick else 2048, 16 if arguments.quick else 64, 2 if arguments.quick else 5)


if __name__ == "__main__":
    main()
