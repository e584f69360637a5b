"""Two recipes on one model: what their order means, and that the fused executor gives the numbers of the materialised matrix."""

from __future__ import annotations

import math

import pytest
import reattend
import torch
from reattend.interventions import ReattendError, fused, reference
from reattend.recipes import recipe, recipe_class
from tiny_language import language_model, tokenizer
from weighed import random_call, weights_under

PROMPTS = [
    "Please: Answer in French. The capital of Italy is Rome. What is the capital?",
    "Anna has a red house. Answer in one word.",
]
PASSAGES, OTHERS = [["Answer in French."], ["red house", "one word"]], [["Rome"], ["Anna"]]
SEGMENTS = [["Answer in French.", " The capital of Italy is Rome."], [" a red", " house."]]

# -- what the order means, on the weights of one call ------------------------------------------------------------------

RANGES, INSIDE = [[(3, 6)], [(1, 4)]], torch.zeros(2, 1, 1, 12)
INSIDE[0, ..., 3:6] = INSIDE[1, ..., 1:4] = 1.0
EMPHASISE = recipe("emphasise", ranges=RANGES, alpha=0.2)
BOOST = recipe("instaboost", ranges=RANGES, multiplier=4, first_token=False)
LIFT = recipe("spotlight", ranges=RANGES, target=0.5)
CALM = recipe("act", heads=[(0, h) for h in range(4)], threshold=0.12, beta=0.3)


def weights(*recipes, execute=fused):
    scores, mask = random_call(queries=12, keys=12)
    return weights_under(recipes, scores, mask, [0, 0], 12, execute)


def softmax(bias=0.0):
    scores, mask = random_call(queries=12, keys=12)
    return (scores + mask + bias).softmax(-1)


def lifted(given):
    share = (given * INSIDE).sum(-1, keepdim=True)
    factor = torch.where((share < 0.5) & (share > 0), 0.5 / share.clamp_min(1e-20), 1.0).clamp(1, 100)
    raised = given * (1 + (factor - 1) * INSIDE)
    return raised / raised.sum(-1, keepdim=True)


def calmed(given):
    """ACT on weights `given`, with the sinks of the attention that nobody has edited."""
    plain = softmax()
    means = plain.sum(2) / torch.arange(12, 0, -1)
    sinks = (means > 0.12) & (torch.arange(12) > 0)
    assert sinks.any()
    taken = given * sinks[:, :, None]
    rest = given - taken
    room = rest.sum(-1, keepdim=True)
    moved = 0.3 * taken + rest * (1 + 0.7 * taken.sum(-1, keepdim=True) / room.clamp_min(1e-20))
    return torch.where(room > 0, moved, given)


@pytest.mark.parametrize("execute", [fused, reference])
def test_biases_add_up_in_either_order(execute):
    wanted = softmax(math.log(4) * INSIDE + math.log(0.2) * (1 - INSIDE))
    for order in ((EMPHASISE, BOOST), (BOOST, EMPHASISE)):
        torch.testing.assert_close(weights(*order, execute=execute), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("execute", [fused, reference])
def test_scores_come_before_weights_whatever_the_order(execute):
    wanted = lifted(softmax(math.log(0.2) * (1 - INSIDE)))
    for order in ((EMPHASISE, LIFT), (LIFT, EMPHASISE)):
        torch.testing.assert_close(weights(*order, execute=execute), wanted, atol=2e-6, rtol=1e-5)
    assert (wanted - softmax(math.log(0.2) * (1 - INSIDE))).abs().max() > 0.01


@pytest.mark.parametrize("execute", [fused, reference])
def test_edits_of_weights_act_in_the_order_given(execute):
    first, second = calmed(lifted(softmax())), lifted(calmed(softmax()))
    assert (first - second).abs().max() > 0.01
    torch.testing.assert_close(weights(LIFT, CALM, execute=execute), first, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(weights(CALM, LIFT, execute=execute), second, atol=2e-6, rtol=1e-5)


def test_sinks_are_those_of_the_attention_without_other_recipes():
    wanted = calmed(softmax(math.log(4) * INSIDE))
    for order in ((BOOST, CALM), (CALM, BOOST)):
        torch.testing.assert_close(weights(*order), wanted, atol=2e-6, rtol=1e-5)


# -- whole models --------------------------------------------------------------------------------------------------------


def test_seka_then_emphasise_is_edited_keys_under_biased_scores(tmp_path):
    from test_emphasise import ALL, batch_and_bias, edited_masks
    from test_seka import changes_of, edited_keys

    prompts, passages, path = PROMPTS, PASSAGES, tmp_path / "seka.safetensors"
    recipe_class("seka").profile(language_model(), tokenizer(), pairs=2, experts=False).save(path)
    x, bias, marked = batch_and_bias(0.1, passages, prompts)
    model = language_model(attn_implementation="eager")
    layers = [1, 3]
    with (
        edited_keys(model, marked, changes_of(str(path), layers, 2.0, 1.0)),
        edited_masks(model, bias, ALL),
    ):
        wanted = model(**x).logits
    stretch = ("seka", dict(text=passages, layers=layers, gain=2.0, negative_gain=1.0, profile_path=str(path)))
    read = ("emphasise", dict(text=passages, alpha=0.1))
    real = x["attention_mask"].bool()
    for order in ((stretch, read), (read, stretch)):
        model = language_model()
        with reattend.apply(model, *order, tokenizer=tokenizer()):
            torch.testing.assert_close(model(**x).logits[real], wanted[real], atol=5e-5, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:the borders of the segments")
def test_an_open_order_and_a_window_are_refused_together():
    model, x = language_model(), tokenizer()(PROMPTS, return_tensors="pt", padding=True)
    plain, chosen = model(**x).logits, {"pine": dict(segments=SEGMENTS), "streaming": dict(sinks=1, window=8)}
    for order in (("pine", "streaming"), ("streaming", "pine")):
        with (
            reattend.apply(model, *((slug, chosen[slug]) for slug in order), tokenizer=tokenizer()),
            pytest.raises(ReattendError, match="order of segments open.*use one of the two"),
        ):
            model(**x)
        assert torch.equal(model(**x).logits, plain)
