"""streaming: golden masks and outputs, the card's invariants, and the recipe on models."""

from __future__ import annotations

import pytest
import reattend
import torch
from golden_files import GOLDEN, golden_file
from reattend.interventions import Band, Call, Clock, Keep, ReattendError, TokenMap, fused, reference, reference_with_weights
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

NAMES = sorted(path.stem for path in (GOLDEN / "streaming").glob("*.safetensors"))
SMALL = dict(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    pad_token_id=0, bos_token_id=1, eos_token_id=None, head_dim=16,
)  # fmt: skip


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).eval()


def edits_of(call: Call, **parameters) -> list:
    edit = reattend.recipe("streaming", **parameters).window_with_sinks(call)
    return [] if edit is None else [edit]


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    data, facts = golden_file("streaming", name)
    n = data["q"].shape[2]
    call = Call(data["q"], data["k"], data["v"], is_causal=True)
    edits = edits_of(call, sinks=int(facts["global_size"]), window=int(facts["band_size"]))
    assert bool(edits) == (facts["attention_density"] != "1.0")
    output, weights = reference_with_weights(call, edits)
    assert torch.equal(weights[:1, :1] > 0, data["mask"].bool())
    torch.testing.assert_close(output, data["out"], atol=2e-5, rtol=0)
    torch.testing.assert_close(fused(call, edits), data["out"], atol=2e-5, rtol=0)
    assert weights.shape[-1] == n


def test_each_row_keeps_sinks_and_window():
    call = Call(*torch.randn(3, 1, 2, 40, 8), is_causal=True)
    _, weights = reference_with_weights(call, edits_of(call, sinks=3, window=5))
    counts = (weights > 0).sum(-1)[0, 0]
    assert counts.tolist() == [min(i + 1, 3 + 5) for i in range(40)]


def test_window_of_one_without_sinks_is_the_own_value():
    call = Call(*torch.randn(3, 2, 2, 9, 8), is_causal=True)
    torch.testing.assert_close(fused(call, edits_of(call, sinks=0, window=1)), call.value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("keys", [8, 9, 40])
@pytest.mark.parametrize("sinks", [0, 3])
def test_a_decode_step_keeps_sinks_and_window(keys, sinks):
    query, (key, value) = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 2, keys, 8)
    call = Call(query, key, value)
    edits = [Keep(pattern=Band(sinks, 5))]
    _, weights = reference_with_weights(call, edits)
    assert (weights > 0).sum(-1).unique().tolist() == [sinks + 5]
    torch.testing.assert_close(fused(call, edits), reference(call, edits), atol=1e-6, rtol=1e-5)


def test_first_real_token_counts_under_left_padding():
    """Row 1 has 6 padding columns: its sinks are columns 6 and 7."""
    n, pads = 30, torch.tensor([0, 6])
    real = torch.arange(n)[None] >= pads[:, None]
    mask = (torch.ones(n, n, dtype=torch.bool).tril() & real[:, None, :])[:, None]
    tokens = TokenMap(2, n, n, {"padding": ~real, "bos": real & (real.cumsum(1) == 1)})
    call = Call(*torch.randn(3, 2, 2, n, 8), mask=mask, tokens=tokens, clock=Clock("prefill"))
    edits = edits_of(call, sinks=2, window=4)
    _, weights = reference_with_weights(call, edits)
    assert (weights[1, 0, -1] > 0).nonzero()[:, 0].tolist() == [6, 7, 26, 27, 28, 29]
    assert (weights[0, 0, -1] > 0).nonzero()[:, 0].tolist() == [0, 1, 26, 27, 28, 29]
    torch.testing.assert_close(fused(call, edits)[:, :, 6:], reference(call, edits)[:, :, 6:], atol=1e-5, rtol=1e-5)


def test_last_rows_of_the_prompt_see_everything():
    call = Call(*torch.randn(3, 1, 2, 30, 8), is_causal=True, clock=Clock("prefill"))
    _, weights = reference_with_weights(call, edits_of(call, sinks=1, window=3, last_rows=4))
    counts = (weights > 0).sum(-1)[0, 0]
    assert counts[25] == 4 and counts[26:].tolist() == [27, 28, 29, 30]
    torch.testing.assert_close(
        fused(call, edits_of(call, sinks=1, window=3, last_rows=4)), weights @ call.value, atol=1e-5, rtol=1e-5
    )


def test_last_rows_are_the_prompts_own_wherever_padding_and_drafts_lie():
    """Row 0 is padded on the right; the last two rows of the pass are no longer the prompt's."""
    n, prompt, lengths = 30, 28, torch.tensor([[20], [28]])
    real = torch.arange(n)[None] < lengths
    padding = ~real[:, :prompt]
    mask = (torch.ones(n, n, dtype=torch.bool).tril() & (real | (torch.arange(n) >= prompt))[:, None, :])[:, None]
    tokens = TokenMap(2, prompt, n, {"padding": padding, "bos": (torch.arange(prompt) == 0).expand(2, -1)})
    call = Call(*torch.randn(3, 2, 2, n, 8), mask=mask, tokens=tokens, clock=Clock("prefill"))
    edits = edits_of(call, sinks=1, window=3, last_rows=4)
    counts = (reference_with_weights(call, edits)[1] > 0).sum(-1)[:, 0]
    assert counts[0, [15, 16, 19]].tolist() == [4, 17, 20] and counts[1, [23, 24, 27, 28]].tolist() == [4, 25, 28, 4]
    shown = mask.any(dim=1).diagonal(dim1=1, dim2=2)[:, None, :, None]
    torch.testing.assert_close(fused(call, edits) * shown, reference(call, edits) * shown, atol=1e-5, rtol=1e-5)


def test_long_calls_through_query_blocks_equal_the_reference():
    call = Call(torch.randn(1, 4, 700, 8), torch.randn(1, 2, 700, 8), torch.randn(1, 2, 700, 8), is_causal=True)
    edits = [Keep(pattern=Band(4, 100))]
    torch.testing.assert_close(fused(call, edits), reference(call, edits), atol=1e-5, rtol=1e-5)


def test_a_dropped_value_has_no_effect_and_a_sink_has():
    model = llama(num_hidden_layers=1)
    ids = torch.randint(2, 60, (1, 20), generator=torch.Generator().manual_seed(0))

    def last_output(changed: int | None) -> torch.Tensor:
        def disturb(module, args, output):
            if changed is None:
                return None
            output = output.clone()
            output[:, changed] += 1.0
            return output

        handle = model.model.layers[0].self_attn.v_proj.register_forward_hook(disturb)
        with reattend.apply(model, "streaming", sinks=2, window=6), torch.no_grad():
            result = model(ids).logits[:, -1]
        handle.remove()
        return result

    untouched = last_output(None)
    assert torch.equal(last_output(7), untouched)
    assert not torch.allclose(last_output(1), untouched)
    assert not torch.allclose(last_output(16), untouched)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ReattendError, match="start_layer 5 lies beyond the model's 2 layers"):
        reattend.apply(llama(), "streaming", start_layer=5)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8)
    with pytest.raises(ReattendError, match="needs a language model with a causal decoder; ViTModel has attention in: vision"):
        reattend.apply(ViTModel(ViTConfig(**sizes)), "streaming")
