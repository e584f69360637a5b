"""pai: golden data of the official code, and both parts on whole models against naive implementations."""

from __future__ import annotations

import functools

import pytest
import reattend
import tiny_models
import torch
from asked_images import FAMILIES, build, inputs_of
from by_hand import attention_by_hand
from golden_files import golden_file
from reattend.hooks import Fusion, capture
from reattend.interventions import Call, Clock, Site, TokenMap, fused, reference
from reattend.interventions.families.logits import contrasted
from reattend.recipes import recipe

# what is said of prompts in pieces is tested in test_chunked_prompts.py
pytestmark = pytest.mark.filterwarnings("ignore:.*this prompt comes in pieces")

PROMPTS = [[1, 5, 6, "image", 7, 8], [1, "image", 9, "image", 11, 12, 13], [1, 21, 22]]
# the tiny models' logits are so even that the usual cutoff takes nothing out
CUTOFF = 0.75
FEW = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)


golden = functools.partial(golden_file, "pai")


# -- golden data -------------------------------------------------------------------------------------------------------


def edit_of(call, facts, padding, length):
    """What the recipe asks for at a call whose image lies in the columns of the golden file."""
    tokens = TokenMap(1, length, length)
    places = torch.arange(length)[None]
    tokens.roles["padding"] = places < padding
    tokens.roles["image"] = (places >= int(facts["img_start"])) & (places < int(facts["img_end_exclusive"]))
    call.tokens, call.clock = tokens, Clock("prefill" if call.num_queries > 1 else "decode")
    call.site = Site("decoder", 2, "decoder", "self", call.num_heads, call.num_heads, 8, True)
    return recipe("pai", alpha=float(facts["alpha"])).strengthen(call)


@pytest.mark.parametrize("execute", [fused, reference])
@pytest.mark.parametrize("name", ["attn_prefill", "attn_left_pad", "attn_decode_last_row_strong"])
def test_golden_attention_of_the_official_code(name, execute):
    data, facts = golden(name)
    length = data["scores"].shape[2]
    pads = int(facts["left_pad"])

    def output(call, edits, unit=False):
        out = execute(call, edits)
        return out if unit else out.transpose(1, 2).flatten(2) @ data["o_proj_weight"].T

    def call(rows=slice(None), value=data["value"]):
        return Call(data["query_rot"][:, :, rows], data["key_rot"], value, data["attention_mask"][:, :, rows])

    whole = call()
    found = output(whole, [edit_of(whole, facts, pads, length)])
    torch.testing.assert_close(found[:, -1], data["output_mod"][:, -1], atol=1e-6, rtol=1e-5)
    # the other rows are the plain kernel's, which rounds in another order than the eager code
    torch.testing.assert_close(found[:, pads:], data["output_mod"][:, pads:], atol=3e-6, rtol=1e-5)
    assert torch.equal(found[:, pads:-1], output(call(), [])[:, pads:-1]), "only the last row changes"
    unit = torch.eye(length).expand(1, data["value"].shape[1], length, length)
    maps = call(value=unit)
    weights = output(maps, [edit_of(maps, facts, pads, length)], unit=True)
    torch.testing.assert_close(weights[:, :, pads:], data["weights_mod"][:, :, pads:], atol=1e-6, rtol=0)
    torch.testing.assert_close(weights.sum(-1)[..., pads:], torch.ones(weights.shape[:3])[..., pads:])
    assert (data["weights_mod"] - data["weights_plain"]).abs().max() > 1e-2
    step = call(slice(-1, None))
    found = output(step, [edit_of(step, facts, pads, length)])
    torch.testing.assert_close(found, data["output_mod"][:, -1:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["logits_refine", "logits_refine_gamma1"])
def test_golden_logits_of_the_official_code(name):
    data, facts = golden(name)
    chosen = recipe("pai", gamma=float(facts["gamma"]), cutoff=float(facts["cutoff_ratio"]))
    real, text = data["cond_logits"][:, None], data["uncond_logits_last"][:, None]
    told = {"rows": torch.ones(len(real), dtype=torch.bool)}
    found = chosen.fuse(Fusion(real, [text], Clock("decode"), TokenMap(len(real), 4, 4), told))[:, 0]
    assert torch.equal(found == -torch.inf, data["out"] == -torch.inf)
    torch.testing.assert_close(found, data["out"], atol=1e-5, rtol=0)


# -- whole models ----------------------------------------------------------------------------------------------------


def forced(model, inputs, tails):
    """Raw logits [B, V] per step of the plain model that has to write these tokens."""
    width = inputs["input_ids"].shape[1]
    out = model.generate(**inputs, **FEW, prefix_allowed_tokens_fn=lambda row, ids: [tails[row][len(ids) - width]])
    return out.logits


def naive(tiny, sequences, prompts, gamma):
    """Per step the fused logits [B, V], from runs of the plain model: the batch, and the text of each prompt alone."""
    x = inputs_of(tiny, prompts)
    tails = [row.tolist() for row in sequences[:, x["input_ids"].shape[1] :]]
    real, rows = forced(tiny.model, x, tails), []
    for prompt, tail in zip(prompts, tails, strict=True):
        text = inputs_of(tiny, [[piece for piece in prompt if piece != "image"]])
        rows.append(forced(tiny.model, text, [tail]) if "image" in prompt else None)
    return [
        torch.stack([c if rows[n] is None else contrasted(c, rows[n][step][0], gamma, CUTOFF) for n, c in enumerate(logits)])
        for step, logits in enumerate(real)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_a_text_only_run_at_its_side(family):
    """Every step of a batch with one, two and no images: the branch is what the text of each prompt alone would be."""
    tiny = build(family)
    x = inputs_of(tiny, PROMPTS)
    plain = tiny.model.generate(**x, **FEW)
    with reattend.apply(tiny.model, "pai", alpha=0, gamma=1.5, cutoff=CUTOFF) as session:
        out = tiny.model.generate(**x, **FEW)
        assert session.stats == {"pai": {"logits": 3}}
    wanted = naive(tiny, out.sequences, PROMPTS, 1.5)
    for found, logits in zip(out.logits, wanted, strict=True):
        assert torch.equal(found == -torch.inf, logits == -torch.inf) and (found[:2] == -torch.inf).any()
        torch.testing.assert_close(found, logits, atol=1e-3, rtol=1e-3)
    assert torch.equal(out.logits[0][2], plain.logits[0][2]), "the prompt without an image"
    again = tiny.model.generate(**x, **FEW)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, plain.logits))


@pytest.mark.parametrize("gamma", [1.0, 1.3])
def test_both_parts_against_attention_by_hand(gamma):
    """Left padding, two images: each step, with the second branch free of the attention part."""
    tiny = build("llava")
    x = tiny.inputs(PROMPTS[:2])
    with reattend.apply(tiny.model, "pai", alpha=0.5, gamma=gamma) as session:
        out = tiny.model.generate(**x, **FEW)
        layers = {f"model.language_model.layers.{n}.self_attn": 3 for n in (2, 3)}
        assert session.stats == {"pai": {**layers, **({} if gamma == 1 else {"logits": 3})}}
    tails = [row.tolist() for row in out.sequences[:, x["input_ids"].shape[1] :]]
    texts = [[piece for piece in prompt if piece != "image"] for prompt in PROMPTS[:2]]
    text = [forced(tiny.model, tiny.inputs([t]), [tail]) for t, tail in zip(texts, tails)]
    plain = forced(tiny.model, x, tails)
    image = x["input_ids"] == tiny_models.IMAGE

    def boost(layer, scores, visible):
        if layer >= 2:
            here = torch.nn.functional.pad(image, (0, scores.shape[3] - image.shape[1]))
            scores[:, :, -1] += 0.5 * here[:, None] * scores[:, :, -1].abs()
        return scores

    with attention_by_hand(tiny.model, scores=boost):
        boosted = forced(tiny.model, x, tails)
    for step, found in enumerate(out.logits):
        other = torch.stack([text[row][step][0] for row in range(2)])
        wanted = boosted[step] if gamma == 1 else contrasted(boosted[step], other, gamma)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
        assert (boosted[step] - plain[step]).abs().amax(dim=1).min() > 1e-3


def test_more_alpha_moves_more_weight_to_the_image():
    tiny = build("llava")
    x = tiny.inputs(PROMPTS[:1])
    masses = []
    for alpha in (0.0, 0.2, 0.6):
        with reattend.apply(tiny.model, "pai", alpha=alpha, gamma=1), capture(tiny.model, rows="last") as recording:
            tiny.model(**x)
        masses.append(recording.mass_by_layer()[2]["image"])
    assert masses[0] < masses[1] < masses[2]
