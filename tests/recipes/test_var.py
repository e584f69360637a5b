"""VAR: golden tensors of the official code, the invariants of the method, what is refused, and profiling."""

from __future__ import annotations

import warnings

import pytest
import reattend
import torch
import transformers
from golden_files import GOLDEN, golden_file
from planted_sinks import DIM, OPEN, PROMPTS, planted, tiny_models
from reattend.hooks import SiteTable, sites
from reattend.hooks.trackers.caches import cache_of
from reattend.interventions import Call, Clock, ReattendError, ReattendWarning, TokenMap, fused
from reattend.interventions.families.sinks import VisualSinks, give_back, sink_tokens
from reattend.recipes import Profile, cached_profile, recipe, recipe_class

NAMES = sorted(path.stem for path in (GOLDEN / "var").glob("*.safetensors"))


# -- golden ------------------------------------------------------------------------------------------------------------


def golden(name):
    data, facts = golden_file("var", name)
    numbers = {k: (v if k == "phase" else [int(n) for n in v.strip("[]").split(",")] if k == "sink_dims" else float(v))
               for k, v in facts.items()}  # fmt: skip
    return data, numbers


def roles(facts, prompt, length):
    start, count = int(facts["image_start"]), int(facts["image_len"])
    columns = torch.arange(prompt)[None]
    return TokenMap(
        1, prompt, length,
        {"image": (columns >= start) & (columns < start + count), "bos": columns == 0, "padding": columns < 0},
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    """Sinks, chosen rows and weights as the official code gives them, through the recipe's own edit and the fused executor."""
    data, facts = golden(name)
    prompt, keys = data["hidden_states"].shape[1], data["attn_in"].shape[3]
    tokens = roles(facts, prompt, prompt)
    found = VisualSinks.learn(None, data["hidden_states"], tokens, torch.tensor(facts["sink_dims"]), facts["tau"])
    assert found.sinks[0].nonzero()[:, 0].tolist() == data["sink_indices"].tolist()

    tokens.length = keys
    weights = data["attn_in"]
    heads, rows = weights.shape[1:3]
    chosen = recipe(
        "var", move=1 - facts["p"], tau=facts["tau"], rho=facts["rho"], summ=facts["summ"], sink_dims=facts["sink_dims"]
    )
    site = sites(tiny_models.llava().model).stack("decoder")[2]
    # scores that give exactly these weights, and values that hand them out again
    call = Call(
        torch.zeros(1, heads, rows, 8), torch.zeros(1, heads, keys, 8), torch.eye(keys).expand(1, heads, keys, keys),
        mask=weights.log(), site=site, clock=Clock(facts["phase"]), tokens=tokens, memory={site.name: found},
    )  # fmt: skip
    edit = chosen.redistribute(call)
    assert (edit is None) == (len(data["selected_bhq"]) == 0)
    if edit is None:
        assert torch.equal(data["attn_out"], data["attn_in"])
        return
    torch.testing.assert_close(fused(call, [edit]), data["attn_out"], atol=1e-6, rtol=1e-5)

    groups = found.columns(0, keys)
    options = {"move": 1 - facts["p"], "rho": facts["rho"], "summ": facts["summ"]}
    everywhere = give_back(weights, groups, found.limit(facts["rho"], weights), **options)
    changed = (everywhere != weights).any(dim=-1).nonzero().tolist()
    assert changed == data["selected_bhq"].tolist()


# -- invariants ----------------------------------------------------------------------------------------------------------


def random_case(seed, batch=2, heads=3, rows=4, keys=24):
    torch.manual_seed(seed)
    weights = (3 * torch.randn(batch, heads, rows, keys)).softmax(dim=-1)
    image = torch.zeros(batch, keys, dtype=torch.bool)
    image[0, 4:14] = True
    image[1, 2:6] = image[1, 9:13] = True
    sinks = torch.rand(batch, keys) < 0.2
    sinks[:, 0] = True
    sinks[0, 5] = sinks[1, 10] = True
    tokens = TokenMap(batch, keys, keys, {"image": image, "bos": torch.arange(keys)[None] == 0, "padding": image & False})
    return weights, image, VisualSinks(sinks, tokens)


def move(weights, found, **options):
    options = {"move": 0.4, "rho": 0.5, "summ": 0.2, **options}
    return give_back(weights, found.columns(0, weights.shape[3]), found.limit(options["rho"], weights), **options)


@pytest.mark.parametrize("seed", range(5))
def test_what_moves_and_what_stays(seed):
    weights, image, found = random_case(seed)
    new = move(weights, found)
    changed = (new != weights).any(dim=-1)
    assert changed.any() and not changed.all()
    torch.testing.assert_close(new.sum(-1), weights.sum(-1), atol=1e-6, rtol=0)
    for b, h, r in changed.nonzero().tolist():
        before, after, sinks, rest = weights[b, h, r], new[b, h, r], found.sinks[b], image[b] & ~found.sinks[b]
        torch.testing.assert_close(after[sinks], 0.6 * before[sinks])
        assert torch.equal(after[~sinks & ~image[b]], before[~sinks & ~image[b]])
        ratio = after[rest] / before[rest]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
        assert ratio[0] > 1


@pytest.mark.parametrize("seed", range(5))
def test_stricter_thresholds_never_choose_more_rows(seed):
    weights, _, found = random_case(seed)

    def count(**options):
        return set(map(tuple, (move(weights, found, **options) != weights).any(dim=-1).nonzero().tolist()))

    assert count(summ=0.5) <= count(summ=0.2) <= count(summ=0.0)
    assert count(rho=0.1) <= count(rho=0.5) <= count(rho=1.0)
    assert len(count(summ=0.0, rho=1.0)) == 24 and len(count(summ=0.5, rho=0.1)) < 24


def test_nothing_moves_without_a_visual_sink_or_a_receiver():
    weights, image, found = random_case(0)
    assert torch.equal(move(weights, found, move=0.0), weights)
    tokens = TokenMap(2, 24, 24, {"image": image, "bos": torch.arange(24)[None] == 0, "padding": image & False})
    text_only = VisualSinks(found.sinks & ~image, tokens)
    assert not text_only.any and torch.equal(move(weights, text_only, rho=1.0, summ=0.0), weights)
    # sample 1 alone has a visual sink
    single = found.sinks.clone()
    single[0] &= ~image[0]
    new = move(weights, VisualSinks(single, tokens), rho=1.0, summ=0.0)
    assert torch.equal(new[0], weights[0]) and not torch.equal(new[1], weights[1])
    # every image token is a sink: the weight would have nowhere to go
    full = move(weights, VisualSinks(found.sinks | image, tokens), rho=1.0, summ=0.0)
    assert torch.equal(full, weights)


def test_detection_is_on_the_root_mean_square():
    hidden = torch.ones(1, 3, 400)
    hidden[0, 1, 7] = -60.0
    assert sink_tokens(hidden, torch.tensor([7, 9]), 15.0).tolist() == [[False, True, False]]
    assert sink_tokens(hidden.bfloat16(), torch.tensor([7]), 15.0).tolist() == [[False, True, False]]
    assert not sink_tokens(hidden, torch.tensor([8]), 15.0).any()
    assert not sink_tokens(hidden, torch.tensor([7]), 20.0).any(), "sqrt(D) is the most there can be"


def test_sinks_are_found_in_front_of_the_norm():
    """In the state that enters a layer, as transformers hands it out: behind a norm whose weights differ others would stand out."""
    tiny = tiny_models.llava()
    inputs = tiny.inputs(PROMPTS)
    torch.manual_seed(3)
    for layer in tiny.model.model.language_model.layers:
        layer.input_layernorm.weight.data.uniform_(0.1, 5.0)
    with torch.no_grad():
        states = tiny.model(**inputs, output_hidden_states=True).hidden_states
    dims, real = torch.arange(8), inputs["attention_mask"].bool()
    options = {**OPEN, "tau": 1.5, "sink_dims": dims.tolist(), "first_layer": 0}
    with pytest.warns(ReattendWarning, match="no first token"), reattend.apply(tiny.model, "var", **options) as session:
        session.plans[0].steps[-1].intervention = lambda call: None  # found, but the model goes on as it is
        with torch.no_grad():
            cache = cache_of(tiny.model(**inputs))
        memory = session.attachment.tracker.by_cache[cache].memory[session.plans[0].memory_key]
        session.counts.clear()
    for n in range(4):
        found = memory[f"model.language_model.layers.{n}.self_attn"].sinks
        assert torch.equal(found, sink_tokens(states[n], dims, 1.5) & real)
        norm = tiny.model.model.language_model.layers[n].input_layernorm
        assert not torch.equal(found, sink_tokens(norm(states[n]), dims, 1.5) & real)


# -- what is refused, and what is said ------------------------------------------------------------------------------------


def test_warns_once_when_no_first_token_is_a_sink():
    model, sinks = planted("llava")
    inputs = sinks.inputs([[1, 5, "image", 7]])
    sinks.positions[0, 0] = False
    with pytest.warns(ReattendWarning, match="no first token is a sink") as seen, reattend.apply(model, "var", **OPEN):
        model(**inputs)
        model(**inputs)
    assert len(seen) == 1
    sinks.mark(inputs)
    with warnings.catch_warnings(), reattend.apply(model, "var", **OPEN):
        warnings.simplefilter("error")
        model(**inputs)


def test_known_models_are_told_by_their_shape():
    names = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008}
    shape = transformers.LlavaConfig(text_config={"model_type": "llama", **names, "vocab_size": 32064})
    table = SiteTable([], {}, "Model", shape)
    assert recipe("var").dims(table) == (1415, 2533)
    shape.text_config.vocab_size = 64000  # another family of the same size
    assert recipe("var").dims(table) == ()
    assert recipe("var", sink_dims=[3]).dims(table) == (3,)


class Letters:
    """As much of a tokenizer as profiling needs."""

    def __call__(self, text, return_tensors):
        ids = torch.tensor([[1, *(3 + ord(c) % 80 for c in text)]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_profile_finds_the_planted_dimension(tmp_path):
    model, sinks = planted("llava")
    sinks.positions = torch.tensor([[True]])
    found = recipe_class("var").profile(model, Letters(), tau=5.0, layers=[1, 2, 3])
    assert found.tensors["sink_dims"].tolist() == [DIM]
    assert found.facts["layers_checked"] == [1, 2, 3] and found.facts["bos_values"]["1"][str(DIM)] > 5
    path = found.save(tmp_path / "var.safetensors")
    inputs = sinks.inputs(PROMPTS)
    with reattend.apply(model, "var", **{**OPEN, "sink_dims": None, "profile_path": str(path)}) as session:
        model(**inputs)
    assert session.applied == 3
    other = Profile("var", {**found.model, "width": 64}, found.tensors)
    with pytest.raises(ReattendError, match="another model"):
        reattend.apply(model, "var", tau=5.0, profile_path=str(other.save(tmp_path / "other.safetensors")))


def test_a_kept_profile_serves_a_model_whose_dimensions_are_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr("reattend.recipes.kit.profile.cache_folder", lambda: tmp_path)
    model, sinks = planted("llava")
    open_but_unknown = {**OPEN, "sink_dims": None}
    with pytest.raises(ReattendError, match="not known"):
        reattend.apply(model, "var", **open_but_unknown)
    with pytest.raises(ReattendError, match="no profile of 'var' is kept"):
        reattend.apply(model, "var", **open_but_unknown, profile_path="cached")
    sinks.positions = torch.tensor([[True]])
    cached_profile("var", model, Letters(), tau=5.0, layers=[1, 2, 3])
    inputs = sinks.inputs(PROMPTS)
    for given in ({}, {"profile_path": "cached"}):
        with reattend.apply(model, "var", **open_but_unknown, **given) as session:
            model(**inputs)
        assert session.applied == 3


def test_profile_says_when_there_is_no_sink():
    model = tiny_models.llava().model
    with pytest.raises(ReattendError, match="no hidden dimension of the first token exceeds tau=5.5"):
        recipe_class("var").profile(model, Letters(), tau=5.5)
    with pytest.raises(ReattendError, match="not speed"):
        recipe_class("var").profile(model, Letters(), speed=2)
