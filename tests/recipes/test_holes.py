"""Zeros anywhere in the attention mask: what the mask hides is as if it were not in the prompt, or the recipe says that it cannot."""

from __future__ import annotations

import pytest
import reattend
import torch
from reattend.recipes import recipe_class
from tiny_language import language_model, tokenizer

HEADS = [[0, 1], [1, 0], [1, 3], [2, 2], [3, 1]]
RECIPES = {
    "act": dict(heads=[[layer, head] for layer in (0, 2) for head in range(4)], threshold=0.03, beta=0.1),
    "emphasise": dict(ranges=[(3, 6)], alpha=0.05, heads=HEADS),
    "instaboost": dict(ranges=[(3, 6)], multiplier=20),
    "spotlight": dict(ranges=[(3, 6)], target=0.6),
    "spa": dict(ranges=[(3, 6)], strength=3.0),
    "seka": dict(ranges=[(3, 6)], layers="all", gain=2.0),
    "pine": dict(ranges=[(3, 6), (6, 9), (9, 11)]),
    **{mode: dict(mode=mode, heads=HEADS, where="all") for mode in ("mask", "sink_down", "gain")},
}
LENGTH = 20
HOLES = {
    "before the passages": [1, 2],
    "inside them": [4, 5],
    "after them": [14, 15],
    "on the right": [18, 19],
    "on the left": [0, 1],
    "everywhere": [0, 2, 15, 19],
}


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "seka.safetensors"
    recipe_class("seka").profile(language_model(), tokenizer(), pairs=2, experts=False).save(path)
    return str(path)


def prompt(holes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    ids, mask = torch.randint(3, 400, (1, LENGTH)), torch.ones(1, LENGTH, dtype=torch.long)
    mask[0, holes] = 0
    return ids, mask


@pytest.mark.parametrize("where", HOLES)
@pytest.mark.parametrize("name", RECIPES)
def test_a_prompt_with_holes_is_the_prompt_without_what_they_hide(name, where, profile):
    model, (ids, mask) = language_model(), prompt(HOLES[where])
    slug = "retrieval-heads" if "mode" in RECIPES[name] else name
    options = RECIPES[name] | ({"profile_path": profile} if name == "seka" else {})
    places, kept = torch.arange(LENGTH)[None], mask[0].bool()
    with torch.no_grad(), reattend.apply(model, slug, **options) as session:
        if name == "pine" and where == "inside them":
            with pytest.raises(reattend.ReattendError, match="attention_mask hides token 4 of prompt 0, which stands inside"):
                model(input_ids=ids, attention_mask=mask, position_ids=places)
            return
        got = model(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, kept]
        assert session.applied
    with torch.no_grad():
        plain = model(input_ids=ids[:, kept], position_ids=places[:, kept]).logits
        with reattend.apply(model, slug, **options):
            wanted = model(input_ids=ids[:, kept], position_ids=places[:, kept]).logits
    assert (wanted - plain).abs().max() > 1e-3
    torch.testing.assert_close(got, wanted, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["pine", "spotlight", "instaboost"])
def test_generation_after_a_prompt_with_holes(name):
    model, (ids, mask) = language_model(), prompt([0, 2, 15])  # generation goes on from the last token, hidden or not
    how = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    found = []
    for given, hidden in ((ids, mask), (ids[:, mask[0].bool()], torch.ones(1, int(mask.sum()), dtype=torch.long))):
        with reattend.apply(model, name, **RECIPES[name]):
            found.append(torch.stack(model.generate(given, attention_mask=hidden, **how).logits, dim=1))
    torch.testing.assert_close(found[0], found[1], atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["emphasise", "instaboost", "spotlight", "spa", "seka", "pine"])
def test_a_row_that_is_hidden_as_a_whole_has_no_passages(name, profile):
    model, (ids, mask) = language_model(), prompt([])
    mask = torch.cat([mask, torch.zeros_like(mask)])
    options = RECIPES[name] | ({"profile_path": profile} if name == "seka" else {})
    ends = pytest.raises(reattend.ReattendError, match="ends beyond prompt 1, which has 0 tokens without padding")
    with ends, torch.no_grad(), reattend.apply(model, name, **options):
        model(input_ids=ids.expand(2, -1), attention_mask=mask)
