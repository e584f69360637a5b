"""spotlight: the closed form against two softmaxes, what stays untouched, and whole models."""

from __future__ import annotations

import math

import pytest
import reattend
import torch
from reattend.interventions import fused, reference
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
