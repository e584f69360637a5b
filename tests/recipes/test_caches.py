"""Every recipe under every cache: what it does to the logits does not depend on how keys are kept, nor on whether they are kept at all.

Caches differ in what a call sees of them: all keys, a buffer longer than what is written, the window alone. Parameters and models are
those of `test_language_batches` and `test_vision_matrix`; a recipe of the registry that neither of them knows fails here. The model
without a recipe is asked first; a cache under which it differs itself is named in `DIFFERS`, and is not asked further.
"""

from __future__ import annotations

import functools

import pytest
import reattend
import test_language_batches as language
import test_vision_matrix as vision
import tiny_models
import torch
from reattend.hooks.trackers.caches import cache_name
from reattend.interventions import ReattendError
from reattend.recipes import recipe_class
from test_language_batches import steered  # noqa: F401
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

GREEDY = {
    "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
}  # fmt: skip


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
# (cache, model) under which the model itself gives other logits than without a cache, and why
DIFFERS: dict[tuple[str, str], str] = {}

WINDOW = "has a sliding window of .* tokens and the sequence"
LEAVING = "tokens cannot leave a sequence whose cache is a .* with fixed, quantised or windowed layers"
TAKEN_BACK = "cannot give a tried token back"
# (recipe, model, cache) that is refused, and what it says; None = all of them
REFUSED: dict[tuple[str, str | None, str | None], str] = {
    ("pine", "Mistral", None): WINDOW,
    ("pine", "Mistral, filling", None): WINDOW,
    ("pine", "Gemma3", None): WINDOW,
    ("visual-token-exit, leaving", "gemma3", None): "is not tested for language models of type 'gemma3_text'",
    ("visual-token-exit, leaving", "mistral3", None): "has layers with a sliding window, whose caches keep keys by number",
    **{("visual-token-exit, leaving", "llava", cache): LEAVING for cache in ("static", "static, longer", "quantised")},
    ("opera", None, "quantised"): TAKEN_BACK,
    ("opera", "gemma3", "static"): TAKEN_BACK,
    ("opera", "mistral3", "static"): TAKEN_BACK,
    ("opera", "gemma3", "static, longer"): TAKEN_BACK,
    ("opera", "mistral3", "static, longer"): TAKEN_BACK,
}
# what needs a cache itself is compared with the default one
WITHOUT_CACHE = {"opera": {}}
LVLM = ("llava", "gemma3", "mistral3")


def refusal(name, model, cache):
    keys = [(name, m, c) for m in (model, None) for c in (cache, None)]
    return next((REFUSED[key] for key in keys if key in REFUSED), None)


@pytest.mark.parametrize("kind", ["llm", "lvlm"])
def test_every_recipe_is_here(kind):
    known = {"llm": {*language.RECIPES, "retrieval-heads"}, "lvlm": {*vision.METHODS}}[kind]
    known = {name.split(",")[0] for name in known}
    wanted = {slug for slug in reattend.list_recipes() if recipe_class(slug).info.kinds[0] == kind}
    assert wanted <= known, f"{wanted - known} stand neither in RECIPES nor in METHODS"


def generated(model, inputs, **options):
    out = model.generate(**inputs, **GREEDY, **options)
    return out.sequences, torch.stack(out.logits, dim=1)


def compare(run, network, name, model):
    """run(name or None, **options) -> (tokens, logits), of the model or of the model under the recipe."""
    everywhere = refusal(name, model, "any")
    if everywhere:
        with pytest.raises(ReattendError, match=everywhere):
            run(name)
        return
    plain = run(None, use_cache=False)
    tokens, logits = run(name, **WITHOUT_CACHE.get(name, {"use_cache": False}))
    assert (vision.differs(plain[1], logits) > 1e-4).any(), "the recipe shows"
    for cache, options in CACHES.items():
        if (cache, model) in DIFFERS or (cache in ON_GPU and not torch.cuda.is_available()):
            continue
        untouched = run(None, **options(network))
        torch.testing.assert_close(untouched[1], plain[1], atol=1e-5, rtol=0, msg=lambda m: f"{cache}, no recipe: {m}")  # noqa: B023
        said = refusal(name, model, cache)
        if said:
            with pytest.raises(ReattendError, match=said):
                run(name, **options(network))
            continue
        got = run(name, **options(network))
        assert torch.equal(got[0], tokens), cache
        torch.testing.assert_close(got[1], logits, atol=1e-4, rtol=0, msg=lambda m: f"{cache}: {m}")  # noqa: B023


@pytest.mark.filterwarnings("ignore:the borders of the segments")
@pytest.mark.parametrize("kind", language.MODELS)
@pytest.mark.parametrize("name", language.RECIPES)
def test_language(name, kind, steered):  # noqa: F811
    """Two rows, the shorter one padded on the left, on full, sliding and hybrid models."""
    network, inputs = language.model_of(kind), language.tokenizer()(language.PROMPTS, return_tensors="pt", padding=True)

    def run(name, **options):
        if name is None:
            return generated(network, inputs, **options)
        with steered(kind, name)[1]:
            return generated(network, inputs, **options)

    compare(run, network, name, kind)


@functools.cache
def windowed():
    """Mistral 3 with the window that its class has, made so short that images leave it."""
    tiny = tiny_models.build("mistral3")
    tiny.model.config.text_config.sliding_window = 24
    return tiny, reattend.wrap(tiny.model)


@pytest.mark.filterwarnings("ignore:var. no first token is a sink")  # its dimensions are no real ones here
@pytest.mark.parametrize("family", LVLM)
@pytest.mark.parametrize("method", vision.METHODS)
def test_vision_language(method, family, monkeypatch):
    """One image, two images and none, padded on the left."""
    if family == "mistral3":
        monkeypatch.setattr(vision, "model_of", lambda _: windowed())
    tiny, model = vision.model_of(family)
    inputs = vision.inputs_of(family, vision.PROMPTS)

    def run(name, **options):
        options["suppress_tokens"] = [tiny_models.IMAGE]  # without a cache the model would take it for a further image
        if name is None:
            return generated(model, inputs, **options)
        with vision.steer(family, name):
            return generated(model, inputs, **options)

    compare(run, tiny.model, method, family)
