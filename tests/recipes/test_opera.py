"""opera: the penalty against golden data of the official code, a whole run of it, and what trials leave behind."""

from __future__ import annotations

import functools

import pytest
import reattend
import tiny_models
import torch
from golden_files import golden_file
from reattend.hooks import Capture, Plan, attach, sites
from reattend.interventions import ReattendError
from reattend.interventions.families.over_trust import OverTrust, column_scores, over_trust_penalty
from transformers import LlamaConfig, LlamaForCausalLM

PROMPTS = [[1, 5, 6, "image", 7, 8], [1, "image", 9, "image", 11, 12, 13]]
GREEDY = dict(do_sample=False, return_dict_in_generate=True, output_logits=True)


golden = functools.partial(golden_file, "opera")


@pytest.mark.parametrize("name", ["penalty_early", "penalty_late"])
def test_golden_penalties_of_the_official_code(name):
    data, facts = golden(name)
    start, first, last = (int(facts[k]) for k in ("response_start", "image_start", "image_end_inclusive"))
    for beam in range(data["penalty_scores"].shape[0]):
        for candidate in range(data["penalty_scores"].shape[1]):
            rows = data["attn_max_over_heads"][beam, candidate]
            rows = rows / rows.sum(-1, keepdim=True)
            trust = OverTrust(float(facts["scale_factor"]))
            for n in range(start, len(rows) - 1):
                trust.keep(rows[None, n, : n + 1], start)
            products = trust.extended(rows[None, -1], start)
            scores, image = column_scores(products)[0], rows[-1, first : last + 1].sum()[None]
            torch.testing.assert_close(scores.float(), data["local_scores"][beam, candidate], rtol=1e-2, atol=5e-4)
            assert int(scores.argmax()) == int(data["rollback_locs_per_candidate"][beam, candidate])
            tolerance = dict(rtol=0, atol=1e-6) if name == "penalty_early" else dict(rtol=1e-2, atol=5e-4)
            found = over_trust_penalty(products, image).float()[0]
            torch.testing.assert_close(found, data["penalty_scores"][beam, candidate], **tolerance)


def test_golden_run_of_the_official_code():
    """Beam search over a prompt of embeddings: token for token."""
    data, facts = golden("e2e_penalty_only")
    sizes = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    )
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": float(facts["rope_theta"])}}
    ends = {"bos_token_id": int(facts["bos"]), "eos_token_id": int(facts["eos"]), "pad_token_id": int(facts["pad"])}
    config = LlamaConfig(**{k: int(facts[k]) for k in sizes}, rms_norm_eps=float(facts["rms_norm_eps"]), **rope, **ends)
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({k.removeprefix("weights."): v for k, v in data.items() if k.startswith("weights.")}, strict=False)
    prompt = {
        "inputs_embeds": data["prompt_embeds"],
        "attention_mask": torch.ones(data["prompt_embeds"].shape[:2], dtype=torch.long),
    }
    options = dict(num_beams=int(facts["num_beams"]), max_new_tokens=int(facts["max_new_tokens"]), do_sample=False)
    plain = model.generate(**prompt, **options)
    assert plain[0].tolist() == data["seq_beam"][0, 1:].tolist()
    image = (int(facts["image_start"]), int(facts["image_end_inclusive"]) + 1)
    settings = dict(candidates=int(facts["num_attn_candidates"]), scale=float(facts["scale_factor"]), image_range=image)
    with reattend.apply(model, "opera", penalty_weight=float(facts["penalty_weights"]), **settings) as session:
        found = model.generate(**prompt, **options)
        assert session.stats == {"opera": {"logits": found.shape[1]}}
    assert found[0].tolist() == data["seq_opera"][0, 1:].tolist()
    assert not torch.equal(plain, found)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "paligemma"])
def test_trials_leave_the_cache_as_it_was(family):
    """Without a penalty all that is tried keeps its logit, also behind a window that the cache has filled, and the rest is ruled out."""
    tiny = tiny_models.build(family)
    x = tiny.inputs(PROMPTS)
    options = dict(max_new_tokens=14, **GREEDY)
    plain = tiny.model.generate(**x, **options)
    with reattend.apply(tiny.model, "opera", penalty_weight=0, candidates=3) as session:
        out = tiny.model.generate(**x, **options)
        assert session.stats == {"opera": {"logits": 14}}
    assert torch.equal(out.sequences, plain.sequences)
    for found, logits in zip(out.logits, plain.logits, strict=True):
        top = logits.topk(3).indices
        torch.testing.assert_close(found.gather(1, top), logits.gather(1, top), atol=1e-5, rtol=1e-4)
        assert ((found == -999).sum(1) == logits.shape[1] - 3).all()
    again = tiny.model.generate(**x, **options)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, plain.logits))


def test_penalties_against_whole_maps():
    """Left padding, two images: every step from the maps of passes over the text so far with each candidate behind it."""
    tiny = tiny_models.build("llava")
    x = tiny.inputs(PROMPTS)
    plain = tiny.model.generate(**x, max_new_tokens=13, **GREEDY)
    with reattend.apply(tiny.model, "opera", penalty_weight=3, candidates=2, scale=400):
        out = tiny.model.generate(**x, max_new_tokens=13, **GREEDY)
    width, changed = x["input_ids"].shape[1], 0.0
    for step in (0, 4, 11, 12):
        text = out.sequences[:, : width + step]
        for k in range(2):
            maps = []

            def read(call, edits, maps=maps):
                from reattend.interventions import row_weights

                rows = row_weights(call, [], torch.arange(call.num_queries)).amax(1)
                maps.append(rows / rows.sum(-1, keepdim=True))

            full = {**x, "attention_mask": torch.nn.functional.pad(x["attention_mask"], (0, step), value=1), "input_ids": text}
            positions = (full["attention_mask"].cumsum(1) - 1).clamp(min=0)
            logits = tiny.model(**full, position_ids=positions).logits[:, -1]
            ids = logits.topk(2).indices[:, k : k + 1]
            full["input_ids"] = torch.cat([text, ids], 1)
            full["attention_mask"] = torch.nn.functional.pad(full["attention_mask"], (0, 1), value=1)
            positions = (full["attention_mask"].cumsum(1) - 1).clamp(min=0)
            last = sites(tiny.model).stack("decoder").layers(-1, -1)
            with attach(tiny.model, [Plan("maps", [Capture(last, read)])]):
                tiny.model(**full, position_ids=positions)
            weights = maps[0][:, width:, width:] * 400
            if step + 1 <= 10:
                image = torch.nn.functional.pad(x["input_ids"] == tiny_models.IMAGE, (0, step + 1))
                penalty = -(maps[0][:, -1] * image).sum(1)
            else:
                below = torch.ones(step + 1, step + 1, dtype=torch.bool).tril()
                penalty = 1e-7 * torch.where(below, weights.double(), 1.0).prod(1).amax(1).float()
                changed = max(changed, float(penalty.max()))
            found = out.logits[step].gather(1, ids)[:, 0]
            wanted = logits.gather(1, ids)[:, 0] - 3 * penalty.clamp_max(65504)
            torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    assert changed > 1e-3 and not torch.equal(plain.logits[0], out.logits[0])


def test_it_needs_a_cache():
    tiny = tiny_models.build("llava")
    with reattend.apply(tiny.model, "opera", candidates=1), pytest.raises(ReattendError, match="needs a cache"):
        tiny.model.generate(**tiny.inputs(PROMPTS), max_new_tokens=2, use_cache=False)
    with reattend.apply(tiny.model, "opera", candidates=1):
        tiny.model(**tiny.inputs(PROMPTS))
