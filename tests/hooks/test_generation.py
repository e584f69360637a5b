"""What must keep working under a session: every way of generating, every cache, wrappers around the model."""

from __future__ import annotations

import pytest
import torch
from reattend.hooks import Edits, Plan, attach, sites
from reattend.hooks.trackers.caches import cache_name, cache_of
from reattend.interventions import Call, Transfer
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

SMALL = dict(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    pad_token_id=0, bos_token_id=1, eos_token_id=None, head_dim=16,
)  # fmt: skip


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).eval()


IDS = torch.randint(2, 60, (2, 11), generator=torch.Generator().manual_seed(3))
NEW = 7


def drop_bos(call: Call):
    """A per-row edit of known columns, to see that columns stay right through caches: the first real token loses weight."""
    return Transfer(source=call.columns("bos"), strength=0.8)


def session_of(model, intervention=drop_bos):
    return attach(model, [Plan("test", [Edits(sites(model), intervention)])])


def stepwise(model, ids, mask=None, steps=NEW):
    """Greedy without any cache: the whole sequence again at every step; the oracle for cached generation."""
    for _ in range(steps):
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids


def generate(model, ids=IDS, **options):
    return model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options)


def test_cached_generation_equals_stepwise():
    model = llama()
    with session_of(model) as session:
        assert torch.equal(generate(model), stepwise(model, IDS))
    assert session.applied > 0


def test_left_padding_gives_each_row_what_it_gets_alone():
    model = llama()
    short = IDS[1:, 4:]
    padded = IDS.clone()
    padded[1, :4] = 0
    mask = torch.ones_like(padded)
    mask[1, :4] = 0
    plain = generate(model, padded, attention_mask=mask)
    with session_of(model):
        together = generate(model, padded, attention_mask=mask)
        alone = generate(model, short), generate(model, IDS[:1])
    assert together[1, 11:].tolist() == alone[0][0, 7:].tolist()
    assert together[0].tolist() == alone[1][0].tolist()
    assert together.tolist() != plain.tolist()


@pytest.mark.parametrize("cache", ["static", "dynamic", "offloaded_static"])
def test_cache_implementations(cache):
    model = llama()
    with session_of(model):
        expected = stepwise(model, IDS)
        assert torch.equal(generate(model, cache_implementation=cache), expected)


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_sliding_window_layers(kind):
    torch.manual_seed(0)
    if kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=6)).eval()
    else:
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig

        model = Gemma3ForCausalLM(
            Gemma3TextConfig(**SMALL, sliding_window=6, layer_types=["sliding_attention", "full_attention"])
        ).eval()
    lengths = []

    def watch(call):
        lengths.append((call.num_keys, call.key_start))
        return Transfer(source=call.columns("bos"), strength=0.8)

    with session_of(model, watch):
        expected = stepwise(model, IDS)
        lengths.clear()
        assert torch.equal(generate(model), expected)
    # the rolling cache has lost the oldest columns, and the column map knows it
    assert any(start > 0 for _, start in lengths)


def test_beam_search_steers_every_beam():
    model = llama()
    plain = generate(model, num_beams=3)
    with session_of(model) as session:
        steered = generate(model, num_beams=3)
        again = generate(model, num_beams=3)
    assert torch.equal(steered, again) and steered.tolist() != plain.tolist()
    assert session.applied > 0
    rows = []

    def watch(call):
        rows.append(call.columns("bos"))
        return drop_bos(call)

    with session_of(model, watch):
        generate(model, num_beams=3)
    assert all(r.shape[0] == 6 and bool((r.sum(1) == 1).all()) for r in rows)


def test_assisted_decoding_equals_greedy():
    model, assistant = llama(0), llama(5, num_hidden_layers=1)
    phases = []

    def watch(call):
        phases.append((call.clock.phase, call.tokens.prompt_length))
        return drop_bos(call)

    with session_of(model, watch):
        expected = generate(model, IDS[:1])
        phases.clear()
        assert torch.equal(generate(model, IDS[:1], assistant_model=assistant), expected)
    # drafted tokens are not taken for a part of the prompt
    assert {p for _, p in phases} == {IDS.shape[1]} and ("decode", IDS.shape[1]) in phases


def test_sampling_with_one_seed_repeats():
    model = llama()
    with session_of(model):
        torch.manual_seed(1)
        one = model.generate(IDS, max_new_tokens=NEW, do_sample=True)
        torch.manual_seed(1)
        two = model.generate(IDS, max_new_tokens=NEW, do_sample=True)
    assert torch.equal(one, two)


def test_chunked_prefill_equals_one_prefill():
    model = llama()

    def first_token(call):
        return Transfer(source=call.columns("bos"), strength=0.8)

    with session_of(model, first_token), torch.no_grad():
        whole = model(IDS).logits[:, -1]
        first = model(IDS[:, :5], use_cache=True)
        second = model(IDS[:, 5:], **{cache_name(model): cache_of(first)}, use_cache=True)
    torch.testing.assert_close(second.logits[:, -1], whole, atol=1e-5, rtol=1e-5)


def test_no_cache_generation_keeps_the_prompt_apart_from_what_is_generated():
    model = llama()
    prompts = []

    def watch(call):
        prompts.append((call.tokens.prompt_length, call.num_keys))
        return drop_bos(call)

    with session_of(model, watch):
        generate(model, IDS, use_cache=False)
        assert torch.equal(generate(model, IDS, use_cache=False, num_beams=3), generate(model, IDS, num_beams=3))
    assert {p for p, _ in prompts} == {IDS.shape[1]}
    assert max(k for _, k in prompts) == IDS.shape[1] + NEW - 1


def test_eager_models_with_output_attentions_return_the_edited_weights():
    model = llama()
    with session_of(model), torch.no_grad():
        expected = model(IDS).logits
    model.set_attn_implementation("eager")
    with session_of(model), torch.no_grad():
        out = model(IDS, output_attentions=True)
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        plain = model(IDS, output_attentions=True)
    first, before = out.attentions[0], plain.attentions[0]
    torch.testing.assert_close(first[..., 1:, 0], 0.2 * before[..., 1:, 0], atol=1e-6, rtol=1e-4)


def test_soft_capping_and_attention_sinks():
    from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(Gemma2Config(**SMALL, attn_logit_softcapping=2.0, sliding_window=6)).eval()
    oss = GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1, sliding_window=6)).eval()
    seen = []

    def watch(call):
        seen.append((call.softcap, call.sinks is not None))
        return drop_bos(call)

    for model in (gemma, oss):
        model.set_attn_implementation("eager")
        with session_of(model, watch), torch.no_grad():
            cached, steps = generate(model), stepwise(model, IDS)
            materialised = model(IDS, output_attentions=True).logits
            chunked = model(IDS).logits
        assert torch.equal(cached, steps)
        torch.testing.assert_close(chunked, materialised, atol=1e-5, rtol=1e-4)
    assert (2.0, False) in seen and (None, True) in seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model = llama().to(dtype)
    with session_of(model) as session:
        out = model(IDS).logits
    assert torch.isfinite(out).all() and session.applied


def test_torch_compile():
    model = llama()
    with session_of(model), torch.no_grad():
        expected = model(IDS).logits
    with torch.no_grad():
        before = model(IDS).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(IDS).logits, before)
        with session_of(compiled) as session:
            torch.testing.assert_close(compiled(IDS).logits, expected)
        assert session.applied
        torch.testing.assert_close(compiled(IDS).logits, before)


def test_accelerate_offload_hooks_stay_in_place():
    from accelerate import cpu_offload

    model = llama()
    with torch.no_grad():
        before = model(IDS).logits
    with session_of(model), torch.no_grad():
        expected = model(IDS).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    with torch.no_grad(), session_of(model) as session:
        assert torch.equal(model(IDS).logits, expected)
    assert session.applied
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)


def test_inner_model_without_a_token_map_says_so():
    from reattend.interventions import ReattendError

    model = llama()
    embeds = model.get_input_embeddings()(IDS)
    with session_of(model), torch.no_grad():
        assert torch.isfinite(model(inputs_embeds=embeds).logits).all()
        with pytest.raises(ReattendError, match="call the whole model with input_ids"):
            model.model(IDS)


def test_an_empty_prompt_is_refused_before_anything_runs():
    from reattend.interventions import ReattendError

    model = llama()
    ran = []
    model.model.layers[0].register_forward_pre_hook(lambda *a: ran.append(1))
    with pytest.raises(ReattendError, match="the prompt is empty"), session_of(model):
        model(torch.zeros(1, 0, dtype=torch.long))
    assert not ran


def test_other_families_start():
    torch.manual_seed(0)
    model = GemmaForCausalLM(GemmaConfig(**SMALL)).eval()
    with session_of(model) as session:
        model(IDS)
    assert session.applied == 2


def test_left_padding_with_a_static_cache():
    """`generate` prepares 4-d masks for static caches: padding is still known."""
    model = llama()
    padded = IDS.clone()
    padded[1, :4] = 0
    mask = torch.ones_like(padded)
    mask[1, :4] = 0
    with session_of(model):
        expected = generate(model, padded, attention_mask=mask)
        assert torch.equal(generate(model, padded, attention_mask=mask, cache_implementation="static"), expected)
