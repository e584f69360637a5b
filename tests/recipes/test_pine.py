"""PINE: golden tensors of the official code, invariance to the order of segments, how it is asked for, and what is refused."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import reattend
import torch
from reattend.interventions import (
    Call,
    Clock,
    Site,
    TokenMap,
    fused,
    reference,
)
from reattend.interventions.rotary import Rotary
from reattend.recipes import recipe
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

GOLDEN = Path(__file__).parents[1] / "golden" / "pine"
SITE = Site("layer", 0, "decoder", "self", None, None, None, True)


def load(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        facts = {
            k: (json.loads(v) if k not in ("note", "source") and v[:1] in "[0123456789" else v)
            for k, v in file.metadata().items()
        }
        return facts, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def spans_of(lengths):
    ends = list(itertools.accumulate(lengths))
    return list(zip(ends[:-2], ends[1:-1], strict=True))


def pieces(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def token_map(lengths, total=None, left=0, name="s"):
    prompt = left + sum(lengths)
    tokens = TokenMap(1, prompt, total or prompt)
    place = torch.arange(prompt)[None]
    tokens.roles = {"padding": place < left, "bos": place == left}
    for k, (a, b) in enumerate(spans_of(lengths)):
        tokens.roles[f"{name}.{k}"] = (place >= a + left) & (place < b + left)
    return tokens


def run_golden(name, execute, **options):
    """The official module's pass through our edit: prefill, then one call per generated token."""
    facts, data = load(name)
    heads, shared, dim = facts["num_heads"], facts["num_kv_heads"], facts["head_dim"]
    total = data["hidden"].shape[1]
    q, k, v = (pieces(data["hidden"] @ data[w].T, n) for w, n in (("wq", heads), ("wk", shared), ("wv", shared)))
    rotary = Rotary(facts["rope_theta"] ** (-torch.arange(0, dim, 2) / dim))
    places = torch.arange(total)[None, None]
    q, k = rotary.turn(q, places), rotary.turn(k, places)
    lengths = data["segment_lengths"].tolist()
    method = recipe("pine", ranges=spans_of(lengths), **options)
    memory, outputs = {}, []
    stops = [sum(lengths) + n for n in range(facts["decode_steps"] + 1)]
    for start, stop in zip([0, *stops], stops):
        clock = Clock("decode" if start else "prefill")
        call = Call(
            q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], is_causal=True, site=SITE, clock=clock, tokens=token_map(lengths, stop),
            memory=memory, rotation=lambda: rotary,
        )  # fmt: skip
        edit = method.rearrange("s", len(lengths) - 2, call)
        outputs.append(execute(call, [edit]).transpose(1, 2).flatten(2) @ data["wo"].T)
    return torch.cat(outputs, dim=1), data["output"]


@pytest.mark.parametrize("execute", [fused, reference])
@pytest.mark.parametrize("name", ["attn_2docs", "attn_3docs", "attn_gqa"])
def test_golden_attention(name, execute):
    ours, golden = run_golden(name, execute)
    torch.testing.assert_close(ours, golden, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", ["reverse", "prompt"])
def test_golden_tells_the_orders_apart(order):
    ours, golden = run_golden("attn_3docs", fused, order=order)
    prefix = 5
    torch.testing.assert_close(ours[:, :prefix], golden[:, :prefix], atol=1e-5, rtol=1e-5)
    assert (ours - golden)[:, prefix:].abs().amax(dim=(0, 2)).min() > 1e-3


def golden_model(facts, data):
    config = LlamaConfig(
        vocab_size=facts["vocab_size"], hidden_size=facts["hidden_size"], intermediate_size=facts["intermediate_size"],
        num_hidden_layers=facts["num_layers"], num_attention_heads=facts["num_heads"], num_key_value_heads=facts["num_kv_heads"],
        head_dim=facts["head_dim"], rope_theta=facts["rope_theta"], rms_norm_eps=1e-6, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({k.removeprefix("w."): v for k, v in data.items() if k.startswith("w.")})
    return model


@pytest.mark.parametrize("which", ["identity", "permuted"])
def test_golden_model(which):
    facts, data = load("model_permute")
    model, lengths = golden_model(facts, data), data[f"segment_lengths_{which}"].tolist()
    with torch.no_grad(), reattend.apply(model, "pine", ranges=spans_of(lengths)) as session:
        logits = model(data[f"input_ids_{which}"]).logits
    torch.testing.assert_close(logits, data[f"logits_{which}"], atol=5e-5, rtol=0)
    assert session.stats["pine"] == {f"model.layers.{n}.self_attn": 1 for n in range(2)}
