"""Prompts without their images: what is taken out per family, and how the rows are put together again."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from reattend.hooks import Capture, Plan, Probe, Prompt, attach, sites
from reattend.hooks.prompts.text_only import image_parts, without_images
from reattend.interventions import ReattendError, TokenMap

PROMPTS = [[1, 5, 6, "image", 7, 8], [1, "image", 9, "image", 11, 12, 13], [1, 21, 22]]
FAMILIES = ["mllama", *tiny_models.BUILDERS]


def build(family):
    """A tiny model whose config names the wrapper tokens that its inputs hold, as real configs do."""
    tiny = tiny_models.mllama() if family == "mllama" else tiny_models.build(family)
    if family in ("gemma3", "llama4"):
        tiny.model.config.boi_token_id, tiny.model.config.eoi_token_id = 94, 95 if family == "gemma3" else 96
    return tiny


def prompt_of(tiny, inputs):
    ids = inputs["input_ids"]
    tokens = TokenMap(*ids.shape, ids.shape[1], {"padding": ~inputs["attention_mask"].bool()})
    return Prompt(dict(inputs), tokens, tiny.model.config, {})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_is_the_text(family, side):
    tiny = build(family)
    found = without_images(prompt_of(tiny, tiny.inputs(PROMPTS, side)))
    text = tiny.inputs([[t for t in row if t != "image"] for row in PROMPTS], "right")
    for name, value in text.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name
    assert found.keys() == text.keys()
    tiny.model(**found)
    other = without_images(prompt_of(tiny, tiny.inputs(PROMPTS, side)), "left")
    mask = other["attention_mask"].bool()
    assert mask[:, -1].all() and torch.equal(other["input_ids"][mask], found["input_ids"][found["attention_mask"].bool()])
    assert torch.equal(other["position_ids"][mask], torch.cat([torch.arange(n) for n in mask.sum(1)]))


def test_qwen_wrappers_and_an_unclosed_image():
    config = tiny_models.build("qwen2_vl").model.config
    ids = torch.tensor([[1, 94, 90, 90, 95, 7, 8], [1, 7, 94, 90, 90, 8, 9]])
    assert image_parts(ids, config).tolist() == [
        [False, True, True, True, True, False, False],
        [False, False, True, True, True, False, False],
    ]
    config.vision_end_token_id = 99  # not in the prompt
    assert image_parts(ids, config)[0].tolist() == [False, True, True, True, False, False, False]


def test_drafted_tokens_are_no_prompt():
    tiny = build("llava")
    prompt = prompt_of(tiny, tiny.inputs([[1, 5, "image", 7, 8, 60, 61]]))
    prompt.tokens.prompt_length -= 2
    assert without_images(prompt)["input_ids"].tolist() == [[1, 5, 7, 8]]


def test_refused():
    tiny = build("llava")
    with pytest.raises(ReattendError, match="prompt 1 holds nothing but images"):
        without_images(prompt_of(tiny, tiny.inputs([[1, "image"], ["image"]])))
    with pytest.raises(ReattendError, match="pass input_ids"):
        without_images(Prompt({"inputs_embeds": torch.zeros(1, 2, 3)}, TokenMap(1, 2, 2), tiny.model.config, {}))


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_hands_over_what_a_plain_call_does(cache):
    """Features instead of pixels, and 4-d masks for static caches: the text-only pass is the same."""
    for family in ("llava", "qwen2_5_vl", "gemma3", "paligemma"):
        tiny = build(family)
        inputs, seen = tiny.inputs(PROMPTS), []
        options = {"cache_implementation": cache, "disable_compile": True} if cache else {}
        reader = Capture(
            sites(tiny.model).stack("decoder")[-1:],
            lambda call, _, seen=seen: seen.append((call.query, call.columns("padding"))),
        )
        with attach(tiny.model, [Plan("text", [Probe([reader], without_images)])]):
            tiny.model(**inputs)
            tiny.model.generate(**inputs, max_new_tokens=2, do_sample=False, **options)
        (plain, padding), (generated, _) = seen
        assert padding.sum(dim=1).tolist() == [0, 0, 2]
        assert torch.equal(plain, generated), family
