"""What a session asks of Python at every edited layer of every decode step, in function calls: a GPU waits for each of them."""

from __future__ import annotations

import os
import sys

import pytest
import reattend
import torch
from reattend.hooks.trackers.caches import cache_name, cache_of
from transformers import LlamaConfig, LlamaForCausalLM

HOME = os.path.dirname(os.path.abspath(reattend.__file__))
DEPTHS, PROMPT, STEPS = (2, 6), 24, 4
MARKED = {"ranges": [(4, 8)]}


def model_of(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        bos_token_id=1, eos_token_id=63, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def calls_of(layers: int, slug: str, **parameters) -> int:
    """Calls of functions of this package in a few steps of decoding."""
    model = model_of(layers)
    ids = torch.randint(2, 60, (1, PROMPT + STEPS + 1), generator=torch.Generator().manual_seed(1))
    found = 0

    def count(frame, event, _) -> None:
        nonlocal found
        path = os.path.abspath(frame.f_code.co_filename)
        # an environment may lie in the package's own folder
        if event == "call" and path.startswith(HOME) and "site-packages" not in path[len(HOME) :]:
            found += 1

    def step(place: int) -> None:
        model(ids[:, place : place + 1], **{cache_name(model): cache}, use_cache=True)

    with reattend.apply(model, slug, **parameters) as session, torch.no_grad():
        cache = cache_of(model(ids[:, :PROMPT], use_cache=True))
        step(PROMPT)
        session.clear_counts()
        sys.setprofile(count)
        try:
            for place in range(PROMPT + 1, PROMPT + 1 + STEPS):
                step(place)
        finally:
            sys.setprofile(None)
        assert session.applied == layers * STEPS, "it acts at every layer"
    return found


def some_heads(layers: int) -> dict[int, list[int]]:
    return {layer: [layer % 4, (layer + 1) % 4] for layer in range(layers)}


# slug -> (its parameters for a model of so many layers, the most calls for one layer of one step)
CASES = {
    "emphasise": ("emphasise", lambda layers: MARKED, 28),
    "emphasise on some heads": ("emphasise", lambda layers: {**MARKED, "heads": some_heads(layers)}, 38),
    "instaboost": ("instaboost", lambda layers: MARKED, 28),
    "streaming": ("streaming", lambda layers: {"sinks": 2, "window": 6}, 29),
    "streaming, most of the cache": ("streaming", lambda layers: {"sinks": 2, "window": 16}, 28),
    "spotlight": ("spotlight", lambda layers: MARKED, 36),
    "retrieval-heads": ("retrieval-heads", lambda layers: {"heads": some_heads(layers)}, 30),
    "pine": ("pine", lambda layers: {"ranges": [(4, 8), (8, 14), (14, 18)]}, 53),
}


@pytest.mark.parametrize("name", CASES)
def test_calls_of_an_edited_layer(name):
    slug, parameters, most = CASES[name]
    few, many = (calls_of(layers, slug, **parameters(layers)) for layers in DEPTHS)
    per_layer = (many - few) / (DEPTHS[1] - DEPTHS[0]) / STEPS
    assert per_layer <= most, f"{per_layer:.1f} function calls at each layer and step"


def test_calls_of_a_step():
    per_step = 2 * calls_of(2, "emphasise", **MARKED) - calls_of(4, "emphasise", **MARKED)
    assert per_step / STEPS <= 190, f"{per_step / STEPS:.1f} function calls at each step besides those at its layers"
