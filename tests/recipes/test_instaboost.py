"""instaboost: golden data of the official code, what a constant factor does to a row, and whole models."""

from __future__ import annotations

import pytest
import torch
from golden_files import golden_file
from reattend.interventions import fused, reference
from weighed import random_call, weights_of


@pytest.mark.parametrize("execute", [fused, reference])
@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_golden_weights_of_the_official_code(name, execute):
    data, facts = golden_file("instaboost", name)
    before, wanted = data["attn_in"], data["attn_out"]
    length, multiplier, batch = int(facts["prompt_len"]), float(facts["multiplier"]), before.shape[0]
    mask = torch.zeros_like(before).masked_fill(before == 0, float("-inf"))
    for parameters in ({}, {"first_token": False}):  # the official range holds the first token anyway
        found = weights_of(
            "instaboost", before.clamp_min(1e-9).log(), mask, [(0, length)], [0] * batch, before.shape[3], execute,
            multiplier=multiplier, **parameters,
        )  # fmt: skip
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert (before - wanted).abs().max() > 0.1


@pytest.mark.parametrize("multiplier", [1.5, 3.0, 19.0])
def test_the_share_of_the_passage_follows_the_formula(multiplier):
    scores, mask = random_call()
    ranges, inside = [[(3, 6)], [(3, 5), (7, 8)]], torch.zeros(2, 1, 1, 15, dtype=torch.bool)
    inside[0, ..., 3:6], inside[1, ..., [3, 4, 7]] = True, True
    plain = weights_of("instaboost", scores, mask, ranges, [0, 0], 12, multiplier=1)
    found = weights_of("instaboost", scores, mask, ranges, [0, 0], 12, multiplier=multiplier, first_token=False)
    share, raised = (w.mul(inside).sum(-1) for w in (plain, found))
    torch.testing.assert_close(raised, multiplier * share / (1 + (multiplier - 1) * share))
    assert (raised > share).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:3]))
    for group in (inside, ~inside):  # ratios inside the passage and outside of it stay
        before, after = (w * group / (w * group).sum(-1, keepdim=True) for w in (plain, found))
        torch.testing.assert_close(after, before, atol=1e-6, rtol=0)
    # with the first token: the passage and it grow alike
    both = weights_of("instaboost", scores, mask, ranges, [0, 0], 12, multiplier=multiplier)
    torch.testing.assert_close(both[..., 0] / both[..., 3], plain[..., 0] / plain[..., 3], rtol=1e-4, atol=0)
    torch.testing.assert_close(both[..., 3] / both[..., 9], multiplier * plain[..., 3] / plain[..., 9], rtol=1e-4, atol=0)


def test_it_is_the_include_form_of_emphasise():
    """Before any token is generated, "include" differs by a constant on the whole row only."""
    scores, mask = random_call(keys=12)
    ranges = [[(3, 6)], [(1, 4)]]
    found = weights_of("instaboost", scores, mask, ranges, [0, 0], 12, multiplier=7, first_token=False)
    other = weights_of("emphasise", scores, mask, ranges, [0, 0], 12, alpha=7.0, position="include")
    torch.testing.assert_close(found, other, atol=1e-6, rtol=0)
    # rows before the passage see nothing that is boosted, rows inside a boosted prefix nothing else
    plain = weights_of("instaboost", scores, mask, ranges, [0, 0], 12, multiplier=1)
    torch.testing.assert_close(found[0, :, :3], plain[0, :, :3], atol=1e-6, rtol=0)
    prefix = weights_of("instaboost", scores, mask, [(0, 4)], [0, 0], 12, multiplier=7)
    torch.testing.assert_close(prefix[:, :, :4], plain[:, :, :4], atol=1e-6, rtol=0)


def test_prompts_without_a_passage_and_padding_are_left_alone():
    scores, mask = random_call(keys=12)
    ranges = [[(1, 3)], []]
    plain = weights_of("instaboost", scores, mask, ranges, [2, 0], 12, multiplier=1)
    found = weights_of("instaboost", scores, mask, ranges, [2, 0], 12, multiplier=5)
    torch.testing.assert_close(found[1], plain[1], atol=1e-6, rtol=0)
    ratio = (found / plain)[0, :, -1]
    torch.testing.assert_close(ratio[:, [2, 3, 4]] / ratio[:, :1], torch.full((4, 3), 5.0))  # first real token, passage
    torch.testing.assert_close(ratio[:, 1] / ratio[:, 0], torch.ones(4))  # padding is no first token
