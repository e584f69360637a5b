"""How many tensor operations a recipe adds to a decode step: what follows from the prompt alone is done once, not per layer and step."""

from __future__ import annotations

import pytest
import reattend
import torch
from reattend.hooks.trackers.caches import cache_name, cache_of
from reattend.recipes import recipe_class
from tiny_language import language_model, tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

PASSAGE = "Answer in French."
SOME = [[0, 1], [0, 2], [1, 0], [2, 3], [3, 1]]


class Counted(TorchDispatchMode):
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def operations(model, *choices):
    """Of the third decode step."""
    x = tokenizer()([f"{PASSAGE} The capital of Italy is Rome."], return_tensors="pt")

    def run():
        cache = cache_of(model(**x, use_cache=True))
        for token in (7, 8):
            model(torch.tensor([[token]]), **{cache_name(model): cache})
        with Counted() as counted:
            model(torch.tensor([[9]]), **{cache_name(model): cache})
        return counted.total

    if not choices:
        return run()
    with reattend.apply(model, *choices, tokenizer=tokenizer()):
        return run()


@pytest.mark.parametrize(
    ("choice", "per_layer", "per_step"),
    [
        (("instaboost", {"text": PASSAGE}), 2, 8),
        (("emphasise", {"text": PASSAGE}), 2, 8),
        (("emphasise", {"text": PASSAGE, "heads": SOME}), 12, 8),
        (("spotlight", {"text": PASSAGE}), 34, 6),
        (("spotlight", {"text": PASSAGE, "heads": SOME}), 44, 6),
        (("seka", {"text": PASSAGE, "layers": "all"}), 2, 0),
        (("soft-injection", {}), 0, 0),
    ],
    ids=[
        "instaboost",
        "emphasise",
        "emphasise on some heads",
        "spotlight",
        "spotlight on some heads",
        "seka",
        "soft-injection",
    ],
)
def test_operations_added_to_a_decode_step(choice, per_layer, per_step, tmp_path):
    model, (slug, parameters) = language_model(), choice
    if slug == "seka":
        profile = recipe_class(slug).profile(model, tokenizer(), pairs=2, experts=False)
        parameters = {**parameters, "profile_path": str(profile.save(tmp_path / "p.safetensors"))}
    if slug == "soft-injection":
        profile = recipe_class(slug).profile(model, tokenizer(), how="even", prompts=2, shots=2)
        parameters = {**parameters, "profile_path": str(profile.save(tmp_path / "p.safetensors"))}
    added = operations(model, (slug, parameters)) - operations(model)
    assert added <= 4 * per_layer + per_step
