"""Models that share configs or modules, and implementations that are switched inside a session: who acts, and what is restored."""

from __future__ import annotations

import pytest
import torch
from reattend.hooks import Edits, Observe, Plan, attach, sites
from reattend.interventions import HeadGain, ReattendError, ReattendWarning
from tiny_denoisers import unet
from tiny_llama import IDS, drop_first, halve, logits, session_of, tiny_llama, traces
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention


def gain(head: int):
    return lambda call: HeadGain(factor=0.3, heads=[head])


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_two_models_on_one_config(first_ends_first):
    first = tiny_llama()
    left = traces(first)
    second = tiny_llama(first.config)
    before = logits(second)
    sessions = session_of(first), session_of(second)
    steered = logits(second)
    assert not torch.equal(steered, before)
    ends, stays = sessions if first_ends_first else sessions[::-1]
    ends.remove()
    assert torch.equal(logits(second if first_ends_first else first), steered)
    assert torch.equal(logits(first if first_ends_first else second), before)
    stays.remove()
    assert torch.equal(logits(second), before) and traces(first) == left


@pytest.mark.parametrize("inner_ends_first", [True, False])
def test_sessions_on_a_model_and_on_the_model_inside(inner_ends_first):
    model = tiny_llama()
    before, left = logits(model), traces(model)
    alone = {}
    for head in (1, 2):
        with session_of(model, gain(head)):
            alone[head] = logits(model)
    with session_of(model, gain(1)), session_of(model, gain(2)):
        both = logits(model)
    outer, inner = session_of(model, gain(1)), session_of(model.model, gain(2))
    assert torch.equal(logits(model), both)
    assert outer.stats["test"] == {f"model.layers.{i}.self_attn": 1 for i in range(3)}
    assert inner.stats["test"] == {f"layers.{i}.self_attn": 1 for i in range(3)}
    first, second = (inner, outer) if inner_ends_first else (outer, inner)
    first.remove()
    assert torch.equal(logits(model), alone[1 if inner_ends_first else 2])
    second.remove()
    assert torch.equal(logits(model), before) and traces(model) == left


def test_owners_act_in_the_order_in_which_their_sessions_began():
    model = tiny_llama()

    def double(call):
        order.append("double")
        return HeadGain(factor=2.0)

    def other(call):
        order.append("other")
        return HeadGain(factor=0.1)

    for outer_first in (True, False):
        order: list[str] = []
        pairs = [(model, double), (model.model, other)]
        sessions = [session_of(m, f) for m, f in (pairs if outer_first else pairs[::-1])]
        logits(model)
        assert order[:2] == (["double", "other"] if outer_first else ["other", "double"])
        for session in sessions:
            session.remove()


class Tower(nn.Module):
    """One attention module in two models, as a text encoder or a vision tower may be."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.tower = shared

    def forward(self, x):
        return self.tower(x)


class Sdpa(nn.Module):
    heads = 2

    def forward(self, x):
        x = x.unflatten(2, (2, -1)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(x, x, x).transpose(1, 2).flatten(2)


def test_a_module_in_two_models():
    shared = Sdpa()
    first, second = Tower(shared), Tower(shared)
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    plain = shared(x)
    one, two = session_of(first, gain(0)), session_of(second, gain(1))
    for model in (first, second):
        torch.testing.assert_close(model(x), plain * 0.3)
    one.remove()
    torch.testing.assert_close(second(x), torch.cat([plain[..., :4], plain[..., 4:] * 0.3], dim=-1))
    two.remove()
    assert torch.equal(first(x), plain) and not shared._forward_hooks and not shared._forward_pre_hooks


# -- implementations that are switched -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_switch_inside_a_session_is_adopted_and_stays(name):
    model = tiny_llama()
    with session_of(model, drop_first):
        expected = logits(model)
    with session_of(model, drop_first) as session:
        logits(model)
        model.set_attn_implementation(name)
        torch.testing.assert_close(logits(model), expected)
        assert session.applied == 6
    assert model.config._attn_implementation == name and type(model.config._attn_implementation) is str
    assert traces(model)[0] == 0 and not [n for n in traces(model)[2] if n.startswith("reattend")]


def test_a_replaced_config_is_adopted():
    model = tiny_llama()
    with session_of(model):
        expected = logits(model)
    other = LlamaConfig(**{**model.config.to_dict(), "attn_implementation": "sdpa"})
    with session_of(model):
        model.model.layers[1].self_attn.config = other
        assert torch.equal(logits(model), expected)
    assert other._attn_implementation == "sdpa" and traces(model)[0] == 0


def test_a_switch_to_a_kernel_that_cannot_be_edited_is_said_once_and_recipes_are_off_until_the_switch_back():
    model = tiny_llama()
    plain = logits(model)
    with session_of(model):
        steered = logits(model)
    AttentionInterface.register("my_kernel", AttentionInterface._global_mapping["sdpa"])
    AttentionMaskInterface.register("my_kernel", AttentionMaskInterface._global_mapping["sdpa"])
    try:
        with session_of(model) as session:
            assert torch.equal(logits(model), steered)
            before = model.config._attn_implementation
            for _ in range(2):
                model.set_attn_implementation("my_kernel")
                acted = session.applied
                with pytest.warns(ReattendWarning, match="'my_kernel' inside a session, which cannot be edited"):
                    assert torch.equal(logits(model), plain)
                assert torch.equal(logits(model), plain), "said once"
                assert session.applied == acted
                model.set_attn_implementation(before)
                assert torch.equal(logits(model), steered)
            model.set_attn_implementation("my_kernel")
        assert model.config._attn_implementation == "my_kernel"
    finally:
        del AttentionInterface._global_mapping["my_kernel"], AttentionMaskInterface._global_mapping["my_kernel"]
        model.config._attn_implementation_internal = "sdpa"
    assert torch.equal(logits(model), plain)


def test_a_switch_in_mid_pass_is_an_error():
    model = tiny_llama()
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: model.set_attn_implementation("eager"))
    with session_of(model) as session:
        with pytest.raises(ReattendError, match="switched to 'eager' while a forward pass was under way"):
            logits(model)
        handle.remove()
        logits(model)
        assert session.applied == 4


def test_attention_that_does_not_come_through_is_an_error(monkeypatch):
    model = tiny_llama()
    with pytest.warns(ReattendWarning, match="never acted"), session_of(model):
        monkeypatch.setattr(LlamaAttention, "forward", lambda self, hidden_states, **_: (hidden_states, None))
        with pytest.raises(ReattendError, match="no attention of that stack came through"):
            logits(model)


@pytest.mark.parametrize("how", ["sliced", "eager", "same class"])
def test_processors_that_are_switched_inside_a_session(how):
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    model, inputs = unet()

    def run():
        with torch.no_grad():
            return model(**inputs).sample

    before = run()
    table = sites(model).where(lambda s: s.supported)
    with attach(model, [Plan("halve", [Edits(table, halve)])]):
        expected = run()
        if how == "sliced":
            model.set_attention_slice(1)
        else:
            model.set_attn_processor(AttnProcessor() if how == "eager" else AttnProcessor2_0())
        if how == "same class":
            assert torch.equal(run(), expected)
        else:
            with pytest.raises(ReattendError, match="did not come through the session.*never calls torch's SDPA"):
                run()
    torch.testing.assert_close(run(), before)


def test_a_pipelines_denoiser_has_its_name_in_each_session():
    model, inputs = unet()
    table = sites(model).where(lambda s: s.supported)
    with attach(model, [Plan("halve", [Edits(table, halve)])]) as bare:
        wrapped = nn.ModuleDict({"unet": model})
        names = sites(wrapped).where(lambda s: s.supported)
        with attach(wrapped, [Plan("halve", [Edits(names, halve)])]) as whole, torch.no_grad():
            model(**inputs)
    assert {f"unet.{name}" for name in bare.stats["halve"]} == set(whole.stats["halve"])


# -- what others see -----------------------------------------------------------------------------------------------------


def test_hooks_of_others_on_an_eager_module_get_the_edited_weights():
    model = tiny_llama()
    model.set_attn_implementation("eager")
    seen = []
    handle = model.model.layers[1].self_attn.register_forward_hook(lambda m, a, output: seen.append(output[1]))
    logits(model)
    with session_of(model, drop_first), torch.no_grad():
        logits(model)
        asked = model(IDS, output_attentions=True).attentions[1]
    handle.remove()
    assert seen[0].shape == seen[1].shape == (2, 4, 12, 12)
    assert torch.equal(seen[1], asked) and not torch.allclose(seen[0], seen[1])


def test_continuous_batching_gets_the_one_promised_error():
    model = tiny_llama()
    model.generation_config.max_new_tokens = 2
    with session_of(model), pytest.raises(ReattendError, match=r"paged caches \(continuous batching\) are not supported"):
        model.generate_batch([IDS[0].tolist()], generation_config=model.generation_config)


@pytest.mark.parametrize("how", ["wrapper", "method", "forward"])
def test_taps_on_a_compiled_and_warm_model_read(how):
    model = tiny_llama()
    compiled = torch.compile(model, backend="eager") if how == "wrapper" else model
    if how == "method":
        model.compile(backend="eager")
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    before, seen = logits(compiled), []
    table = sites(compiled)
    with pytest.warns(ReattendWarning, match="the model is compiled"):
        session = attach(compiled, [Plan("look", [Observe(table, lambda o: seen.append(o.site.layer))])])
    logits(compiled)
    session.remove()
    assert seen == [0, 1, 2]
    torch.testing.assert_close(logits(compiled), before)
    assert seen == [0, 1, 2]
    torch.compiler.reset()
