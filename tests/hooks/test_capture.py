"""Capture: the numbers equal those of a softmax by hand, and looking changes nothing."""

from __future__ import annotations

import pytest
import reattend
import torch
from reattend.hooks import Plan, Session
from reattend.hooks.recording import _membership
from reattend.interventions import Call, Clock, PoolKV, ReattendError, Reorder, TokenMap
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(1))


def eager_maps(model, **inputs):
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return model(**inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")


def test_masses_and_entropy_are_those_of_the_softmax(model, ids):
    maps = eager_maps(model, input_ids=ids)
    with reattend.capture(model, rows="all", maps=[7, 39]) as seen, torch.no_grad():
        model(ids, use_cache=False)
    assert set(seen.readings) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    for layer, map_ in enumerate(maps):
        (reading,) = seen.readings[f"model.layers.{layer}.self_attn"]
        assert torch.allclose(reading.mass["bos"], map_[..., 0].mean(dim=2), atol=1e-6)
        assert torch.allclose(reading.mass["prompt"], map_[..., 1:].sum(dim=3).mean(dim=2), atol=1e-6)
        assert torch.allclose(sum(reading.mass.values()), torch.ones(2, 4), atol=1e-6)
        assert torch.allclose(reading.entropy, torch.special.entr(map_).sum(dim=3).mean(dim=2), atol=1e-5)
        assert torch.allclose(reading.maps[7], map_[:, :, 7], atol=1e-6)
        assert torch.allclose(reading.maps[39], map_[:, :, 39], atol=1e-6)
        mean = map_.mean(dim=(1, 2))
        assert torch.equal(reading.columns, mean.topk(8).indices)


def test_padding_is_not_read_and_last_rows_are_each_sequences_own(model, ids):
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0  # right padding: the last real row of sequence 1 is 24
    maps = eager_maps(model, input_ids=ids, attention_mask=mask)
    with reattend.capture(model, rows="last") as seen, torch.no_grad():
        model(ids, attention_mask=mask, use_cache=False)
    (reading,) = seen.readings["model.layers.1.self_attn"]
    last = torch.stack([maps[1][0, :, 39], maps[1][1, :, 24]])
    assert torch.allclose(reading.mass["bos"], last[..., 0], atol=1e-6)
    assert torch.allclose(reading.mass["padding"], torch.zeros(2, 4), atol=1e-6)


def test_generate_is_bit_identical_and_every_step_is_read(model, ids):
    options = dict(max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    plain = model.generate(ids, **options)
    with reattend.capture(model) as seen:
        watched = model.generate(ids, **options)
    assert torch.equal(plain.sequences, watched.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, watched.logits, strict=True))
    readings = seen.readings["model.layers.0.self_attn"]
    assert [(r.phase, r.step) for r in readings] == [("prefill", 0)] + [("decode", i) for i in range(4)]
    assert all(r.rows == 1 for r in readings)
    assert float(readings[-1].mass["generated"].mean()) > 0
    assert abs(sum(seen.mass_by_role().values()) - 1) < 1e-5
    assert set(seen.mass_by_layer()) == {0, 1}
    assert torch.equal(model.generate(ids, **options).sequences, plain.sequences)


def test_it_sees_the_edits_of_a_recipe_whatever_the_order_of_sessions(model, ids):
    with torch.no_grad():
        with reattend.apply(model, "streaming", sinks=2, window=4):
            edited = model(ids, use_cache=False).logits
        for watch_first in (True, False):
            recording = reattend.capture(model, rows="last", maps=[39])
            session = reattend.apply(model, "streaming", sinks=2, window=4)
            session.remove()
            first, second = (recording, session) if watch_first else (session, recording)
            with first, second:
                assert torch.equal(model(ids, use_cache=False).logits, edited)
            row = recording.readings["model.layers.0.self_attn"][0].maps[39]
            assert float(row[..., 2:36].abs().max()) == 0
            assert float(row[..., :2].min()) > 0 and float(row[..., 36:].min()) > 0


def test_memory_is_bounded(model, ids):
    with reattend.capture(model, max_steps=2, top=3) as seen:
        model.generate(ids, max_new_tokens=6, do_sample=False)
    assert all(len(r) == 2 for r in seen.readings.values())
    assert seen.dropped == 2 * 4
    assert len(seen.top_columns()) == 3
    with reattend.capture(model, rows=5) as seen, torch.no_grad():
        model(ids)
    assert seen.readings["model.layers.0.self_attn"][0].rows == 5


def test_encoders_are_read_too():
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
        vocab_size=60,
        attn_implementation="sdpa",
    )
    bert = BertForMaskedLM(config).eval()
    ids = torch.randint(3, 60, (1, 12))
    maps = eager_maps(bert, input_ids=ids)
    with reattend.capture(bert) as seen, torch.no_grad():
        bert(ids)
    (reading,) = next(iter(seen.readings.values()))
    assert reading.rows == 12
    assert torch.allclose(reading.entropy, torch.special.entr(maps[0]).sum(dim=3).mean(dim=2), atol=1e-5)


def test_reordered_and_merged_columns_keep_or_lose_their_roles():
    tokens = TokenMap(1, 4, 4, {"bos": torch.tensor([[True, False, False, False]])})
    q = torch.randn(1, 1, 4, 8)
    call = Call(q, q, q, clock=Clock("prefill"), tokens=tokens)
    names, plain = _membership(call, [])
    assert [names[i] for i in plain[0]] == ["bos", "prompt", "prompt", "prompt"]
    _, moved = _membership(call, [Reorder(order=torch.tensor([1, 2, 3, 0]))])
    assert [names[i] for i in moved[0]] == ["prompt", "prompt", "prompt", "bos"]
    own = torch.rand(1, 2, 4).argsort(dim=-1)
    for edit in (PoolKV(groups=torch.tensor([0, 0, 1, 1])), Reorder(order=own), Reorder(order=own[:, :1], heads=[0])):
        assert _membership(call, [edit])[1] is None, "a column is no longer one token for all heads"


def test_bad_arguments(model):
    with pytest.raises(reattend.ReattendError, match="rows must be"):
        reattend.capture(model, rows="first")
    with pytest.raises(reattend.ReattendError, match="no attention site"):
        reattend.capture(torch.nn.Linear(2, 2))


def test_a_session_of_only_captures_leaves_no_trace(model, ids):
    before = dict(model.__dict__)
    recording = reattend.capture(model)
    with Session(model, [Plan("watch", list(recording.steps()))]), torch.no_grad():
        model(ids)
    assert recording.calls == 2
    assert before.keys() == model.__dict__.keys() and model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_spread_is_the_weight_of_every_position(model, ids):
    maps = eager_maps(model, input_ids=ids)
    with reattend.capture(model, rows="all", spread=True) as seen, torch.no_grad():
        model(ids)
    n = ids.shape[1]
    for layer, spread in seen.spread_by_layer(n).items():
        torch.testing.assert_close(spread, maps[layer][0].mean(dim=(0, 1)), atol=1e-5, rtol=1e-4)
    assert set(seen.spread_by_layer(n)) == {0, 1} and seen.spread_by_layer(n + 1) == {}
    assert seen.tokens is not None and seen.tokens.prompt_length == n


def test_spread_follows_reordered_columns_and_drops_merged_ones():
    from reattend.hooks.recording import _reading
    from reattend.interventions import Site

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    site = Site("a", 0, "decoder", "self", 2, 2, 8, False)
    index, chosen = torch.arange(6), torch.ones(1, 6, dtype=torch.bool)

    def spread(edits):
        return _reading(Call(q, k, v, site=site), edits, index, chosen, 2, [], True).spread

    torch.testing.assert_close(spread([Reorder(order=torch.randperm(6))]), spread([]))
    assert spread([PoolKV(groups=torch.tensor([0, 0, 1, 1, 2, 2]))]) is None


@pytest.mark.parametrize("where", [3, "model.layers.0", ["model.layers.0"], {}])
def test_where_is_a_table_of_sites(model, where):
    with pytest.raises(ReattendError, match="where must be a table of sites"):
        reattend.capture(model, where=where)
