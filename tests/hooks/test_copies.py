"""A copy, a pickle or a saved file of a model that is made inside a session is a clean model, which knows nothing of the session."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from reattend.hooks import Edits, Observe, Plan, attach, sites
from tiny_denoisers import unet
from tiny_llama import halve, hooks_on, logits, session_of, tiny_llama


def through_torch(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a list": lambda model: copy.deepcopy([model])[0],
    "torch.save": through_torch,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("way", WAYS)
def test_copies_are_clean_in_the_session_and_after_it(way):
    model = tiny_llama()
    calls = []
    model.model.layers[0].register_forward_hook(count(calls))
    before, own = logits(model), hooks_on(model)
    plan = Plan("both", [Edits(sites(model), halve), Observe(sites(model), lambda o: None)])
    with attach(model, [plan]):
        steered = logits(model)
        twin = WAYS[way](model)
        assert hooks_on(twin) == own, "the user's hooks stay, ours do not"
        assert twin.config._attn_implementation == "sdpa" and type(twin.config._attn_implementation) is str
        assert torch.equal(logits(twin), before)
        assert torch.equal(logits(model), steered)
    assert torch.equal(logits(twin), before) and torch.equal(logits(model), before)
    assert hooks_on(model) == own
    with session_of(twin):
        assert torch.equal(logits(twin), steered)


class count:
    def __init__(self, calls):
        self.calls = calls

    def __call__(self, *_):
        self.calls.append(1)


@pytest.mark.parametrize("way", WAYS)
def test_copies_of_a_denoiser(way):
    model, inputs = unet()
    with torch.no_grad():
        before = model(**inputs).sample
        table = sites(model).where(lambda s: s.supported)
        with attach(model, [Plan("halve", [Edits(table, halve)])]) as session:
            model(**inputs)
            twin = WAYS[way](model)
            applied = session.applied
            assert hooks_on(twin) == 0 and torch.equal(twin(**inputs).sample, before)
            assert session.applied == applied


def test_a_config_that_is_copied_or_saved_names_the_users_implementation(tmp_path):
    model = tiny_llama()
    before = logits(model)
    with session_of(model):
        for twin in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
            assert twin._attn_implementation == "sdpa" and type(twin._attn_implementation) is str
        model.save_pretrained(tmp_path)
    assert "reattend" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), before)


def test_a_pickle_needs_nothing_of_this_package():
    model = tiny_llama()
    with session_of(model):
        assert b"reattend" not in pickle.dumps(model)
