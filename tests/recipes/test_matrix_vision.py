"""Every method for encoders of images through every condition: see `example.py` for what a method says of itself."""

from __future__ import annotations

import copy

import pytest
import reattend
import tiny_encoders
import torch
from example import examples
from reattend.hooks import Edits, Plan, attach, sites
from reattend.interventions import HeadGain, ReattendError, reference
from tiny_encoders import ENCODERS, features, inputs_of
from tiny_llama import traces

pytestmark = pytest.mark.matrix
METHODS = examples("vision")
SOME = ["vit", "clip_vision", "dinov2_registers"]


def parametrize(condition: str, places):
    found = []
    for name, (_, example) in METHODS.items():
        reason = example.skips.get(condition)
        marks = [pytest.mark.skip(reason=f"{name}: {reason}")] if reason else []
        chosen = [place for place in places if condition == "encoders" or not example.refusal(place)]
        found += [pytest.param(name, place, marks=marks, id=f"{name}-{place}") for place in chosen]
    return pytest.mark.parametrize(("name", "place"), found)


def build(place: str):
    return tiny_encoders.sam() if place == "sam" else ENCODERS[place][0]()


def steer(name: str, model, **more):
    slug, example = METHODS[name]
    return reattend.apply(model, slug, **{**example.parameters, **more})


def near(got, wanted):
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


@parametrize("encoders", [*ENCODERS, "sam"])
def test_it_acts_on_every_encoder_and_leaves_it_as_it_was(name, place):
    model, (_, example) = build(place), METHODS[name]
    said = example.refusal(place)
    if said:
        with pytest.raises(ReattendError, match=said):
            steer(name, model)
        return
    base, before = features(model), traces(model)
    with steer(name, model) as session:
        got = features(model)
        assert torch.equal(features(model), got)
    (counts,) = session.stats.values()
    assert len(counts) == example.layers and set(counts.values()) == {2}
    assert (got - base).abs().max() > 1e-5 and got.isfinite().all()
    assert traces(model) == before and torch.equal(features(model), base)


@parametrize("rows", SOME)
def test_rows_are_as_alone(name, place):
    model = build(place)
    with steer(name, model):
        both = features(model)
        for row in (0, 1):
            near(features(model, {key: value[row : row + 1] for key, value in inputs_of(model).items()})[0], both[row])


@parametrize("off", SOME)
def test_without_strength_no_bit_changes(name, place):
    example = METHODS[name][1]
    if example.off is None:
        pytest.skip(f"{name} has no strength at which it does nothing")
    model = build(place)
    base, session = features(model), steer(name, model, **example.off)
    assert torch.equal(features(model), base) and session.applied == 0
    session.__exit__(ValueError, ValueError(), None)


@parametrize("half", SOME)
def test_half_precision_is_near(name, place):
    model = build(place)
    half, inputs = copy.deepcopy(model).bfloat16(), inputs_of(model)
    cast = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    error = (features(half, cast) - features(model)).norm()
    with steer(name, model):
        wanted = features(model)
    with steer(name, half):
        got = features(half, cast)
    assert got.dtype == torch.bfloat16 and got.isfinite().all()
    # which tokens are chosen may turn on the last bit
    assert (got - wanted).norm() < 10 * error + 0.2 * wanted.norm()


@parametrize("reference", SOME)
def test_fused_is_the_reference(name, place, monkeypatch):
    model = build(place)
    with steer(name, model):
        fused = features(model)
    monkeypatch.setattr("reattend.hooks.steering.fused_as_it_is", reference)
    with steer(name, model):
        near(features(model), fused)


@parametrize("eager", SOME)
def test_on_eager_attention(name, place):
    model = build(place)
    with steer(name, model):
        wanted = features(model)
    model.set_attn_implementation("eager")
    with steer(name, model):
        near(features(model), wanted)


@parametrize("heads", SOME)
def test_beside_what_names_single_heads(name, place):
    model = build(place)
    with steer(name, model) as session:
        wanted = features(model)
    table = sites(model).stack("vision").kind("self")

    def nudge():
        return attach(model, [Plan("nudge", [Edits(table, lambda call: HeadGain(factor=1 + 1e-6, heads=[1]))])])

    for order in ((nudge, lambda: steer(name, model)), (lambda: steer(name, model), nudge)):
        with order[0]() as one, order[1]() as other:
            near(features(model), wanted)
        assert session.stats in (one.stats, other.stats)


class Interrupted(Exception):
    pass


@parametrize("restore", SOME)
def test_an_exception_in_mid_forward_leaves_nothing(name, place):
    model = build(place)
    base, before = features(model), traces(model)
    last = sites(model).stack("vision").kind("self")[-1].name

    def interrupt(*_):
        raise Interrupted

    with steer(name, model):
        wanted = features(model)
        broken = model.get_submodule(last).register_forward_pre_hook(interrupt)
        with pytest.raises(Interrupted):
            features(model)
        broken.remove()
        assert torch.equal(features(model), wanted), "the session goes on as it was"
    assert traces(model) == before and torch.equal(features(model), base)
