"""Every method that steers text under every cache: what it does to the logits does not depend on how keys are kept, nor on whether they are.

Caches differ in what a call sees of them: all keys, a buffer longer than what is written, the window alone. The model without a recipe is
asked first, and must not care either.
"""

from __future__ import annotations

import pytest
import torch
from matrix_models import Case, cases, differs
from reattend.hooks.trackers.caches import cache_name, cache_of
from reattend.interventions import ReattendError
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.filterwarnings("ignore:var. no first token is a sink"),
    pytest.mark.filterwarnings("ignore:the borders of the segments"),
]


class Unrounded(QuantizedLayer):
    """The layout of quantised caches, old keys and recent ones apart, without their rounding."""

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, q_tensor):
        return q_tensor


def given(make):
    """generate's options for a cache that is made for the model."""
    return lambda model: {cache_name(model): make(model.config.get_text_config(decoder=True))}


CACHES = {
    "default": lambda model: {},  # windows are kept where the model has them
    "all keys": given(lambda config: DynamicCache()),
    "static": lambda model: {"cache_implementation": "static"},
    "static, longer": given(lambda config: StaticCache(config=config, max_cache_len=200)),
    "quantised": given(lambda config: Cache(layers=[Unrounded(residual_length=3) for _ in range(config.num_hidden_layers)])),
    "offloaded": lambda model: {"cache_implementation": "offloaded"},
    "offloaded static": lambda model: {"cache_implementation": "offloaded_static"},
}
ON_GPU = ("offloaded", "offloaded static")  # both copy on a stream of their own
MODELS = {"llm": ["Llama", "Mistral", "Mistral, filling", "Gemma3"], "lvlm": ["llava", "gemma3", "windowed mistral3"]}


@pytest.mark.parametrize(("name", "model", "kind"), cases("caches", **MODELS))
def test_caches_change_nothing(name, model, kind):
    case = Case(name, model, kind)
    if case.refused("caches"):
        return
    plain = case.generate(new=5, use_cache=False)[1]
    with case.apply():
        cached = {} if "no cache" in case.example.skips else {"use_cache": False}
        tokens, logits = case.generate(new=5, **cached)
    assert (differs(plain, logits)[case.moves] > 1e-4).all(), "the recipe shows"
    for cache, options in CACHES.items():
        if cache in ON_GPU and not torch.cuda.is_available():
            continue
        untouched = case.generate(new=5, **options(case.model))[1]
        torch.testing.assert_close(untouched, plain, atol=1e-5, rtol=0, msg=lambda m: f"{cache}, no recipe: {m}")  # noqa: B023
        said = case.example.refusal(model, cache)
        if said:
            with pytest.raises(ReattendError, match=said), case.apply():
                case.generate(new=5, **options(case.model))
            continue
        with case.apply():
            got = case.generate(new=5, **options(case.model))
        assert torch.equal(got[0], tokens), cache
        torch.testing.assert_close(got[1], logits, atol=1e-4, rtol=0, msg=lambda m: f"{cache}: {m}")  # noqa: B023


class Counted(TorchDispatchMode):
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def operations(case, rows):
    """Of a decode step; the second to the fourth cost the same."""
    inputs, counts = case.inputs(rows), []
    cache, mask = cache_of(case.model(**inputs, use_cache=True)), inputs["attention_mask"]
    for token in (7, 8, 9, 10):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        with Counted() as counted:
            case.model(torch.full((len(mask), 1), token), attention_mask=mask, **{cache_name(case.model): cache})
        counts.append(counted.total)
    assert len(set(counts[1:])) == 1, counts
    return counts[1]


@pytest.mark.parametrize(("name", "model", "kind"), cases("operations", llm=["Llama"], lvlm=["llava"]))
def test_operations_added_to_a_decode_step(name, model, kind):
    """What follows from the prompt alone is done once, not per layer and step."""
    case = Case(name, model, kind)
    if case.example.operations is None:
        pytest.skip(f"the example of {name} promises no number of operations")
    per_layer, per_step = case.example.operations
    for rows in ([0], case.models.rows) if kind == "lvlm" else ([0],):
        with case.apply(rows):
            steered = operations(case, rows)
        layers = 4 if kind == "llm" else case.example.layers
        assert steered - operations(case, rows) <= layers * per_layer + per_step
