"""PAG against diffusers' own PAG pipelines: the same pictures; and its scale by the scheduler's timestep, whatever the denoiser is told."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import reattend
import tiny_prompts
import tiny_runs
import torch
from reattend.hooks import Guide, Plan, attach
from reattend.interventions import Clock, ReattendError
from reattend.recipes.kit.guidance import rescaled
from tiny_denoisers import build
from torch import Tensor


def of_the_same_parts(cls: str, pipe: Any, layers: str, **more: Any) -> Any:
    known = inspect.signature(getattr(diffusers, cls).__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in known}
    return tiny_prompts.quiet(getattr(diffusers, cls)(**parts, pag_applied_layers=layers, **more))


def pixart_sigma() -> tuple[Any, dict[str, Any]]:
    pipe, call = tiny_prompts.pixart()
    parts = pipe.components
    return tiny_prompts.quiet(diffusers.PixArtSigmaPipeline(**parts)), {
        **call,
        "clean_caption": False,
        "height": 64,
        "width": 64,
    }


def hunyuan_dit() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(3)
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    model = build("HunyuanDiT2DModel")[0]
    pipe = diffusers.HunyuanDiTPipeline(None, None, None, model, scheduler, None, None, False, None, None)  # type: ignore[arg-type]
    call: dict[str, Any] = {"prompt": None, "height": 64, "width": 64, "use_resolution_binning": False}
    for sign in ("", "negative_"):
        for more, length in (("", 3), ("_2", 2)):
            call[f"{sign}prompt_embeds{more}"] = torch.randn(1, length, 8)
            call[f"{sign}prompt_attention_mask{more}"] = torch.ones(1, length, dtype=torch.long)
    return tiny_prompts.quiet(pipe), call


def sana() -> tuple[Any, dict[str, Any]]:
    pipe, call = tiny_prompts.sana()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return pipe, {**call, "latents": latents, "complex_human_instruction": None}


def animate_diff() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(3)
    motion = build("UNetMotionModel")[0]
    pipe = diffusers.AnimateDiffPipeline(
        None, tiny_prompts.clip(), tiny_prompts.tiny_pipelines.tokenizer(), motion, None, diffusers.DDIMScheduler(clip_sample=False)  # type: ignore[arg-type]
    )  # fmt: skip
    text = {"prompt_embeds": torch.randn(1, 5, 8), "negative_prompt_embeds": torch.randn(1, 5, 8), "prompt": None}
    return tiny_prompts.quiet(pipe), {"height": 64, "width": 64, "num_frames": 3, **text}


def from_a_picture(make: Callable[[], tuple[Any, dict[str, Any]]], cls: str, **more: Any) -> tuple[Any, dict[str, Any]]:
    """Another pipeline of the same parts, which begins at a picture: the first part of the schedule is left out."""
    pipe, call = make()
    taken = inspect.signature(getattr(diffusers, cls).__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in taken}
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    checker = {"requires_safety_checker": False} if "requires_safety_checker" in taken else {}
    pipe = tiny_prompts.quiet(getattr(diffusers, cls)(**parts, **checker))
    return pipe, {**call, "image": picture, "strength": 0.7, "num_inference_steps": 5, **more}


def image_to_image() -> tuple[Any, dict[str, Any]]:
    return from_a_picture(tiny_prompts.sd, "StableDiffusionImg2ImgPipeline")


def inpainting() -> tuple[Any, dict[str, Any]]:
    mask = (torch.arange(16) < 8).float().expand(1, 1, 16, 16)
    return from_a_picture(tiny_prompts.sd, "StableDiffusionInpaintPipeline", mask_image=mask, height=16, width=16)


def sd3_from_a_picture() -> tuple[Any, dict[str, Any]]:
    return from_a_picture(tiny_prompts.sd3, "StableDiffusion3Img2ImgPipeline")


# a pipeline, diffusers' own with PAG, its words for some layers, and their numbers here
CASES: dict[str, tuple[Callable[[], tuple[Any, dict[str, Any]]], str, str, list[int] | None]] = {
    "SD": (tiny_prompts.sd, "StableDiffusionPAGPipeline", "mid", [1]),
    "SD, down and up": (tiny_prompts.sd, "StableDiffusionPAGPipeline", "down|up", [0, 2, 3]),
    "SD, image to image": (image_to_image, "StableDiffusionPAGImg2ImgPipeline", "mid", [1]),
    "SD, inpainting": (inpainting, "StableDiffusionPAGInpaintPipeline", "mid", [1]),
    "SD3, image to image": (sd3_from_a_picture, "StableDiffusion3PAGImg2ImgPipeline", "blocks.1", None),
    "SDXL": (tiny_prompts.sdxl, "StableDiffusionXLPAGPipeline", "mid", [1]),
    "SD3": (tiny_prompts.sd3, "StableDiffusion3PAGPipeline", "blocks.1", None),
    "SD3, two layers": (tiny_prompts.sd3, "StableDiffusion3PAGPipeline", "blocks.(0|2)", [0, 2]),
    "PixArt": (pixart_sigma, "PixArtSigmaPAGPipeline", "blocks.1", None),
    "HunyuanDiT": (hunyuan_dit, "HunyuanDiTPAGPipeline", "blocks.1", None),
    "Sana": (sana, "SanaPAGPipeline", "transformer_blocks.1", [1]),
    "AnimateDiff": (animate_diff, "AnimateDiffPAGPipeline", "mid_block.*attentions.*attn1", [1]),
}
# what diffusers' own pipelines cannot do: PixArt's compares a timestep for each row with a number, HunyuanDiT's makes one row too few
BROKEN = {
    ("PixArt", "adaptive"),
    ("PixArt", "adaptive, no guidance"),
    ("HunyuanDiT", "no guidance"),
    ("HunyuanDiT", "adaptive, no guidance"),
}
RESCALE = ("SD", "SD, down and up", "SDXL", "HunyuanDiT")
CONDITIONS = {
    "guidance": {"guidance_scale": 4.0},
    "no guidance": {"guidance_scale": 1.0},
    "adaptive": {"guidance_scale": 4.0, "pag_adaptive_scale": 0.004},
    "adaptive, no guidance": {"guidance_scale": 1.0, "pag_adaptive_scale": 0.004},
    "rescaled": {"guidance_scale": 4.0, "pag_adaptive_scale": 0.002, "guidance_rescale": 0.7},
}


def drawn(pipe: Any, call: dict[str, Any], **more: Any) -> Tensor:
    given = {"prompt": "a red circle", "num_inference_steps": 3, "output_type": "latent", **call, **more}
    output = pipe(**given, generator=torch.Generator().manual_seed(7))
    return output.frames if hasattr(output, "frames") else output.images


@pytest.mark.parametrize(
    ("name", "condition"),
    [
        (name, condition)
        for name in CASES
        for condition, said in CONDITIONS.items()
        if (name, condition) not in BROKEN and ("guidance_rescale" not in said or name in RESCALE)
    ],
)
def test_the_pictures_of_diffusers_own_pipelines(name: str, condition: str) -> None:
    make, cls, words, layers = CASES[name]
    pipe, call = make()
    said = dict(CONDITIONS[condition])
    adaptive = said.pop("pag_adaptive_scale", 0.0)
    more = {"requires_safety_checker": False} if cls.startswith(("StableDiffusionPAG", "Hunyuan")) else {}
    official = of_the_same_parts(cls, pipe, words, **more)
    wanted = drawn(official, call, **said, pag_scale=3.0, pag_adaptive_scale=adaptive)
    plain = drawn(pipe, call, **said)
    with reattend.apply(pipe, "pag", scale=3.0, adaptive=adaptive, layers=layers) as session:
        got = drawn(pipe, call, **said)
    assert session.applied > 0
    size = wanted.norm()
    assert (got - wanted).norm() < 1e-5 * size and (plain - wanted).norm() > 1e-3 * size
    assert torch.equal(drawn(pipe, call, **said), plain)


# -- the scheduler's timestep --------------------------------------------------------------------------------------------


def clocks(pipe: Any, call: dict[str, Any], **more: Any) -> list[Clock]:
    """The clocks of a run's passes, as a guide's scale is given them."""
    seen: list[Clock] = []

    def look(clock: Clock) -> float:
        seen.append(clock)
        return 0.0

    with attach(pipe, [Plan("look", [Guide("look", look)])]):
        drawn(pipe, call, **more)
    return seen


@pytest.mark.parametrize(
    "name", ["SD", "SDXL", "SD3", "Flux", "PixArt", "AuraFlow", "Sana", "Lumina2", "QwenImage", "Wan", "CogVideoX"]
)
def test_the_scheduler_s_timestep_is_known_however_the_denoiser_counts(name: str) -> None:
    pipe, call = tiny_prompts.FAMILIES[name]()
    seen = clocks(pipe, call)
    wanted = pipe.scheduler.timesteps.tolist()
    assert list(dict.fromkeys(clock.scheduled for clock in seen)) == wanted and len(wanted) == 3
    told = {
        "Flux": lambda t: t / 1000,
        "AuraFlow": lambda t: t / 1000,
        "QwenImage": lambda t: t / 1000,
        "Lumina2": lambda t: 1 - t / 1000,
    }
    convert = told.get(name, lambda t: t)
    for clock in seen:
        assert clock.timestep == pytest.approx(convert(clock.scheduled), abs=1e-5)


@pytest.mark.parametrize("name", ["Flux", "Lumina2"])
def test_adaptive_scale_where_timesteps_are_no_thousands(name: str) -> None:
    """p_t = max(0, p - a (1000 - t)): as with the scale of each step given by hand."""
    pipe, call = tiny_prompts.FAMILIES[name]()
    scale = 3.0, 0.006
    with reattend.apply(pipe, "pag", scale=scale[0], adaptive=scale[1]):
        got = drawn(pipe, call)
    timesteps = pipe.scheduler.timesteps.tolist()
    recipe = reattend.recipe("pag", scale=scale[0])
    plan = [step for step in recipe.plan(reattend.sites(pipe)) if not isinstance(step, Guide)]
    by_hand = Guide("pag", lambda clock: max(0.0, scale[0] - scale[1] * (1000 - timesteps[clock.step])))
    with attach(pipe, [Plan("pag", [*plan, by_hand])]):
        wanted = drawn(pipe, call)
    with reattend.apply(pipe, "pag", scale=scale[0]):
        constant = drawn(pipe, call)
    assert torch.equal(got, wanted) and not torch.equal(got, constant)


def test_image_to_image_and_two_calls_a_step_know_it_too() -> None:
    pipe, call, _, _ = tiny_runs.stable_diffusion()
    heun = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = heun
    seen = clocks(pipe, call)
    assert [clock.scheduled for clock in seen] == [clock.timestep for clock in seen]
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    tiny_prompts.quiet(other)
    seen = clocks(other, {"image": torch.rand(1, 3, 16, 16), "prompt": "a"}, num_inference_steps=6, strength=0.5)
    assert [clock.scheduled for clock in seen] == other.scheduler.timesteps.tolist()[-3:]


def test_adaptive_needs_a_schedule() -> None:
    model, inputs = build("UNet2DConditionModel")
    with (
        reattend.apply(model, "pag", adaptive=0.001),
        pytest.raises(ReattendError, match="adaptive needs the scheduler's timestep"),
    ):
        model(**inputs)
    with reattend.apply(model, "pag"):
        model(**inputs)


def test_a_loop_of_one_s_own_counts_by_the_pipeline_s_scheduler() -> None:
    pipe, _, _, _ = tiny_runs.stable_diffusion()
    _, inputs = build("UNet2DConditionModel")
    pipe.scheduler.set_timesteps(4)
    inputs = {"sample": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 16)}
    asked = []
    with attach(pipe, [Plan("look", [Guide("look", lambda clock: asked.append(clock.scheduled) or 0.0)])]):
        for timestep in pipe.scheduler.timesteps:
            pipe.unet(timestep=timestep, **inputs)
    assert asked == pipe.scheduler.timesteps.tolist()


def test_a_loop_in_thousandths_begins_at_its_beginning() -> None:
    """AuraFlow's schedule ends at 1, and its denoiser is told 1.0 at the first step."""
    pipe, _ = tiny_prompts.aura_flow()
    _, inputs = build("AuraFlowTransformer2DModel")
    pipe.scheduler.set_timesteps(3)
    seen: list[Clock] = []
    with attach(pipe, [Plan("look", [Guide("look", lambda clock: seen.append(clock) or 0.0)])]):
        for timestep in pipe.scheduler.timesteps:
            pipe.transformer(**{**inputs, "timestep": timestep.expand(2) / 1000})
    assert [clock.scheduled for clock in seen] == pipe.scheduler.timesteps.tolist()
    assert [(clock.step, clock.steps) for clock in seen] == [(0, 3), (1, 3), (2, 3)]


# -- rescale -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_rescale_is_that_of_diffusers(guidance: float) -> None:
    from types import SimpleNamespace

    from diffusers.guiders.guider_utils import rescale_noise_cfg

    torch.manual_seed(0)
    unconditional, conditional, branch = torch.randn(3, 2, 4, 8, 8)
    x = unconditional + guidance * (conditional - unconditional)
    seen = SimpleNamespace(conditional=conditional, branch=branch, unconditional=unconditional, scale=3.0, guidance=guidance)
    wanted = rescale_noise_cfg(x + 3.0 * (conditional - branch), conditional, 0.7)
    torch.testing.assert_close(x + rescaled(seen, 0.7), wanted, atol=1e-5, rtol=1e-5)  # type: ignore[arg-type]


def test_scopes_of_a_joint_stream() -> None:
    """Each gives another picture, and softpag at full strength the same one."""
    pipe, call = tiny_prompts.sd3()
    pictures = {}
    for scope in ("masked", "image", "all"):
        with reattend.apply(pipe, "pag", scope=scope):
            pictures[scope] = drawn(pipe, call)
    assert not torch.equal(pictures["masked"], pictures["image"]) and not torch.equal(pictures["image"], pictures["all"])
    with reattend.apply(pipe, "softpag", scale=3.0, strength=1.0, scope="masked"):
        assert torch.equal(drawn(pipe, call), pictures["masked"])
