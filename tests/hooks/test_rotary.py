"""The rotary door: keys that a model has turned, turned further here, are the keys of later positions; anything else is refused."""

from __future__ import annotations

import pytest
import torch
from reattend.hooks import Edits, Plan, attach, sites
from reattend.hooks.sites.rotary import rotary_misfit
from reattend.interventions import ReattendError
from reattend.interventions.rotary import Rotary
from tiny_language import language_model

pytestmark = pytest.mark.filterwarnings("ignore:recipe 'look' never acted")
IDS = torch.tensor([[1, 9, 44, 17, 80, 33]])
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "Llama": {}, "Llama yarn": {"rope_parameters": YARN}, "Llama llama3": {"rope_parameters": LLAMA3}, "Qwen2": {}, "Qwen3": {},
    "Mistral": {}, "Mixtral": {}, "Gemma": {}, "Gemma2": {}, "Gemma3": {}, "Phi": {}, "Phi3": {}, "StableLm": {}, "Persimmon": {},
    "Glm": {}, "Glm4": {}, "Cohere": {}, "Olmo2": {}, "GPTNeoX": {}, "Nemotron": {}, "Granite": {}, "Starcoder2": {}, "Helium": {},
    "Ernie4_5": {}, "GptOss": {},
}  # fmt: skip


def model_of(name):
    return language_model(name.split()[0], **FAMILIES[name])


def keys_at(model, positions):
    """({site: keys}, {site: rotary}) of a pass at these positions."""
    keys, rotary = {}, {}

    def look(call):
        keys[call.site.name], rotary[call.site.name] = call.key.clone(), call.rotary

    table = sites(model).stack("decoder").kind("self")
    with torch.no_grad(), attach(model, [Plan("look", [Edits(table, look)])]):
        model(IDS, position_ids=positions, use_cache=False)
    return keys, rotary


@pytest.mark.parametrize("name", FAMILIES)
def test_turned_keys_are_keys_of_later_positions(name):
    """In all layers by a step for all tokens (distances stay), in the first layer by any steps; so the layout is the model's own."""
    model = model_of(name)
    assert rotary_misfit(sites(model).stack("decoder")) == ""
    here = torch.arange(6)[None] + 3
    before, rotary = keys_at(model, here)
    after, _ = keys_at(model, here + 11)
    for site, key in before.items():
        assert (key - after[site]).abs().max() > 1e-2, site
        torch.testing.assert_close(rotary[site].turn(key, torch.tensor(11)), after[site], atol=2e-4, rtol=1e-3)
        told = rotary[site].positions
        assert torch.equal(told, here) if name != "Persimmon" else told is None, (
            "Persimmon's layers are not told their positions"
        )
    first = next(iter(before))
    zero, _ = keys_at(model, here * 0)
    torch.testing.assert_close(rotary[first].turn(before[first], -here[:, None]), zero[first], atol=2e-4, rtol=1e-3)


def test_frequencies_follow_a_cast_model():
    """`model.to(bfloat16)` casts the frequencies too: what the model then does with them is what counts."""
    model = language_model("Llama", hidden_size=64, head_dim=16).to(torch.bfloat16).float()
    before, rotary = keys_at(model, torch.arange(6)[None])
    after, _ = keys_at(model, torch.arange(6)[None] + 300)
    first = next(iter(before))
    torch.testing.assert_close(rotary[first].turn(before[first], torch.tensor(300)), after[first], atol=1e-3, rtol=1e-3)


def test_turning_leaves_other_dimensions_alone_and_broadcasts():
    x = torch.randn(2, 3, 4, 10)
    for start in (0, 2):
        rotary = Rotary(torch.rand(3), start=start)
        turned = rotary.turn(x, torch.randint(-5, 5, (2, 1, 4)))
        kept = [*range(start), *range(start + 6, 10)]
        assert torch.equal(turned[..., kept], x[..., kept])
        assert rotary.turn(x[:, :, None], torch.ones(5, 1)).shape == (2, 3, 5, 4, 10)
        torch.testing.assert_close(rotary.turn(turned, -torch.zeros(1)), turned)
    back = Rotary(torch.rand(5), interleaved=True)
    torch.testing.assert_close(back.turn(back.turn(x, torch.tensor(7)), torch.tensor(-7)), x, atol=1e-5, rtol=0)


REFUSED = {
    "Bloom": ({}, "usual kind"), "OPT": ({}, "usual kind"), "GPTJ": ({}, "usual kind"), "DeepseekV3": ({}, "usual kind"),
    "SmolLM3": ({}, "without rotary"), "Cohere2": ({}, "only where"), "HunYuanDenseV1": ({}, "after they were turned"),
    "Llama": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "dynamic"),
    "Qwen2VL": ({}, "multimodal"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_with_the_reason(name):
    changes, reason = REFUSED[name]
    if name == "Qwen2VL":
        import tiny_models

        model = tiny_models.qwen2_vl().model
    else:
        model = language_model(name, **changes)
    table = sites(model).stack("decoder").kind("self")
    assert reason in rotary_misfit(table)
    assert rotary_misfit(table).startswith(table[0].name.split(".")[0])


def test_a_call_without_a_model_has_no_positions():
    from reattend.interventions import Call

    x = torch.ones(1, 1, 2, 4)
    with pytest.raises(ReattendError, match="not known"):
        Call(x, x, x).rotary  # noqa: B018
