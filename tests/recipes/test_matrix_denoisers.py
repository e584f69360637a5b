"""Every method for diffusion models through every condition: bare denoisers, and pipelines by how they guide."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import reattend
import torch
from example import examples
from reattend.hooks import Edits, Guide, Plan, attach
from reattend.interventions import HeadGain, MixValue, ReattendError
from reattend.recipes import recipe_class
from reattend.recipes.kit.denoisers import image_layers
from test_matrix import Interrupted, end, interrupt, materialised
from tiny_denoisers import DENOISERS, build
from tiny_llama import traces
from tiny_runs import CASES, STEPS, draw

pytestmark = [pytest.mark.matrix, pytest.mark.filterwarnings("ignore:In CPU autocast")]
METHODS = examples("diffusion")
PROFILES = tempfile.TemporaryDirectory(prefix="reattend-matrix-denoisers-")
SOME = ["UNet2DConditionModel", "SD3Transformer2DModel (3.5)", "FluxTransformer2DModel", "PixArtTransformer2DModel"]


def parametrize(condition: str, places: Any):
    found = []
    for name, (_, example) in METHODS.items():
        reason = example.skips.get(condition)
        marks = [pytest.mark.skip(reason=f"{name}: {reason}")] if reason else []
        # that a method refuses a model is asked once, where it has to act on all of them
        chosen = [place for place in places if condition == "denoisers" or not example.refusal(place)]
        found += [pytest.param(name, place, marks=marks, id=f"{name}-{place}") for place in chosen]
    return pytest.mark.parametrize(("name", "place"), found)


def steer(name: str, target: Any, **more: Any) -> Any:
    slug, example = METHODS[name]
    return reattend.apply(target, slug, **{**example.on(target, Path(PROFILES.name)), **more})


def refused(name: str, place: str, target: Any) -> bool:
    """Whether the method says that it does not fit this denoiser, or that of this pipeline; it must say so then."""
    denoiser = getattr(target, "transformer", None) or getattr(target, "unet", target)
    said = METHODS[name][1].refusal(place, type(denoiser).__name__)
    if said:
        with pytest.raises(ReattendError, match=said):
            steer(name, target)
    return bool(said)


@torch.no_grad()
def predict(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs)[0]


def near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    scale = wanted.abs().max()
    torch.testing.assert_close(got / scale, wanted / scale, atol=1e-4, rtol=1e-3)


@parametrize("denoisers", DENOISERS)
def test_it_acts_on_every_denoiser_and_leaves_it_as_it_was(name, place):
    model, inputs = build(place)
    if refused(name, place, model):
        return
    base, before = predict(model, inputs), traces(model)
    with steer(name, model) as session:
        got = predict(model, inputs)
    (counts,) = session.stats.values()
    # it attends once for each sample, and for each one of a guide's branch; what acts at its projections acts once
    calls = {1} if "Mochi" not in place else {1, 2, 4}
    assert len(counts) == METHODS[name][1].counted(reattend.sites(model)) and set(counts.values()) <= calls
    assert (got - base).abs().max() > 1e-4 * base.abs().max() and got.isfinite().all()
    assert traces(model) == before and torch.equal(predict(model, inputs), base)


@parametrize("rows", SOME)
def test_rows_are_as_alone(name, place):
    model, inputs = build(place)
    if refused(name, place, model):
        return
    with steer(name, model):
        both = predict(model, inputs)
        for row in (0, 1):
            shared = ("img_ids", "txt_ids")
            alone = {
                k: v[row : row + 1] if isinstance(v, torch.Tensor) and v.dim() and k not in shared else v
                for k, v in inputs.items()
            }
            near(predict(model, alone)[0], both[row])


@parametrize("off", SOME)
def test_without_strength_no_bit_changes(name, place):
    example = METHODS[name][1]
    if example.off is None:
        pytest.skip(f"{name} has no strength at which it does nothing")
    model, inputs = build(place)
    if refused(name, place, model):
        return
    base, session = predict(model, inputs), steer(name, model, **example.off)
    assert torch.equal(predict(model, inputs), base) and session.applied == 0
    end(session)


@parametrize("half", SOME)
def test_half_precision_is_near(name, place):
    model, inputs = build(place)
    if refused(name, place, model):
        return
    base, half = predict(model, inputs), copy.deepcopy(model).bfloat16()
    cast = {k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    error = (predict(half, cast) - base).norm()
    with steer(name, model):
        wanted = predict(model, inputs)
    with steer(name, half):
        got = predict(half, cast)
    assert got.dtype == torch.bfloat16 and got.isfinite().all()
    # a guide multiplies the difference of two predictions
    assert (got - wanted).norm() < 10 * error + 0.02 * base.norm()


@parametrize("reference", SOME)
def test_fused_is_the_reference(name, place, monkeypatch):
    model, inputs = build(place)
    if refused(name, place, model):
        return
    with steer(name, model):
        fused = predict(model, inputs)
    materialised(monkeypatch)
    with steer(name, model):
        near(predict(model, inputs), fused)


@parametrize("heads", SOME)
def test_beside_what_names_single_heads(name, place):
    model, inputs = build(place)
    if refused(name, place, model):
        return
    with steer(name, model) as session:
        wanted = predict(model, inputs)
    table = reattend.sites(model).where(lambda s: s.route == "sdpa" and not s.problem)

    def nudge():
        return attach(model, [Plan("nudge", [Edits(table, lambda call: HeadGain(factor=1 + 1e-6, heads=[1]))])])

    for order in ((nudge, lambda: steer(name, model)), (lambda: steer(name, model), nudge)):
        with order[0]() as one, order[1]() as other:
            near(predict(model, inputs), wanted)
        assert session.stats in (one.stats, other.stats)


@parametrize("restore", SOME)
def test_an_exception_in_mid_forward_leaves_nothing(name, place):
    model, inputs = build(place)
    if refused(name, place, model):
        return
    base, before = predict(model, inputs), traces(model)
    last = reattend.sites(model)[-1].name
    with steer(name, model):
        wanted = predict(model, inputs)
        broken = model.get_submodule(last).register_forward_pre_hook(interrupt)
        with pytest.raises(Interrupted):
            predict(model, inputs)
        broken.remove()
        assert torch.equal(predict(model, inputs), wanted), "the session goes on as it was"
    assert traces(model) == before and torch.equal(predict(model, inputs), base)


# -- pipelines -----------------------------------------------------------------------------------------------------------


@parametrize("guidance", CASES)
def test_every_step_of_a_run_is_counted(name, place):
    """Guidance in one batch, in two calls, and none; other prompts in one batch, several images each."""
    pipe, call, _, _ = CASES[place]()
    if refused(name, place, pipe):
        return
    base = draw(pipe, call)
    with steer(name, pipe) as session:
        got = draw(pipe, call)
        assert torch.equal(draw(pipe, call), got), "a second run is the first one again"
    (counts,) = session.stats.values()
    example = METHODS[name][1]
    times = 2 if example.unconditional and "two calls" in place else 1
    assert list(counts.values()) == [2 * STEPS * times] * example.counted(reattend.sites(pipe))
    assert (got - base).abs().max() > 1e-4 and torch.equal(draw(pipe, call), base)


@parametrize("off", ["SD", "SD3", "Flux, two calls", "PixArt"])
def test_runs_without_strength_change_no_bit(name, place):
    example = METHODS[name][1]
    if example.off is None:
        pytest.skip(f"{name} has no strength at which it does nothing")
    pipe, call, _, _ = CASES[place]()
    if refused(name, place, pipe):
        return
    base, session = draw(pipe, call), steer(name, pipe, **example.off)
    assert torch.equal(draw(pipe, call), base) and session.applied == 0
    end(session)


@parametrize("guide", ["SD", "SD, no guidance", "SD3", "Flux, two calls"])
def test_beside_a_guide(name, place):
    """A further branch of the denoiser with next to no weight: the same picture."""
    pipe, call, _, _ = CASES[place]()
    if refused(name, place, pipe):
        return
    with steer(name, pipe) as session:
        wanted = draw(pipe, call)
    table = image_layers(reattend.sites(pipe))

    def weaken(at):
        rows = at.clock.rows("beside", at.batch)
        return None if rows is None else MixValue(strength=1.0, rows=rows[:, None])

    def guide():
        return attach(pipe, [Plan("beside", [Edits(table[0], weaken), Guide("beside", 1e-6)])])

    for order in ((guide, lambda: steer(name, pipe)), (lambda: steer(name, pipe), guide)):
        with order[0]() as one, order[1]() as other:
            near(draw(pipe, call), wanted)
        assert session.stats in (one.stats, other.stats)


@parametrize("schedule", ["SD", "SD3"])
def test_part_of_the_schedule(name, place):
    if not {"start", "stop"} <= set(recipe_class(METHODS[name][0]).model_fields):
        pytest.skip(f"{name} acts in all steps of a schedule")
    pipe, call, _, _ = CASES[place]()
    if refused(name, place, pipe):
        return
    with steer(name, pipe, start=0.25, stop=0.75) as session:
        draw(pipe, call, num_inference_steps=8)
    (counts,) = session.stats.values()
    assert list(counts.values()) == [4] * METHODS[name][1].counted(reattend.sites(pipe))
