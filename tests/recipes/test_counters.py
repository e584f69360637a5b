"""Counters count changes: where a recipe can change nothing it is not counted, and a session in which it never could says so."""

from __future__ import annotations

import contextlib

import pytest
import reattend
import torch
from example import modules
from reattend.interventions import ReattendWarning
from tiny_language import language_model

N = 18
HEADS = [[0, 1], [1, 0], [2, 2]]
NOTHING = [(slug, *item) for slug, module in modules().items() for item in getattr(module, "NOTHING", ())]


def prompt(batch: int = 1) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(3, 400, (batch, N))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("slug", "options", "steps"), NOTHING)
def test_what_changes_nothing_is_not_counted_and_is_told(slug, options, steps, implementation):
    """`NOTHING` of a method's example file: (parameters that change nothing of a prompt of 18 tokens, whether they change steps after it)."""
    model = language_model()
    model.set_attn_implementation(implementation)
    plain = model(input_ids=prompt()).logits
    session = reattend.apply(model, slug, **options)
    steered = model(input_ids=prompt()).logits
    assert session.applied == 0
    assert torch.equal(steered, plain)
    with pytest.warns(ReattendWarning, match="never acted in 1 forward passes"):
        session.remove()
    session = reattend.apply(model, slug, **options)
    model.generate(prompt(), attention_mask=torch.ones(1, N, dtype=torch.long), max_new_tokens=4, do_sample=False)
    assert set(session.stats.get(slug, {}).values()) == ({3} if steps else set())
    with contextlib.nullcontext() if steps else pytest.warns(ReattendWarning, match="never acted"):
        session.remove()


@torch.no_grad()
@pytest.mark.parametrize(
    ("slug", "options"), [(slug, options) for slug, options, _ in NOTHING if options.get("ranges") == [(0, N)]]
)
def test_one_row_that_can_be_changed_is_enough(slug, options):
    model = language_model()
    plain = model(input_ids=prompt(2)).logits
    with reattend.apply(model, slug, **{**options, "ranges": [[(0, N)], [(3, 6)]]}) as session:
        steered = model(input_ids=prompt(2)).logits
    assert set(session.stats[slug].values()) == {1}
    torch.testing.assert_close(steered[0], plain[0], atol=1e-5, rtol=1e-5)
    assert (steered[1] - plain[1]).abs().max() > 1e-3


def test_padding_does_not_tell_columns_apart():
    model, mask = language_model(), torch.ones(1, N, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        session = reattend.apply(model, "spotlight", ranges=[(0, N - 4)])
        model(input_ids=prompt(), attention_mask=mask)
    assert session.applied == 0
    with pytest.warns(ReattendWarning, match="never acted"):
        session.remove()


def test_learned_sinks_are_something_to_be_told_apart_from():
    """In gpt-oss every row also attends to a learned logit, so more for all tokens is less for that."""
    from reattend.interventions import Call, TokenMap
    from reattend.interventions.families.reweighting import OverPrompt

    q = torch.randn(1, 2, 5, 8)
    tokens = TokenMap(1, 5, 5, {"padding": torch.zeros(1, 5, dtype=torch.bool)})
    whole = torch.ones(1, 5, dtype=torch.bool)
    known = OverPrompt(whole, whole)
    assert not known.tells_apart(Call(q, q, q, tokens=tokens))
    assert known.tells_apart(Call(q, q, q, tokens=tokens, sinks=torch.zeros(2)))


@pytest.mark.parametrize(
    "name, options",
    [
        ("act", dict(heads=[[layer, head] for layer in range(4) for head in range(4)], threshold=0.12, beta=0.1)),
        ("retrieval-heads", dict(mode="sink_down", heads=HEADS, where="all")),
        ("spotlight", dict(ranges=[(0, 3)], target=0.6)),
        ("instaboost", dict(ranges=[(0, 3)], multiplier=20)),
    ],
)
def test_what_a_window_has_left_behind_is_not_counted(name, options):
    model = language_model("Mistral", sliding_window=8)
    how = dict(attention_mask=torch.ones(1, N, dtype=torch.long), do_sample=False)
    counts = []
    for new in (2, 14):
        with torch.no_grad(), reattend.apply(model, name, **options) as session:
            model.generate(prompt(), max_new_tokens=new, **how)
        counts.append(session.applied)
    if name == "act":  # its sinks may lie anywhere in the prompt
        assert counts[1] < counts[0] * 14
    else:
        assert counts[0] == counts[1]
