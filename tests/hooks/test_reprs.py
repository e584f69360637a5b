"""What a session, a recording and a table of sites say of themselves, and tables in which nothing is."""

import dataclasses

import pytest
import torch
from reattend.hooks import Edits, Plan, SiteTable, attach, capture, sites
from reattend.interventions import ReattendError, UnsupportedError
from tiny_llama import IDS, logits, session_of, tiny_llama


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def test_a_session_says_what_it_does(model) -> None:
    session = session_of(model)
    logits(model)
    assert repr(session) == "<Session of 'test' on LlamaForCausalLM: active, applied 3 times>"
    session.remove()
    assert "ended, applied 3 times" in repr(session) and "'test'" in repr(session)


def test_a_recording_says_what_it_has_read(model) -> None:
    with capture(model) as recording, torch.no_grad():
        model(IDS)
    assert repr(recording).startswith("<Recording of 3 sites, 3 calls read; mass: ")


def test_a_table_prints_as_one(model) -> None:
    lines = repr(sites(model)).splitlines()
    assert lines[0] == "LlamaForCausalLM: 3 attention sites" and len(lines) == 5
    assert lines[1].split() == ["site", "stack", "layer", "kind", "heads", "kv", "dim", "causal"]
    ill = dataclasses.replace(sites(model)[0], problem="it computes its softmax itself")
    lines = repr(SiteTable([ill], {})).splitlines()
    assert lines[1].endswith("problem") and lines[2].endswith("it computes its softmax itself")


@pytest.mark.parametrize("choose", [lambda t: t.stack("foo"), lambda t: t.kind("foo"), lambda t: t.stack("denoisers")])
def test_names_on_no_model_are_refused(model, choose) -> None:
    with pytest.raises(ReattendError, match="there is no such (stack|kind); it has 'decoder' .self, layers 0 to 2."):
        choose(sites(model))


@pytest.mark.parametrize(
    ("choose", "asked"),
    [
        (lambda t: t.layers(50, 60), "layers 50 to 60"),
        (lambda t: t.only([7]), r"layers \[7\]"),
        (lambda t: t.stack("vision").layers(0, 1), "stack 'vision'"),
        (lambda t: t.kind("cross"), "kind 'cross'"),
    ],
)
def test_an_empty_table_says_what_there_is(model, choose, asked: str) -> None:
    table = choose(sites(model))
    assert isinstance(table, SiteTable) and not len(table)
    message = f"LlamaForCausalLM has no attention site in {asked}; it has 'decoder' .self, layers 0 to 2."
    with pytest.raises(UnsupportedError, match=message):
        attach(model, [Plan("none", [Edits(table, lambda call: None)])])
    with pytest.raises(ReattendError, match=message):
        capture(model, where=table)
    assert "LlamaForCausalLM: no attention site (" in repr(table)
