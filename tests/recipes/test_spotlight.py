"""spotlight: the closed form against two softmaxes, what stays untouched, and whole models."""

from __future__ import annotations

import math

import pytest
import reattend
import torch
from reattend.interventions import ReattendError, UnsupportedError, fused, reference
from reattend.recipes import load_recipe, recipe, save_recipe
from tiny_language import language_model, tokenizer
from weighed import random_call, weights_of

PROMPTS = ["Answer in French. The capital of Italy is Rome. What is the capital?", "Anna has a red house. Answer in one word."]
PASSAGES = [["Answer in French."], ["red house", "one word"]]
RANGES = [[(3, 6)], [(3, 5), (7, 8)]]
INSIDE = torch.zeros(2, 1, 1, 15, dtype=torch.bool)
INSIDE[0, ..., 3:6] = INSIDE[1, ..., [3, 4, 7]] = True


def weighed(execute=fused, ranges=RANGES, queries=12, **parameters):
    scores, mask = random_call(queries=queries)
    return weights_of("spotlight", scores, mask, ranges, [0, 0], 12, execute, **parameters)


def two_softmaxes(target, exact=False, queries=12):
    """The method as it is published: shares of the plain softmax, a bias on the passages' scores, and the softmax again."""
    scores, mask = (x.double() for x in random_call(queries=queries))
    plain = (scores + mask).softmax(-1)
    share = (plain * INSIDE).sum(-1, keepdim=True)
    bias = torch.logit(torch.tensor(target).double()) - torch.logit(share) if exact else (target / share).log()
    bias = torch.where((share < target) & (share > 0), bias.clamp_max(math.log(100)), 0.0)
    return plain, share, (scores + mask + bias * INSIDE).softmax(-1)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("execute", [fused, reference])
@pytest.mark.parametrize("target", [0.05, 0.3, 0.6])
def test_the_closed_form_equals_two_softmaxes(target, execute, exact):
    for queries in (1, 12):
        plain, share, wanted = two_softmaxes(target, exact, queries)
        found = weighed(execute, queries=queries, target=target, exact=exact).double()
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
        raised = (found * INSIDE).sum(-1, keepdim=True)
        lifted = (share < target) & (share / (1 - share) > target / (1 - target) / 100)  # within the bound on the factor
        assert lifted.any() and (queries == 1 or (share >= target).any())
        new = torch.full_like(share, target) if exact else target / (target + 1 - share)
        torch.testing.assert_close(raised[lifted], new[lifted], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found.sum(-1), torch.ones_like(found.sum(-1)), atol=1e-6, rtol=0)
        for group in (INSIDE, ~INSIDE):  # ratios inside the passages and outside of them stay
            group = group & lifted
            before, after = (w * group / (w * group).sum(-1, keepdim=True).clamp_min(1e-12) for w in (plain, found))
            torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def test_rows_that_look_there_already_or_cannot_stay_as_they_are():
    plain, share, _ = two_softmaxes(0.3)
    base = weighed(target=0)
    found = weighed(target=0.3)
    enough = (share >= 0.3)[..., 0]
    blind = (share == 0)[..., 0]
    assert enough.any() and not enough.all() and torch.equal(found[enough], base[enough])
    scores, mask = random_call(queries=15)
    early = weights_of("spotlight", scores, mask, RANGES, [0, 0], 12, target=0.5)
    before = weights_of("spotlight", scores, mask, RANGES, [0, 0], 12, target=0)
    assert torch.equal(early[:, :, :3], before[:, :, :3]) and not torch.equal(early[:, :, 3:], before[:, :, 3:])
    assert not blind.any()
    gated = weighed(target=0.3, min_share=0.1)
    faint = (share < 0.1)[..., 0]
    assert faint.any() and torch.equal(gated[faint], base[faint]) and torch.equal(gated[~faint], found[~faint])


def test_shares_rise_with_the_target_and_only_exact_is_idempotent():
    _, share, _ = two_softmaxes(0.3)
    shares = [(weighed(target=t) * INSIDE).sum(-1) for t in (0.0, 0.05, 0.1, 0.3, 0.6)]
    assert all((b >= a - 1e-6).all() and (b > a + 1e-6).any() for a, b in zip(shares, shares[1:]))
    assert ((weighed(target=0.3) * INSIDE).sum(-1) < 0.3)[(share < 0.29)[..., 0]].all()

    def twice(**parameters):
        once = weighed(**parameters)
        again = weights_of("spotlight", once.clamp_min(1e-30).log(), None, RANGES, [0, 0], 12, **parameters)
        return (once - again).abs().max()

    assert twice(target=0.3, exact=True, largest_factor=1e6) < 1e-5 < 1e-2 < twice(target=0.3)


def test_the_factor_is_bounded():
    scores = torch.zeros(1, 1, 1, 4)
    scores[..., 2] = -12.0
    found = weights_of("spotlight", scores, None, [(2, 3)], [0], 4, target=0.5)
    free = weights_of("spotlight", scores, None, [(2, 3)], [0], 4, target=0.5, largest_factor=1e9)
    share = scores.softmax(-1)[0, 0, 0, 2]
    torch.testing.assert_close(found[0, 0, 0, 2], 100 * share / (1 + 99 * share))
    torch.testing.assert_close(free[0, 0, 0, 2], 0.5 / (0.5 + 1 - share))


# -- whole models ----------------------------------------------------------------------------------------------------


def inputs():
    return tokenizer()(PROMPTS, return_tensors="pt", padding=True)


@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
def test_generation_equals_whole_passes(kind):
    """Left padding, other passages per row, sliding windows: each step with a cache as a pass over the whole text, and ends restored."""
    sliding = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
    model, x = language_model(kind, **(sliding if kind == "Gemma3" else {})), inputs()
    plain = model(**x).logits
    options = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with reattend.apply(model, "spotlight", text=PASSAGES, target=0.6, tokenizer=tokenizer()) as session:
        out = model.generate(**x, **options)
        assert session.stats["spotlight"] == {f"model.layers.{i}.self_attn": 6 for i in range(4)}
    x = dict(x)
    with reattend.apply(model, "spotlight", text=PASSAGES, target=0.6, tokenizer=tokenizer()):
        for logits in out.logits:
            torch.testing.assert_close(model(**x, use_cache=False).logits[:, -1], logits, atol=3e-5, rtol=1e-4)
            x["input_ids"] = out.sequences[:, : x["input_ids"].shape[1] + 1]
            x["attention_mask"] = torch.nn.functional.pad(x["attention_mask"], (0, 1), value=1)
    assert ((out.logits[0] - plain[:, -1]).abs().amax(dim=1) > 1e-3).all()
    assert torch.equal(model(**inputs()).logits, plain)


def test_shares_of_a_model_land_on_the_exact_target_also_after_another_recipe():
    model = language_model(attn_implementation="eager")
    x = tokenizer()(PROMPTS[:1], return_tensors="pt", return_offsets_mapping=True)
    offsets = x.pop("offset_mapping")[0]
    inside = (offsets[:, 0] < len(PASSAGES[0][0])) & (offsets[:, 1] > 0)
    options = dict(text=PASSAGES[0], target=0.4, exact=True, largest_factor=1e6)

    def shares(*choices):
        with reattend.apply(model, *choices, tokenizer=tokenizer()) as session:
            weights = torch.stack(model(**x, output_attentions=True).attentions)
        assert session.applied == 4 * len(choices)
        return weights[:, 0, :, -1, inside].sum(-1)

    before = shares(("instaboost", {"text": PASSAGES[0], "multiplier": 1.0001}))
    boost = ("instaboost", {"text": PASSAGES[0], "multiplier": 2.0, "first_token": False})
    lift = ("spotlight", options)
    after, boosted, both = shares(lift), shares(boost), shares(boost, lift)
    torch.testing.assert_close(after[0], before[0].clamp_min(0.4), atol=1e-4, rtol=0)
    assert (after > 0.4 - 1e-4).all() and (before < 0.3).any()
    # shares are measured after the recipes that come before
    torch.testing.assert_close(both[0], boosted[0].clamp_min(0.4), atol=1e-4, rtol=0)
    assert ((boosted[0] > 0.4) & (before[0] < 0.4)).any() or ((boosted[0] > before[0] + 0.01) & (boosted[0] > 0.4)).any()


def test_heads_and_a_target_of_zero():
    model, x = language_model(), inputs()
    plain = model(**x).logits

    def logits(*choices):
        with reattend.apply(model, *choices, tokenizer=tokenizer()) as session:
            return model(**x).logits, session.stats

    lift = {"text": PASSAGES, "target": 0.3, "exact": True}
    zero, stats = logits(("spotlight", {**lift, "target": 0}))
    assert torch.equal(zero, plain) and stats == {}
    some, stats = logits(("spotlight", {**lift, "heads": {1: [0, 3]}}))
    assert set(stats["spotlight"]) == {"model.layers.1.self_attn"} and not torch.equal(some, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_highest_target_stays_finite(dtype):
    model, x = language_model().to(dtype), inputs()
    with reattend.apply(model, "spotlight", text=PASSAGES, target=0.9, exact=True, tokenizer=tokenizer()) as session:
        assert torch.isfinite(model(**x).logits[x["attention_mask"].bool()]).all()
        assert session.applied == 4


def test_bad_input_is_refused(tmp_path):
    model = language_model()
    for parameters, problem in [
        (dict(), "text is required"),
        (dict(text="a", target=1), "target.*less than or equal to 0.9"),
        (dict(text="a", target=float("nan")), "target"),
        (dict(text="a", largest_factor=0.5), "largest_factor"),
        (dict(text=[[], []]), "names no passage"),
        (dict(text="a", target=0.2, min_share=0.2), "min_share must be below target"),
    ]:
        with pytest.raises(ReattendError, match=problem):
            reattend.apply(model, "spotlight", **parameters)
    with pytest.raises(UnsupportedError, match="heads 0 to 3"):
        reattend.apply(model, "spotlight", text="a", heads={0: [4]})
    original = recipe("spotlight", text=[["a"], ["b"]], target=0.3, exact=True)
    assert load_recipe(save_recipe(original, tmp_path / "r.yaml")) == original
