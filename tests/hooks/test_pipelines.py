"""Guidance and the clock through the stock diffusers pipelines, against loops that make their weak prediction in a call of its own."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import reattend
import torch
from reattend.hooks import Edits, Guide, Plan, attach
from reattend.hooks.trackers.guidance_rows import layout_of_pipeline
from reattend.hooks.trackers.pipelines import NEGATIVE_FIRST
from reattend.interventions import Call, MixValue, ReattendError, ReattendWarning, UnsupportedError
from reattend.recipes.kit.denoisers import default_layers, image_layers
from tiny_denoisers import build
from tiny_runs import CASES, STEPS, draw, flux, stable_diffusion
from torch import Tensor, nn


def hooks_of(pipe: Any) -> list[list[int]]:
    modules = [m for c in pipe.components.values() if isinstance(c, nn.Module) for m in c.modules()]
    return [[*m._forward_pre_hooks, *m._forward_hooks] for m in modules]


def by_hand(pipe: Any, call: dict[str, Any], name: str, guidance: float, scale: float) -> Tensor:
    """The pipeline with a denoiser that runs twice; the conditional prediction gets the whole shift, divided by the CFG scale."""
    denoiser: nn.Module = getattr(pipe, name)
    table = image_layers(reattend.sites(denoiser))[default_layers(reattend.sites(denoiser))[0]]
    plain, weaken, calls = denoiser.forward, False, 0
    separate = "Flux" in type(denoiser).__name__

    def weak(edited: Call) -> MixValue | None:
        return MixValue(strength=0.5, rows=edited.query_rows("image")) if weaken else None

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        nonlocal weaken, calls
        base = plain(*args, **{**kwargs, "return_dict": False})[0].clone()
        weaken = True
        other = plain(*args, **{**kwargs, "return_dict": False})[0]
        weaken = False
        half = len(base) // 2 if guidance > 1 and not separate else 0
        if not separate or guidance == 1 or calls % 2 == 0:
            base[half:] += scale * (base[half:] - other[half:]) / max(guidance, 1.0)
        calls += 1
        return (base,)

    denoiser.forward = forward  # type: ignore[method-assign]
    try:
        with attach(denoiser, [Plan("weak", [Edits(table, weak)])]):
            return draw(pipe, call)
    finally:
        del denoiser.forward


@pytest.mark.parametrize("name", CASES)
def test_equal_to_two_denoiser_calls(name: str) -> None:
    pipe, call, part, guidance = CASES[name]()
    before = draw(pipe, call)
    hooks = hooks_of(pipe)  # transformers leaves some of its own on text encoders
    expected = by_hand(pipe, call, part, guidance, 3.0)
    with reattend.apply(pipe, "softpag", scale=3.0) as session:
        after = draw(pipe, call)
    (counts,) = session.stats.values()
    assert list(counts.values()) == [STEPS] and next(iter(counts)).startswith(part)
    torch.testing.assert_close(after, expected, atol=2e-4, rtol=2e-3)
    assert (after - before).abs().max() > 20 * (after - expected).abs().max()
    assert torch.equal(draw(pipe, call), before)
    assert hooks_of(pipe) == hooks


def test_heads_not_named_stay() -> None:
    pipe, call, _, _ = stable_diffusion()
    both = []
    for heads in ([(1, 0)], [(1, 1)], [(1, 0), (1, 1)]):
        with reattend.apply(pipe, "softpag", heads=heads):
            both.append(draw(pipe, call))
    with reattend.apply(pipe, "softpag", layers=[1]):
        assert torch.equal(draw(pipe, call), both[2])
    assert not torch.equal(both[0], both[1])


def clocks(pipe: Any, call: dict[str, Any], runs: int = 1, **more: Any) -> list[tuple[Any, ...]]:
    seen: list[tuple[Any, ...]] = []
    table = reattend.sites(pipe).stack("denoiser")[:1]

    def note(at: Call) -> None:
        rows = {name: rows.tolist() for name, rows in at.clock.branches.items()}
        at.memory["calls"] = at.memory.get("calls", 0) + 1
        seen.append((at.clock.phase, at.clock.step, at.clock.steps, at.clock.timestep, rows, at.memory["calls"]))

    with pytest.warns(ReattendWarning), attach(pipe, [Plan("note", [Edits(table, note)])]):
        for _ in range(runs):
            draw(pipe, call, **more)
    return seen


def test_clock_of_one_call_guidance() -> None:
    pipe, call, _, _ = stable_diffusion()
    seen = clocks(pipe, call, runs=2)
    assert [s[:3] for s in seen] == [("denoise", i, STEPS) for i in (0, 1, 2)] * 2
    assert [s[3] for s in seen[:3]] == [float(t) for t in pipe.scheduler.timesteps]
    assert seen[0][4] == {"conditional": [False, False, True, True], "unconditional": [True, True, False, False]}
    assert [s[5] for s in seen] == [1, 2, 3] * 2, "memory lasts for one run"
    assert clocks(pipe, {**call, "guidance_scale": 1.0})[0][4] == {"conditional": [True, True]}


def test_clock_of_two_call_guidance() -> None:
    pipe, call, _, _ = flux()
    seen = clocks(pipe, call)
    assert [s[1] for s in seen] == [0, 0, 1, 1, 2, 2] and {s[2] for s in seen} == {STEPS}
    assert [list(s[4]) for s in seen] == [["conditional"], ["unconditional"]] * 3


def test_clock_of_a_second_order_scheduler() -> None:
    from diffusers import HeunDiscreteScheduler

    pipe, call, _, _ = stable_diffusion()
    pipe.scheduler = HeunDiscreteScheduler()
    seen = clocks(pipe, call)
    assert [s[1] for s in seen] == [0, 1, 1, 2, 2] and {s[2] for s in seen} == {STEPS}


def test_clock_of_a_bare_denoiser() -> None:
    model, inputs = build("UNet2DConditionModel")
    seen = []
    with (
        pytest.warns(ReattendWarning),
        attach(model, [Plan("note", [Edits(reattend.sites(model)[:1], lambda c: seen.append(c.clock))])]),
    ):
        for t in (900, 900, 500, 100, 900, 500):
            with torch.no_grad():
                model(**{**inputs, "timestep": torch.tensor(t)})
    assert [c.step for c in seen] == [0, 0, 1, 2, 0, 1] and seen[0].steps is None
    assert seen[0].branches["conditional"].tolist() == [True, True]


def test_several_guides_compose() -> None:
    pipe, call, _, _ = stable_diffusion()
    table = image_layers(reattend.sites(pipe))
    parts = {}

    def steps(name: str, layer: int, scale: float) -> list[Any]:
        def weaken(at: Call) -> MixValue | None:
            rows = at.clock.rows(name, at.batch)
            parts[name] = None if rows is None else rows.tolist()
            return None if rows is None else MixValue(strength=1.0, rows=rows[:, None])

        return [Edits(table[layer], weaken), Guide(name, scale)]

    results = []
    for plans in ([("a", 0, 2.0)], [("b", 1, 1.0)], [("a", 0, 2.0), ("b", 1, 1.0)]):
        with attach(pipe, [Plan("guides", [s for p in plans for s in steps(*p)])]):
            results.append(draw(pipe, call, num_inference_steps=1))
    assert parts == {"a": [False] * 4 + [True] * 2 + [False] * 2, "b": [False] * 6 + [True] * 2}
    base = draw(pipe, call, num_inference_steps=1)
    # one step is linear in the prediction, so the shifts add up
    torch.testing.assert_close(results[2] - base, results[0] - base + results[1] - base, atol=1e-4, rtol=1e-4)


def test_callbacks_and_offload_hooks() -> None:
    from accelerate import cpu_offload_with_hook

    pipe, call, _, _ = stable_diffusion()
    before = draw(pipe, call)
    with reattend.apply(pipe, "softpag"):
        expected = draw(pipe, call)
    hooks = [cpu_offload_with_hook(m, execution_device="cpu")[1] for m in (pipe.text_encoder, pipe.unet, pipe.vae)]
    steps: list[int] = []

    def after_step(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return tensors

    with reattend.apply(pipe, "softpag"):
        assert torch.equal(draw(pipe, call, callback_on_step_end=after_step), expected)
    assert steps == [0, 1, 2] and torch.equal(draw(pipe, call), before)
    for hook in hooks:
        hook.remove()
    assert torch.equal(draw(pipe, call), before)


def test_interrupted_run_then_another() -> None:
    pipe, call, _, _ = stable_diffusion()
    before = draw(pipe, call)
    with reattend.apply(pipe, "softpag"):
        expected = draw(pipe, call)

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            draw(pipe, call, callback_on_step_end=stop)
        assert torch.equal(draw(pipe, call), expected)
    assert torch.equal(draw(pipe, call), before)


def test_isolated_sessions_in_threads() -> None:
    model, inputs = build("SD3Transformer2DModel")

    def predict() -> Tensor:
        with torch.no_grad():
            return model(**inputs)[0]

    before = predict()
    with reattend.apply(model, "softpag"):
        guided = predict()
    results: dict[str, list[Tensor]] = {"with": [], "without": []}
    entered, done = threading.Event(), threading.Event()

    def steered() -> None:
        with reattend.apply(model, "softpag", isolated=True):
            entered.set()
            results["with"] += [predict() for _ in range(5)]
            done.wait(20)

    def free() -> None:
        entered.wait(20)
        results["without"] += [predict() for _ in range(5)]
        done.set()

    threads = [threading.Thread(target=f) for f in (steered, free)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results["with"]) == len(results["without"]) == 5
    assert all(torch.equal(r, guided) for r in results["with"]) and all(torch.equal(r, before) for r in results["without"])
    assert torch.equal(predict(), before)


def test_layouts_that_are_not_known() -> None:
    text = {"encoder_hidden_states": torch.randn(6, 5, 8)}
    one, two = torch.randn(1, 4, 8, 8), torch.randn(2, 4, 8, 8)

    def layout(said: bool | None, hidden: torch.Tensor, text: dict = text, perturbed: bool = False) -> tuple[str, ...] | None:
        return layout_of_pipeline(NEGATIVE_FIRST, said, perturbed, hidden, text)

    assert layout(True, one.repeat(3, 1, 1, 1)) is None  # three parts
    assert layout(True, two.repeat(3, 1, 1, 1)) is None
    assert layout(True, two.repeat(2, 1, 1, 1)) == ("unconditional", "conditional")
    assert layout(False, two.repeat(2, 1, 1, 1)) == ("conditional",)
    assert layout(True, two.repeat(3, 1, 1, 1), perturbed=True) == ("unconditional", "conditional", "")
    assert layout(None, two.repeat(2, 1, 1, 1)) == ("unconditional", "conditional")
    assert layout(None, two) == ("conditional",)
    alike = {"encoder_hidden_states": torch.ones(2, 5, 8)}
    assert layout(None, one.repeat(2, 1, 1, 1), alike) == ("conditional",)


def test_unknown_layout_is_an_error_for_a_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call, _, _ = stable_diffusion()
    monkeypatch.setattr("reattend.hooks.trackers.denoise.layout_of_pipeline", lambda *_: None)
    with reattend.apply(pipe, "softpag"), pytest.raises(UnsupportedError, match="which rows .* are conditional is not known"):
        draw(pipe, call)


@pytest.mark.parametrize("bad", [{"name": ""}, {"name": "conditional"}, {"scale": float("nan")}, {"start": 0.5, "stop": 0.5}])
def test_bad_guides(bad: dict[str, Any]) -> None:
    with pytest.raises(ReattendError, match="guide"):
        Guide(**{"name": "x", "scale": 1.0, **bad})


def test_a_guide_without_a_denoiser_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="needs a denoiser"):
        attach(nn.Linear(2, 2), [Plan("x", [Guide("x", 1.0)])])
