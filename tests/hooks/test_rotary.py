"""The rotary door: what a model has turned, turned further or back here, is what it turns to other positions, or what it projected."""

from __future__ import annotations

import pytest
import tiny_denoisers
import torch
from reattend.hooks import Edits, Plan, Projection, Rotary, attach, sites
from reattend.hooks.sites.denoisers import turned_by_position
from reattend.hooks.sites.rotary import rotary_misfit
from reattend.hooks.sites.rotary_tables import read_layout
from reattend.interventions import ReattendError, UnsupportedError
from reattend.interventions.rotary import Rotary as Rule
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
        rotary = Rule(torch.rand(3), start=start)
        turned = rotary.turn(x, torch.randint(-5, 5, (2, 1, 4)))
        kept = [*range(start), *range(start + 6, 10)]
        assert torch.equal(turned[..., kept], x[..., kept])
        assert rotary.turn(x[:, :, None], torch.ones(5, 1)).shape == (2, 3, 5, 4, 10)
        torch.testing.assert_close(rotary.turn(turned, -torch.zeros(1)), turned)
    back = Rule(torch.rand(5), interleaved=True)
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


# -- denoisers, whose tables are found by trying ---------------------------------------------------------------------------

TURNED = {
    "FluxTransformer2DModel", "HunyuanDiT2DModel", "Lumina2Transformer2DModel", "HunyuanVideoTransformer3DModel",
    "LTXVideoTransformer3DModel", "WanTransformer3DModel", "QwenImageTransformer2DModel", "CogVideoXTransformer3DModel",
}  # fmt: skip


def denoiser(family):
    model, inputs = tiny_denoisers.build(family)
    if family.startswith("CogVideoX"):  # its pipeline makes the table
        angles = torch.rand(3 * 4 * 4, 4).repeat_interleave(2, dim=1) * 6
        inputs["image_rotary_emb"] = (angles.cos(), angles.sin())
    return model, inputs, sites(model).where(lambda s: turned_by_position(sites(model).module(s)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(TURNED))
def test_states_turned_back_are_what_the_model_projected(family, dtype):
    model, inputs, where = denoiser(family)
    model = model.to(dtype)
    inputs = {n: x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x for n, x in inputs.items()}
    projected, found, turns = {}, {}, {}

    def reader(seen):
        projected.setdefault((seen.site.name, seen.which), []).append(seen.states.clone())

    def look(call):
        turned, name = call.turned, call.site.name
        for which, table, states in (("query", turned.query, call.query), ("key", turned.key, call.key)):
            found[name, which] = states if table is None else table.off(states)
            turns[name, which] = table
            if table is not None:
                torch.testing.assert_close(table.on(found[name, which]), states, atol=tolerance, rtol=tolerance)

    tolerance = 2e-5 if dtype == torch.float32 else 5e-2
    steps = [Projection(where, reader=reader, of=("query", "key")), Rotary(where), Edits(where, look)]
    with torch.no_grad():
        plain = model(**inputs)[0]
        for _ in range(2):  # layouts are found at the first pass and known at the second
            projected.clear()
            with attach(model, [Plan("look", steps)]):
                assert torch.equal(model(**inputs)[0], plain)
    assert turns[where[0].name, "query"] is not None and {n for n, _ in found} == {s.name for s in where}
    for key, states in found.items():
        parts = projected[key]
        orders = [torch.cat(parts, dim=2), torch.cat(parts[::-1], dim=2)]
        orders = [o.repeat_interleave(states.shape[1] // o.shape[1], dim=1) for o in orders]
        seen = states.any(dim=-1, keepdim=True)  # Lumina 2's RoPE makes padded text zero
        assert any(torch.allclose(o * seen, states, atol=tolerance, rtol=tolerance) for o in orders), key
        cross = ".attn2" in key[0]
        assert (turns[key] is None) == (cross and not (family.startswith("Hunyuan") and key[1] == "query")), key


@pytest.mark.parametrize("family", ["FluxTransformer2DModel", "QwenImageTransformer2DModel", "WanTransformer3DModel"])
def test_tokens_put_to_other_places(family):
    """Turned back and on to the places of other tokens: their scores with one another stay, in another order."""
    model, inputs, where = denoiser(family)
    seen = []

    def look(call):
        order = torch.arange(call.num_queries).flip(0)
        turns = call.turned.query
        q, k = (turns.on(turns.off(x), order) for x in (call.query, call.key))
        one, other = (a.transpose(2, 3) for a in (call.turned.key.off(call.key), turns.off(k, order)))
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        seen.append((q.norm() - call.query.norm()).abs() < 1e-3 and not torch.allclose(q, call.query, atol=1e-2))

    first = where.layers(0, 0).where(lambda s: not s.name.endswith("attn2"))
    with torch.no_grad(), attach(model, [Plan("look", [Rotary(first), Edits(first, look)])]):
        model(**inputs)
    assert seen and all(seen)


def test_a_table_that_comes_and_goes():
    model, inputs, where = denoiser("CogVideoXTransformer3DModel")
    table = inputs.pop("image_rotary_emb")
    met = []
    look = Edits(where.layers(0, 0), lambda call: met.append(call.turned.query is not None))
    with torch.no_grad(), attach(model, [Plan("look", [Rotary(where), look])]):
        for given in (None, table, None):
            model(**inputs, image_rotary_emb=given)
    assert met == [False, True, False]


HALVES = {"use_real_unbind_dim": -2}


@pytest.mark.parametrize("form", ["neighbours", "halves", "complex", "image last", "text and image", "angles"])
def test_layouts_of_a_table(form):
    """By diffusers' own function; halves are those of CogView4, Cosmos and OmniGen."""
    from diffusers.models.embeddings import apply_rotary_emb

    torch.manual_seed(0)
    states, angles = torch.randn(2, 3, 7, 8), torch.rand(7, 4) * 6
    double = angles.repeat_interleave(2, dim=1) if form != "halves" else torch.cat([angles, angles], dim=1)
    given = (double.cos(), double.sin())
    expected = apply_rotary_emb(states, given, **(HALVES if form == "halves" else {}))
    before = [states]
    if form == "complex":
        given = torch.polar(torch.ones_like(angles), angles)[None]
    elif form == "angles":
        given = double[None, :, None]
    elif form == "image last":
        given = tuple(part[:5] for part in given)
        expected = torch.cat([states[:, :, :2], apply_rotary_emb(states[:, :, 2:], given)], dim=2)
    elif form == "text and image":
        whole = torch.polar(torch.ones_like(angles), angles)
        given, before = (whole[2:], whole[:2]), [states[:, :, 2:], states[:, :, :2]]
    layout, only = read_layout(given, before, expected)
    assert layout is not None and only and layout.interleaved == (form != "halves")
    torch.testing.assert_close(layout.turns(given, expected).off(expected), states, atol=1e-5, rtol=1e-5)


def test_what_is_no_layout_is_refused():
    model, inputs, where = denoiser("FluxTransformer2DModel")

    def other_table(_, args, kwargs):
        cos, sin = kwargs["image_rotary_emb"]
        return args, {**kwargs, "image_rotary_emb": (cos.flip(1), sin)}

    look = [Rotary(where), Edits(where, lambda call: call.turned and None)]
    with torch.no_grad(), attach(model, [Plan("look", look)]):
        # the model turns by another table than the one that it shows
        hook = sites(model).module(where[0]).register_forward_pre_hook(other_table, with_kwargs=True)
        with pytest.raises(
            UnsupportedError, match=f"{where[0].name} is a site whose rotary .* not of a kind that is known here"
        ):
            model(**inputs)
        hook.remove()


@pytest.mark.parametrize(("family", "reason"), [
    ("UNet2DConditionModel", "does not turn its queries and keys by position"),
    ("MochiTransformer3DModel", "calls attention once for each sample"),
])  # fmt: skip
def test_sites_without_tables_are_refused_when_the_session_begins(family, reason):
    model, _ = tiny_denoisers.build(family)
    where = sites(model).where(lambda s: s.supported and s.stack != "denoiser.pool")
    with pytest.raises(UnsupportedError, match=reason):
        attach(model, [Plan("look", [Rotary(where)])])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_without_the_step_nothing_is_known():
    model, inputs, where = denoiser("FluxTransformer2DModel")
    plan = Plan("look", [Edits(where, lambda call: call.turned and None)])
    with torch.no_grad(), attach(model, [plan]), pytest.raises(ReattendError, match=r"put the step Rotary\(sites\) before"):
        model(**inputs)


def test_the_step_on_a_language_model():
    model, met = model_of("Llama"), []
    where = sites(model).stack("decoder")
    with torch.no_grad():
        plain = model(IDS).logits
        with attach(model, [Plan("look", [Rotary(where), Edits(where, lambda call: met.append(call.rotary) and None)])]):
            assert torch.equal(model(IDS).logits, plain)
    assert len(met) == 4
    bloom = language_model("Bloom", n_head=2, n_layer=1)
    with pytest.raises(UnsupportedError, match="cannot be intercepted|no rotary positions of the usual kind"):
        attach(bloom, [Plan("look", [Rotary(sites(bloom))])])
