"""`reattend.edit`: an intervention of the user's own is a session like any other."""

from __future__ import annotations

import pytest
import reattend
import torch
from reattend.hooks import Edits, Plan, attach, sites
from reattend.interventions import HeadGain, KeyBias, ReattendError, ReattendWarning, UnsupportedError
from tiny_language import language_model, tokenizer


@pytest.fixture(scope="module")
def model():
    return language_model()


@pytest.fixture(scope="module")
def inputs():
    return tokenizer(None)("the sky is green today", return_tensors="pt")


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def louder(call):
    return HeadGain(factor=1.5, heads=[1]) if call.clock.phase != "decode" else None


def test_a_function_acts_where_the_plan_of_a_recipe_would(model, inputs):
    plain = logits(model, inputs)
    with attach(model, [Plan("louder", [Edits(sites(model).layers(1, 1), louder)])]) as by_hand:
        expected = logits(model, inputs)
    for where in (reattend.sites(model).layers(1, 1), lambda table: table.layers(1, 1)):
        with reattend.edit(model, louder, sites=where) as session:
            assert torch.equal(logits(model, inputs), expected) and not torch.equal(expected, plain)
        assert session.stats == by_hand.stats and list(session.stats) == ["louder"]
        with session:  # it begins again, with its plan made anew
            assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(logits(model, inputs), plain)


def test_a_session_says_how_attention_was_computed(model, inputs):
    first, second = (site.name for site in list(sites(model))[:2])
    with reattend.edit(model, HeadGain(factor=1.5), sites=lambda table: table.layers(0, 0)) as session:
        logits(model, inputs)
        with reattend.edit(
            model, lambda call: KeyBias(bias=torch.ones(call.num_keys)), sites=lambda table: table.layers(1, 1)
        ) as inner:
            logits(model, inputs)
        assert session.ways == {first: {"kernel": 2}} and inner.ways == {second: {"key biases": 1}}
        session.clear_counts()
        assert session.ways == {} and session.applied == 0
        logits(model, inputs)
        assert session.ways == {first: {"kernel": 1}}


def test_edits_that_are_the_same_at_every_call(model, inputs):
    with reattend.edit(reattend.wrap(model), [HeadGain(factor=1.5, heads=[1])], label="mine") as session:
        several = logits(model, inputs)
    with reattend.edit(model, HeadGain(factor=1.5, heads=[1])):
        assert torch.equal(logits(model, inputs), several)
    assert set(session.stats["mine"]) == {site.name for site in sites(model)}


def test_passages_are_roles_of_the_call(model, inputs):
    seen = []

    def look(call):
        seen.append(call.columns("fact")[0].nonzero()[:, 0].tolist())
        return KeyBias(bias=5.0 * call.columns("fact"))

    with reattend.edit(model, look, passages={"fact": "green"}, tokenizer=tokenizer(None)):
        logits(model, inputs)
    assert seen and tokenizer(None).decode(inputs["input_ids"][0, seen[0]]).strip() == "green"


def test_one_that_never_acts_says_so(model, inputs):
    with pytest.warns(ReattendWarning, match="'quiet' never acted"), reattend.edit(model, lambda call: None, label="quiet"):
        logits(model, inputs)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(intervention="louder"), "intervention must be a function from a call to edits"),
        (dict(intervention=[1]), "intervention must be a function from a call to edits"),
        (dict(sites="decoder"), "sites must be a table"),
        (dict(sites=lambda table: None), "sites must be a table"),
        (dict(sites=lambda table: table.where(lambda site: False)), "selects no attention site"),
        (dict(passages={"fact": []}), r"passages\['fact'\] must be a text"),
        (dict(passages={"fact": ""}), "must be a text that is not empty"),
    ],
)  # fmt: skip
def test_bad_input_before_anything_runs(model, wrong, message):
    with pytest.raises((ReattendError, UnsupportedError), match=message):
        reattend.edit(model, **{"intervention": louder, **wrong})


def test_what_is_no_edit_is_refused_at_the_first_call(model, inputs):
    with (
        pytest.raises(ReattendError, match="returns an edit, a list of edits or None"),
        reattend.edit(model, lambda call: 0.5),
    ):
        logits(model, inputs)
