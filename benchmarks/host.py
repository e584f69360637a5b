"""What a session costs the host at decode: microseconds of Python per edited layer, and once per step, beside the untouched model.

    python benchmarks/host.py            # every recipe below
    python benchmarks/host.py emphasise streaming

A model so small that its arithmetic is nothing beside Python's work writes tokens at two depths: the difference is the cost of a layer, the
rest that of a step. All variants take turns in one run, on one thread of the CPU; times are that thread's own. Prints a Markdown table.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import reattend
import torch
from reattend.hooks.trackers.caches import cache_name, cache_of
from transformers import LlamaConfig, LlamaForCausalLM

DEPTHS = (4, 12)
PROMPT, STEPS, ROUNDS = 48, 12, 9
MARKED = {"ranges": [(8, 14)]}


def model_of(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
        bos_token_id=1, eos_token_id=63, pad_token_id=0, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def heads_of(layers: int) -> dict[int, list[int]]:
    """Other heads in each layer."""
    return {layer: [layer % 8, (layer + 3) % 8] for layer in range(layers)}


# label -> the recipe for a model of so many layers
VARIANTS: dict[str, Callable[[int], Any]] = {
    "emphasise": lambda layers: reattend.recipe("emphasise", **MARKED),
    "emphasise, two heads a layer": lambda layers: reattend.recipe("emphasise", **MARKED, heads=heads_of(layers)),
    "instaboost": lambda layers: reattend.recipe("instaboost", **MARKED),
    "streaming": lambda layers: reattend.recipe("streaming", sinks=2, window=8),
    "streaming, wide window": lambda layers: reattend.recipe("streaming", sinks=2, window=40),
    "spotlight": lambda layers: reattend.recipe("spotlight", **MARKED),
    "retrieval-heads": lambda layers: reattend.recipe("retrieval-heads", heads=heads_of(layers)),
    "act": lambda layers: reattend.recipe("act", heads="all"),
    "pine": lambda layers: reattend.recipe("pine", ranges=[(4, 12), (12, 20), (20, 28)]),
}


def per_step(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Seconds of this thread for one step of decoding."""
    times = []
    with torch.no_grad():
        cache = cache_of(model(ids[:, :PROMPT], use_cache=True))
        for step in range(STEPS):
            token = ids[:, PROMPT + step : PROMPT + step + 1]
            start = time.thread_time()
            model(token, **{cache_name(model): cache}, use_cache=True)
            times.append(time.thread_time() - start)
    return statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    wanted = {name: built for name, built in VARIANTS.items() if not sys.argv[1:] or any(w in name for w in sys.argv[1:])}
    ids = torch.randint(2, 60, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
    models = {layers: model_of(layers) for layers in DEPTHS}
    found: dict[str, dict[int, list[float]]] = {name: {layers: [] for layers in DEPTHS} for name in ["untouched", *wanted]}
    for _ in range(ROUNDS):
        for name, times in found.items():
            for layers, model in models.items():
                recipe = None if name == "untouched" else wanted[name](layers)
                with contextlib.nullcontext() if recipe is None else reattend.apply(model, recipe):
                    times[layers].append(per_step(model, ids))
    low, high = DEPTHS
    print("| | a layer, µs | ratio | more, µs | a step besides, more, µs |\n|---|---|---|---|---|")
    plain = plain_rest = 0.0
    for name, times in found.items():
        few, many = (1e6 * min(times[layers]) for layers in DEPTHS)
        layer = (many - few) / (high - low)
        rest = few - low * layer
        plain, plain_rest = (layer, rest) if name == "untouched" else (plain, plain_rest)
        print(f"| {name} | {layer:.0f} | {layer / plain:.2f} | {layer - plain:.0f} | {rest - plain_rest:.0f} |")


if __name__ == "__main__":
    main()
