"""A denoiser's facts are those of the call that runs: pipelines that share components, loops of the user's own, and what these say."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import reattend
import tiny_pipelines
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    HeunDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
)
from diffusers.guiders import ClassifierFreeGuidance, SkipLayerGuidance
from reattend.hooks import Edits, Plan, attach
from reattend.hooks.trackers.denoising_run import place
from reattend.interventions import Call, HeadGain, ReattendError, ReattendWarning, UnsupportedError
from torch import Tensor

GUIDANCE = 4.0


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def texts(batch: int = 1) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(5)
    return {name: torch.randn(batch, 5, 16, generator=source) for name in ("prompt_embeds", "negative_prompt_embeds")}


def draw(pipe: Any, **more: Any) -> Tensor:
    call = {"num_inference_steps": 4, "guidance_scale": GUIDANCE, "generator": seeded(), "output_type": "latent", **texts()}
    return pipe(**{**call, **more}).images


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parts(pipe: Any, **more: Any) -> dict[str, Any]:
    return {
        **{name: part for name, part in pipe.components.items() if name != "image_encoder"},
        "requires_safety_checker": False,
        **more,
    }


PICTURE = torch.rand(1, 3, 16, 16, generator=seeded())


def img2img(pipe: Any, **more: Any) -> tuple[Any, dict[str, Any]]:
    call = {"image": PICTURE, "strength": 0.5, "num_inference_steps": 8}
    return quiet(StableDiffusionImg2ImgPipeline(**parts(pipe, **more))), call


def inpaint(pipe: Any) -> tuple[Any, dict[str, Any]]:
    call = {
        "image": PICTURE,
        "mask_image": PICTURE[:, :1].round(),
        "strength": 0.75,
        "num_inference_steps": 8,
        "height": 16,
        "width": 16,
    }
    return quiet(StableDiffusionInpaintPipeline(**parts(pipe))), call


def controlled(pipe: Any) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(1)
    net = ControlNetModel.from_unet(pipe.unet, conditioning_channels=3, conditioning_embedding_out_channels=(16, 32)).eval()
    return quiet(StableDiffusionControlNetPipeline(**parts(pipe), controlnet=net)), {"image": PICTURE}


def perturbed(pipe: Any) -> tuple[Any, dict[str, Any]]:
    return quiet(StableDiffusionPAGPipeline(**parts(pipe), pag_applied_layers="mid")), {"pag_scale": 2.0}


# -- pipelines made from the components of another one -----------------------------------------------------------------------


@pytest.mark.parametrize("other", [img2img, inpaint, controlled])
@pytest.mark.parametrize(("guidance", "before"), [(GUIDANCE, 1.0), (1.0, GUIDANCE)])
def test_the_facts_of_the_pipeline_that_runs(
    other: Callable[[Any], tuple[Any, dict[str, Any]]], guidance: float, before: float
) -> None:
    first = tiny_pipelines.stable_diffusion()
    second, call = other(first)
    softpag = {"strength": 1.0, "scale": 3.0, "stop": 0.5}
    with reattend.apply(second, "softpag", **softpag) as own:
        wanted = draw(second, **call, guidance_scale=guidance)
    draw(first, guidance_scale=before, num_inference_steps=12)
    with reattend.apply(first, "softpag", **softpag) as session:
        found = draw(second, **call, guidance_scale=guidance)
    assert torch.equal(found, wanted)
    assert session.applied == own.applied == call.get("num_inference_steps", 4) * call.get("strength", 1) // 2


def test_a_recipe_on_the_denoiser_alone_knows_the_halves_of_a_pipeline() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    with reattend.apply(pipe, "softpag"):
        wanted = draw(pipe)
    with reattend.apply(pipe.unet, "softpag"):
        assert torch.equal(draw(pipe), wanted)


Seen = list[tuple[int, int | None, tuple[str, ...]]]


def noting(pipe: Any, seen: Seen) -> Any:
    """A session that notes step, steps and halves of every pass, and changes nothing."""

    def note(call: Call) -> None:
        rows = {name: rows.tolist() for name, rows in call.clock.branches.items()}
        names = tuple(next((name for name in rows if rows[name][i]), "") for i in range(call.batch))
        seen.append((call.clock.step, call.clock.steps, names))

    denoiser = pipe if isinstance(pipe, torch.nn.Module) else pipe.unet
    table = reattend.sites(denoiser)[:1]
    return attach(pipe, [Plan("note", [Edits(table, lambda call: note(call) or HeadGain(factor=1.001))])])


HALVES = ("unconditional", "conditional")


def test_a_pipeline_with_a_perturbed_part_of_its_own() -> None:
    pipe, seen = tiny_pipelines.stable_diffusion(), []
    second, call = perturbed(pipe)
    with noting(pipe, seen):
        draw(second, **call, num_inference_steps=1)
        draw(second, **call, num_inference_steps=1, guidance_scale=1.0)
        draw(pipe, num_inference_steps=1)
    assert seen == [(0, 1, (*HALVES, "")), (0, 1, ("conditional", "")), (0, 1, HALVES)]
    # its processors cut the batch into parts by themselves
    for guidance in (GUIDANCE, 1.0):
        with pytest.raises(UnsupportedError, match="pag_scale=0"), reattend.apply(pipe, "softpag", layers=[0]):
            draw(second, **call, guidance_scale=guidance)
    pipe = tiny_pipelines.stable_diffusion()  # after an error a PAG pipeline leaves its processors where they are
    second, _ = perturbed(pipe)
    with reattend.apply(pipe, "softpag"):
        assert torch.equal(draw(second, pag_scale=0.0), draw(pipe))


def test_a_scheduler_that_is_exchanged_or_copied() -> None:
    pipe, seen = tiny_pipelines.stable_diffusion(), []
    second, call = img2img(pipe, scheduler=copy.deepcopy(pipe.scheduler))
    with noting(pipe, seen):
        draw(pipe, num_inference_steps=3)
        pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
        draw(pipe, num_inference_steps=2)
        draw(second, **call)
    assert [entry[:2] for entry in seen] == [(0, 3), (1, 3), (2, 3), (0, 2), (1, 2), (1, 2), *((i, 4) for i in range(4))]


def test_a_pipeline_that_runs_inside_another_ones_callback() -> None:
    pipe, seen = tiny_pipelines.stable_diffusion(), []
    second, call = img2img(pipe, scheduler=copy.deepcopy(pipe.scheduler))

    def preview(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            draw(second, **call, guidance_scale=1.0)
        return tensors

    with noting(pipe, seen):
        draw(pipe, num_inference_steps=3, callback_on_step_end=preview)
    assert seen == [(0, 3, HALVES), *((i, 4, ("conditional",)) for i in range(4)), (1, 3, HALVES), (2, 3, HALVES)]


def test_two_pipelines_in_two_threads() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    second, call = img2img(pipe, scheduler=copy.deepcopy(pipe.scheduler))
    jobs = [lambda **more: draw(pipe, **more), lambda **more: draw(second, **call, guidance_scale=1.0, **more)]
    meet = threading.Barrier(2, timeout=60)

    def in_turn(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        meet.wait()
        return tensors

    with reattend.apply(pipe, "softpag", stop=0.5):
        wanted = [job() for job in jobs]
        found: dict[int, Tensor] = {}

        def run(i: int) -> None:
            found[i] = jobs[i](callback_on_step_end=in_turn)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[i], wanted[i]) for i in range(2))


def test_a_session_begun_in_mid_run_knows_the_step() -> None:
    pipe, seen, sessions = tiny_pipelines.stable_diffusion(), [], []

    def begin(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            sessions.append(noting(pipe, seen))
        return tensors

    draw(pipe, callback_on_step_end=begin)
    sessions[0].remove()
    assert [entry[:2] for entry in seen] == [(1, 4), (2, 4), (3, 4)]


@pytest.mark.parametrize(
    ("schedule", "used", "timestep", "expected"),
    [
        ([9, 7, 5, 3], 4, 9.0, (0, 4)),
        ([9, 7, 5, 3], 2, 5.0, (0, 2)),  # strength, a refiner
        ([9, 7, 5, 3], 2, 9.0, (0, 2)),  # denoising_end
        ([9, 7, 5, 3], 2, 7.0, (0, 2)),  # both
        ([9, 7, 5, 3], None, 5.0, (0, 2)),  # a pipeline that does not say what it uses
        ([9, 7, 5, 3], 4, 5.0, (2, 4)),  # seen from its third step on
        ([9, 7, 5, 3], 3, 0.007, (0, 3)),  # timesteps on another scale
        ([1000, 500, 1], 3, 1.0, (0, 3)),  # AuraFlow's in thousandths: no second of the last one
        ([1000, 500, 1], None, 1.0, (0, 3)),
        ([999, 500, 1], 1, 1.0, (0, 1)),
        ([9, 7, 7, 5, 5], 5, 9.0, (0, 3)),  # second order: evaluated twice
        ([9, 7, 7, 5, 5], 3, 7.0, (0, 2)),
    ],
)
def test_the_part_of_a_schedule_that_a_run_uses(
    schedule: list[float], used: int | None, timestep: float, expected: tuple[int, int]
) -> None:
    step, counted = place(schedule, used, timestep)
    assert (step, len(counted)) == expected


class ModularPipeline:
    """Stands in for a modular pipeline: its guider makes one call for each of its predictions."""

    def __init__(self, unet: Any, guider: Any) -> None:
        self.unet, self.guider, self.scheduler = unet, guider, DDIMScheduler()

    def __call__(self, calls: list[Tensor], step: int, x: Tensor) -> None:
        self.guider.set_state(step=step, num_inference_steps=10, timestep=None)
        for text in calls:
            self.guider._count_prepared += 1
            self.unet(x, 900 - step, encoder_hidden_states=text)


@pytest.mark.parametrize(
    ("guider", "calls", "expected"),
    [
        (ClassifierFreeGuidance(), ["prompt_embeds", "negative_prompt_embeds"], ["conditional", "unconditional"]),
        (
            SkipLayerGuidance(skip_layer_guidance_layers=[0]),
            ["prompt_embeds", "negative_prompt_embeds", "prompt_embeds"],
            ["conditional", "unconditional", ""],
        ),
    ],
)
def test_a_modular_pipelines_guider(guider: Any, calls: list[str], expected: list[str]) -> None:
    unet, seen = tiny_pipelines.stable_diffusion().unet, []
    pipe, given = ModularPipeline(unet, guider), texts()
    with noting(unet, seen), torch.no_grad():
        for step in (3, 4):
            pipe([given[name] for name in calls], step, torch.randn(1, 4, 8, 8))
    assert seen == [(step, 10, (name,)) for step in (3, 4) for name in expected]


# -- loops of the user's own ---------------------------------------------------------------------------------------------


def loop(pipe: Any, predict: Callable[[Tensor, Any], tuple[Tensor, Tensor]], steps: int = 4, scheduler: Any = None) -> Tensor:
    scheduler = scheduler or pipe.scheduler
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 4, 8, 8, generator=seeded())
    with torch.no_grad():
        for t in scheduler.timesteps:
            positive, negative = predict(x, t)
            x = scheduler.step(negative + GUIDANCE * (positive - negative), t, x).prev_sample
    return x


def two_calls(pipe: Any, first: str = "prompt_embeds", told: bool = False) -> Callable[[Tensor, Any], tuple[Tensor, Tensor]]:
    def predict(x: Tensor, t: Any) -> tuple[Tensor, Tensor]:
        made = {}
        for name in sorted(texts(), key=lambda name: name != first):
            if told:
                with reattend.rows("conditional" if name == "prompt_embeds" else "unconditional"):
                    made[name] = pipe.unet(x, t, encoder_hidden_states=texts()[name]).sample
            else:
                made[name] = pipe.unet(x, t, encoder_hidden_states=texts()[name]).sample
        return made["prompt_embeds"], made["negative_prompt_embeds"]

    return predict


def one_call(pipe: Any) -> Callable[[Tensor, Any], tuple[Tensor, Tensor]]:
    def predict(x: Tensor, t: Any) -> tuple[Tensor, Tensor]:
        both = torch.cat([texts()["negative_prompt_embeds"], texts()["prompt_embeds"]])
        negative, positive = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=both).sample.chunk(2)
        return positive, negative

    return predict


def guided_by_pipeline(pipe: Any, **parameters: Any) -> Tensor:
    with reattend.apply(pipe, "softpag", **parameters):
        return draw(pipe)


@pytest.mark.parametrize("bare", [False, True])
def test_halves_in_two_calls_that_are_told(bare: bool) -> None:
    pipe = tiny_pipelines.stable_diffusion()
    wanted, plain = guided_by_pipeline(pipe), draw(pipe)
    with reattend.apply(pipe.unet if bare else pipe, "softpag"):
        found = loop(pipe, two_calls(pipe, told=True))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - plain).abs().max() > 20 * (found - wanted).abs().max()


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("first", ["prompt_embeds", "negative_prompt_embeds"])
def test_a_guide_refuses_halves_in_two_calls_that_nobody_tells(bare: bool, first: str) -> None:
    pipe = tiny_pipelines.stable_diffusion()
    with (
        reattend.apply(pipe.unet if bare else pipe, "softpag"),
        pytest.raises(ReattendError, match=r'which call is the conditional one is not known.*reattend.rows\("conditional"\)'),
    ):
        loop(pipe, two_calls(pipe, first))


def test_a_guide_refuses_the_unconditional_half_first() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    with pytest.raises(ReattendError, match="call the conditional half first"), reattend.apply(pipe, "softpag"):
        loop(pipe, two_calls(pipe, "negative_prompt_embeds", told=True))


def test_one_half_that_is_told_says_what_the_other_is() -> None:
    pipe, seen = tiny_pipelines.stable_diffusion(), []
    x = torch.randn(1, 4, 8, 8)
    with noting(pipe, seen), torch.no_grad():
        with reattend.rows("unconditional"):
            pipe.unet(x, 500, encoder_hidden_states=texts()["negative_prompt_embeds"])
        pipe.unet(x, 500, encoder_hidden_states=texts()["prompt_embeds"])
    assert [entry[2] for entry in seen] == [("unconditional",), ("conditional",)]


def test_halves_in_two_calls_without_a_guide_are_assumed_aloud_once() -> None:
    pipe, seen = tiny_pipelines.stable_diffusion(), []
    with (
        noting(pipe, seen),
        pytest.warns(ReattendWarning, match="first call of a step is taken as the conditional one") as said,
    ):
        loop(pipe, two_calls(pipe))
    assert len(said) == 1
    assert seen == [(i, 4, (name,)) for i in range(4) for name in ("conditional", "unconditional")]


@pytest.mark.parametrize("bare", [False, True])
def test_halves_in_one_call_are_assumed_aloud_once(bare: bool) -> None:
    pipe = tiny_pipelines.stable_diffusion()
    wanted = guided_by_pipeline(pipe)
    with (
        reattend.apply(pipe.unet if bare else pipe, "softpag"),
        pytest.warns(ReattendWarning, match="taken as the two halves") as said,
    ):
        found = loop(pipe, one_call(pipe))
    assert len(said) == 1
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_prompts_on_one_noise_are_told_apart_from_halves() -> None:
    pipe, seen = tiny_pipelines.stable_diffusion(), []
    x = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1)
    with noting(pipe, seen), reattend.rows("conditional"), torch.no_grad():
        pipe.unet(x, 500, encoder_hidden_states=texts(2)["prompt_embeds"])
    assert seen == [(0, None, ("conditional", "conditional"))]
    with reattend.apply(pipe, "softpag"), pytest.warns(ReattendWarning, match="taken as the two halves"), torch.no_grad():
        pipe.unet(x, 500, encoder_hidden_states=texts(2)["prompt_embeds"])
        with pytest.raises(ReattendError, match="looks like"):
            pipe.unet(torch.randn(2, 4, 8, 8), 400, encoder_hidden_states=texts(2)["prompt_embeds"])


def only_positive(pipe: Any) -> Callable[[Tensor, Any], tuple[Tensor, Tensor]]:
    def predict(x: Tensor, t: Any) -> tuple[Tensor, Tensor]:
        return (pipe.unet(x, t, encoder_hidden_states=texts()["prompt_embeds"]).sample,) * 2

    return predict


def test_a_loop_believes_the_pipelines_schedule_while_it_keeps_to_it() -> None:
    pipe, seen = tiny_pipelines.stable_diffusion(), []
    draw(pipe, num_inference_steps=3)  # what the pipeline did last says nothing of the loops
    other = DDIMScheduler(clip_sample=False, steps_offset=1)
    with noting(pipe, seen):
        loop(pipe, only_positive(pipe))
        for t in pipe.scheduler.timesteps:  # the same schedule again
            only_positive(pipe)(torch.randn(1, 4, 8, 8), t)
        loop(pipe, only_positive(pipe), steps=5, scheduler=other)
    believed = [(i, 4, ("conditional",)) for i in range(4)]
    assert seen == [*believed, *believed, *((i, None, ("conditional",)) for i in range(5))]


def test_what_rows_takes() -> None:
    with pytest.raises(ReattendError, match=r'rows\(\) takes "conditional"'), reattend.rows("positive"):
        pass
    with pytest.raises(ReattendError, match="one for each part"), reattend.rows():
        pass
    pipe, seen = tiny_pipelines.stable_diffusion(), []
    x, text = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 16)
    with noting(pipe, seen), torch.no_grad():
        with reattend.rows("conditional", "unconditional"), pytest.raises(ReattendError, match="2 equal parts, .* has 3 rows"):
            pipe.unet(x, 500, encoder_hidden_states=text)
        with reattend.rows("conditional", "neither", "unconditional"):
            thread = threading.Thread(target=lambda: pipe.unet(x, 400, encoder_hidden_states=text))
            thread.start()
            thread.join()
            pipe.unet(x, 500, encoder_hidden_states=text)
    assert [entry[2] for entry in seen] == [("conditional",) * 3, ("conditional", "", "unconditional")]


# -- guides beside edits of conditional rows -----------------------------------------------------------------------------


def test_rows_of_a_guides_branch_are_conditional_rows() -> None:
    pipe = tiny_pipelines.stable_diffusion()

    def louder(call: Call) -> HeadGain | None:
        rows = call.clock.rows("conditional", call.batch)
        return None if rows is None else HeadGain(factor=3.0, rows=rows[:, None])

    plan = Plan("louder", [Edits(reattend.sites(pipe).stack("denoiser").kind("cross"), louder)])
    plain = draw(pipe)
    with attach(pipe, [plan]):
        alone = draw(pipe)
        with reattend.apply(pipe, "softpag", strength=1e-6):
            beside = draw(pipe)
    assert (beside - alone).norm() < 1e-3 * (alone - plain).norm()
