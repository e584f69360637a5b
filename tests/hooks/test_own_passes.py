"""Passes of our own (branches, trials, probes): with the real pass's positions, on any cache, with its gradients, and asked for in time."""

from __future__ import annotations

import copy

import pytest
import reattend
import tiny_models
import torch
from reattend.hooks import Branch, Capture, Edits, Lookahead, Plan, Probe, attach, sites
from reattend.hooks.trackers.caches import cache_name, cache_of
from reattend.interventions import HeadGain, ReattendError
from reattend.interventions.families.over_trust import strongest_row
from tiny_language import language_model

FIRST = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
PROMPTS = [[1, 50, 5, 6, 7, "image", 8, 9, 51], [1, 50, 5, 6, 7, 8, 51]]


def first_logits(model, inputs, **more):
    return model.generate(**copy.copy(inputs), **{**FIRST, **more}).logits[0]


def opt():
    return language_model("OPT", ffn_dim=48, word_embed_proj_dim=32)


def ones(model, ids):
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), len(ids[0]), dtype=torch.long)}


# -- positions -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["opt", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("recipe", [("spa", {"ranges": [(2, 5)], "strength": 3.0}), ("opera", {"candidates": 3})])
def test_a_bare_call_has_the_positions_that_generate_gives(family, recipe):
    """Without position_ids these models count them from the mask; what a branch hides must not move what it keeps."""
    slug, parameters = recipe
    if family == "opt":
        if slug == "opera":
            parameters = {**parameters, "image_range": (2, 4)}
        model, inputs = opt(), ones(None, [[1, 5, 6, 7, 8, 9, 10, 11, 12, 13]])
    else:
        tiny = tiny_models.build(family)
        model, inputs = tiny.model, tiny.inputs(PROMPTS)
    plain = model(**inputs).logits[:, -1]
    torch.testing.assert_close(plain, first_logits(model, inputs), atol=1e-5, rtol=1e-4)
    with reattend.apply(model, slug, **parameters):
        found = model(**inputs).logits[:, -1]
        torch.testing.assert_close(found, first_logits(model, inputs), atol=1e-5, rtol=1e-4)
    assert (found - plain).abs().max() > 1e-3
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_a_passage_may_overlap_an_image():
    tiny = tiny_models.build("qwen2_5_vl")
    inputs = tiny.inputs([[1, 50, "image", 5, 6, 7, 8, 51]])
    with reattend.apply(tiny.model, "spa", ranges=[(2, 5)]):
        found = tiny.model(**inputs).logits[:, -1]
        torch.testing.assert_close(found, first_logits(tiny.model, inputs), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_steps_without_positions_go_on_where_the_real_pass_is():
    """model(...) token by token, without position_ids, as generate does it with them."""
    model, ids = opt(), [1, 5, 6, 7, 8, 9, 10, 11]
    inputs = ones(model, [ids])
    with reattend.apply(model, "spa", ranges=[(2, 5)], strength=3.0):
        wanted = model.generate(**inputs, **{**FIRST, "max_new_tokens": 4})
        output, mask = model(**inputs, use_cache=True), inputs["attention_mask"]
        for step, logits in enumerate(wanted.logits):
            torch.testing.assert_close(output.logits[:, -1], logits, atol=1e-5, rtol=1e-4)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            token = wanted.sequences[:, len(ids) + step, None]
            output = model(token, attention_mask=mask, **{cache_name(model): cache_of(output)})


@torch.no_grad()
def test_distances_counted_from_the_mask_are_refused():
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    config = FalconConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True)
    model = FalconForCausalLM(config).eval()
    with reattend.apply(model, "spa", ranges=[(2, 5)]), pytest.raises(ReattendError, match="alibi"):
        model(**ones(model, [[1, 5, 6, 7, 8, 9]]))


# -- caches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [("pai", {"first_layer": 1, "alpha": 0.5, "gamma": 1.3}), ("spa", {"ranges": [(2, 5)]})])
def test_trials_beside_branches_on_sliding_caches(other):
    """Trials make the real cache keep more than its window; a branch's cache has windows of its own."""
    tiny = tiny_models.build("gemma3")  # windows of 16
    inputs = tiny.inputs([[1, 50, 12, 13, 14, 15, "image", 8, 9, 51, 30, 31, 32, 33, 34, 51]])
    options = {**FIRST, "max_new_tokens": 4}
    model = tiny.model
    with reattend.apply(model, ("opera", {"candidates": 50, "penalty_weight": 0.0}), other):
        both = torch.stack(model.generate(**copy.copy(inputs), **options).logits)
    with reattend.apply(model, other[0], **other[1]):
        alone = torch.stack(model.generate(**copy.copy(inputs), **options).logits)
    tried = (both > -900) & (alone > -900)
    assert tried.sum(dim=-1).min() > 1
    torch.testing.assert_close(both[tried], alone[tried], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recipes", [["opera"], ["opera", "pai"]])
def test_next_tokens_are_tried_on_static_caches(recipes):
    """Also at the last step, where the cache is full."""
    tiny = tiny_models.build("llava")
    inputs = tiny.inputs([[1, 50, "image", 5, 6, 7, 8, 9, 51], [1, 50, 8, 9, 51]])
    chosen = [(slug, {"opera": {"candidates": 3}, "pai": {"gamma": 1.3}}[slug]) for slug in recipes]
    found = []
    with reattend.apply(tiny.model, *chosen):
        for more in ({}, {"cache_implementation": "static", "disable_compile": True}):
            found.append(torch.stack(tiny.model.generate(**copy.copy(inputs), **{**FIRST, "max_new_tokens": 4}, **more).logits))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_a_window_that_cannot_give_a_token_back_is_refused_before_the_pass():
    tiny = tiny_models.build("gemma3")
    inputs = tiny.inputs([[1, 50, "image", 5, 6, 7, 8, 9, 51]])
    with (
        reattend.apply(tiny.model, "opera", candidates=2) as session,
        pytest.raises(ReattendError, match="cannot give a tried token"),
    ):
        tiny.model.generate(**inputs, max_new_tokens=12, cache_implementation="static", disable_compile=True)
    assert session.applied == 0


def test_generated_tokens_keep_their_type_without_a_cache():
    """PaliGemma's prompt sees all of itself: a branch must not read generated tokens as part of it."""
    tiny = tiny_models.build("paligemma")
    inputs = tiny.inputs([[1, 50, "image", 5, 6, 7, 8, 9, 51]])
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    found = []
    with reattend.apply(tiny.model, "pai", alpha=0, gamma=1.3):
        for use in (True, False):
            options = {**FIRST, "max_new_tokens": 4, "use_cache": use}
            found.append(torch.stack(tiny.model.generate(**copy.copy(inputs), **options).logits))
    torch.testing.assert_close(found[0], found[1], atol=5e-5, rtol=1e-4)


# -- branches that were not needed at first ---------------------------------------------------------------------------------


@torch.no_grad()
def test_a_branch_is_asked_for_with_every_part_of_a_prompt():
    model = language_model()
    ids = torch.tensor([[1, 8, 4, 21, 6, 17, 90]])

    def inputs(prompt):  # wanted from the token 17 on
        return prompt.arguments if bool((prompt.arguments["input_ids"] == 17).any()) else None

    plan = Plan("late", [Branch([inputs], lambda step: 2 * step.logits)])

    def parts(*cuts):
        cache = None
        for start, stop in zip((0, *cuts), (*cuts, ids.shape[1])):
            mask = torch.ones(1, stop, dtype=torch.long)
            output = model(ids[:, start:stop], attention_mask=mask, use_cache=True, **{cache_name(model): cache})
            cache = cache_of(output)

    ran = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with attach(model, [plan]) as session:
        with pytest.raises(ReattendError, match="prefill_chunk_size=None"):
            parts(4)
        assert len(ran) == 1, "refused before the second part runs"
        ids = ids[:, :5]
        parts(2)  # none of its parts wants one
        assert session.stats == {"late": {}}
        session.counts.clear()
    handle.remove()


# -- gradients -----------------------------------------------------------------------------------------------------------


def slopes(model, value):
    """(what autograd says, what a step shows) of the slope of value() along a fixed direction of the embeddings."""
    weight = model.get_input_embeddings().weight
    way = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=weight.dtype)
    told = (torch.autograd.grad(value(), weight)[0] * way).sum()
    with torch.no_grad():
        kept = weight.clone()
        weight.copy_(kept + 1e-5 * way)
        above = value()
        weight.copy_(kept - 1e-5 * way)
        below = value()
        weight.copy_(kept)
    return float(told), float((above - below) / 2e-5)


SPA, PAI = {"ranges": [(2, 5)], "strength": 3.0, "modulated": False}, {"alpha": 0, "gamma": 1.3}
RULE_OUT = {"candidates": 50, "penalty_weight": 0.0}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("recipe", [("spa", SPA), ("pai", PAI), ("opera", RULE_OUT)])
def test_gradients_are_those_of_the_logits(recipe, steps):
    """Through the branch's own pass and through both caches, from the prompt on."""
    tiny = tiny_models.build("llava")
    model = tiny.model.double()
    inputs = tiny.inputs([[1, 50, "image", 5, 6, 7, 8, 9, 51]])
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    width = inputs["input_ids"].shape[1]
    chosen = None

    def value():
        nonlocal chosen
        output = model(**inputs, use_cache=True)
        for step in range(steps):
            mask = torch.ones(1, width + step + 1, dtype=torch.long)
            output = model(torch.tensor([[5 + step]]), attention_mask=mask, **{cache_name(model): cache_of(output)})
        last = output.logits[0, -1]
        chosen = last.topk(3).indices if chosen is None else chosen
        return last[chosen].sum()

    with reattend.apply(model, recipe[0], **recipe[1]):
        told, true = slopes(model, value)
    assert told == pytest.approx(true, rel=0.02, abs=0.05)


def test_a_gradient_that_trials_would_need_is_refused():
    tiny = tiny_models.build("llava")
    inputs = tiny.inputs([[1, 50, "image", 5, 6, 7, 8, 9, 51]])
    with reattend.apply(tiny.model, "opera", candidates=3):
        logits = tiny.model(**inputs).logits  # nobody has to say no_grad
        with pytest.raises(ReattendError, match="opera: the passes that try next tokens have no gradient"):
            logits[:, -1].logsumexp(-1).sum().backward()


def test_what_a_probe_reads_has_gradients_too():
    """A factor that is read in the probe and used in the real pass counts in its gradient."""
    model = language_model().double()
    site = sites(model).stack("decoder").layers(0, 0)

    def read(call, edits):
        call.memory["gain"] = call.query.mean().sigmoid()

    plan = Plan(
        "probe", [Probe([Capture(site, read)]), Edits(site, lambda call: HeadGain(factor=call.memory["gain"] * torch.ones(4)))]
    )
    ids = torch.tensor([[1, 8, 4, 21, 6, 17, 90]])
    with attach(model, [plan]):
        told, true = slopes(model, lambda: model(ids).logits[0, -1, :9].sum())
    assert told == pytest.approx(true, rel=0.02)


def test_trials_do_not_cut_the_caches_graph():
    model = language_model()
    last = sites(model).stack("decoder").layers(-1, -1)
    step = Lookahead(2, last, strongest_row, lambda trials: trials.logits)
    with attach(model, [Plan("look", [step])]):
        cache = cache_of(model(torch.tensor([[1, 8, 4, 21]]), use_cache=True))
    assert all(layer.keys.requires_grad and layer.keys.shape[2] == 4 for layer in cache.layers)
