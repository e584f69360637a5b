"""Formulas of decoding branches, on random logits."""

from __future__ import annotations

import math

import torch
from reattend.interventions.families.logits import anchored, contrasted


def logits(seed=0, shape=(3, 1, 40)):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(shape, generator=generator), 3 * torch.randn(shape, generator=generator)


def test_anchored_is_linear_in_its_strength():
    full, hidden = logits()
    for strength in (-0.7, 0.5, 1.4, 3.0):
        torch.testing.assert_close(anchored(full, hidden, strength), hidden + strength * (full - hidden))
    assert anchored(full, hidden, 1.0) is full and anchored(full, hidden, 0.0) is hidden
    assert anchored(full, hidden, 1 + 5e-5) is full


def test_modulated_changes_the_likeliest_token_most_and_each_row_for_itself():
    full, hidden = logits()
    change = anchored(full, hidden, 3.0, True) - full
    share = full.softmax(-1) / full.softmax(-1).amax(-1, keepdim=True)
    torch.testing.assert_close(change, 2 * share.clamp_min(1e-6) * (full - hidden), atol=1e-4, rtol=1e-3)
    top = full.argmax(-1, keepdim=True)
    torch.testing.assert_close(change.gather(-1, top), 2 * (full - hidden).gather(-1, top), atol=1e-4, rtol=1e-4)
    for row in range(3):
        assert torch.equal(
            anchored(full[row : row + 1], hidden[row : row + 1], 3.0, True), anchored(full, hidden, 3.0, True)[row : row + 1]
        )
    # between -1 and 1 the plain form serves
    assert torch.equal(anchored(full, hidden, 0.5, True), anchored(full, hidden, 0.5))


def test_a_constant_difference_keeps_the_order():
    full, _ = logits()
    assert torch.equal(anchored(full, full - 2, 5.0).argmax(-1), full.argmax(-1))
    torch.testing.assert_close(anchored(full, full - 2, 5.0).softmax(-1), full.softmax(-1))


def test_extremes_stay_finite_and_forbidden_tokens_out():
    full, hidden = logits()
    full[..., 0] = hidden[..., 0] = full[..., 1] = hidden[..., 2] = -math.inf
    for strength in (-50.0, 0.5, 50.0):
        for modulated in (False, True):
            found = anchored(full, hidden, strength, modulated)
            assert (found[..., :2] == -math.inf).all() and found[..., 2:].isfinite().all()
            assert found[..., 2:].abs().max() <= 1000
    assert not contrasted(full, hidden, 3.0)[..., 3:].isnan().any()


def test_contrasted():
    given, without = logits(1)
    c, u = given.log_softmax(-1), without.log_softmax(-1)
    assert torch.equal(contrasted(given, without, 1.0), c)
    found = contrasted(given, without, 1.5, 0.2)
    out = found == -math.inf
    assert torch.equal(out, c.exp() < 0.2 * c.exp().amax(-1, keepdim=True)) and out.any() and not out.all(-1).any()
    torch.testing.assert_close(found[~out], (u + 1.5 * (c - u))[~out])
