"""The latents door: a pipeline's own result is that of a loop that changes what the scheduler holds, and nothing is left on the scheduler."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import tiny_denoisers
import tiny_pipelines
import tiny_runs
import torch
from reattend.hooks import AtStep, Capture, Guide, Latents, Plan, Words, attach, sites
from reattend.hooks.tokens.latents import place_of
from reattend.hooks.trackers.scheduler import drops
from reattend.interventions import ReattendError, UnsupportedError
from tiny_llama import tiny_llama, traces
from torch import Tensor, nn

SCHEDULERS: dict[str, Callable[[], Any]] = {
    "Euler": lambda: diffusers.EulerDiscreteScheduler(),
    "Euler ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
    "Heun": lambda: diffusers.HeunDiscreteScheduler(),
    "KDPM2": lambda: diffusers.KDPM2DiscreteScheduler(),
    "LMS": lambda: diffusers.LMSDiscreteScheduler(),
    "EDM": lambda: diffusers.EDMEulerScheduler(sigma_max=14.0),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(),
    "PNDM": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "PNDM, Runge-Kutta first": lambda: diffusers.PNDMScheduler(skip_prk_steps=False),
    "DDIM, eta 1": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "DPM++ singlestep": lambda: diffusers.DPMSolverSinglestepScheduler(),
}
STEPS = 4
pytestmark = pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")


def change(latents: Tensor, step: int) -> Tensor:
    return 0.9 * latents + 0.3 * torch.sin(latents + step)


def seeded(number: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(3))


def parts(pipe: Any, **more: Any) -> dict[str, Any]:
    own = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    return {**own, "requires_safety_checker": False, **more}


def made(kind: type, **components: Any) -> Any:
    pipe = kind(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_scheduler(scheduler: Any) -> Any:
    return made(diffusers.StableDiffusionPipeline, **parts(tiny_pipelines.stable_diffusion(), scheduler=scheduler))


def draw(pipe: Any, **more: Any) -> Tensor:
    call = {"prompt": "a b", "negative_prompt": "c", "num_inference_steps": STEPS, "guidance_scale": 3.0}
    return pipe(**{**call, "latents": noise(1, 4, 8, 8), "output_type": "latent", "generator": seeded(), **more}).images


def changing(pipe: Any, after: Any = None, first: int = 0, function: Any = change) -> Any:
    def before(at: AtStep) -> Tensor | None:
        return function(at.latents, at.clock.step) if at.clock.step >= first else None

    return attach(pipe, [Plan("change", [Latents(before, after)])])


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


# -- right values -------------------------------------------------------------------------------------------------------


def by_hand(pipe: Any, scheduler: Any, returned: list[Tensor], **step: Any) -> Tensor:
    """The pipeline's loop written out, which changes what the scheduler holds; a change that it would drop comes at the next call."""
    with torch.no_grad():
        positive, negative = pipe.encode_prompt("a b", "cpu", 1, True, "c")
        texts = torch.cat([negative, positive])
        scheduler.set_timesteps(STEPS)
        x, last, number, waiting = noise(1, 4, 8, 8) * scheduler.init_noise_sigma, None, -1, []
        if "generator" in inspect.signature(scheduler.step).parameters:
            step["generator"] = seeded()
        for t in scheduler.timesteps:
            # second evaluations of KDPM2 have timesteps of their own
            second = "KDPM2" in type(scheduler).__name__ and drops(scheduler)
            if float(t) != last and not second:
                last, number = float(t), number + 1
                waiting.append(number)
            if not drops(scheduler):
                while waiting:
                    x = change(x, waiting.pop(0))
            predicted = pipe.unet(scheduler.scale_model_input(torch.cat([x] * 2), t), t, encoder_hidden_states=texts).sample
            negative, positive = predicted.chunk(2)
            x = scheduler.step(negative + 3.0 * (positive - negative), t, x, **step).prev_sample
            if not drops(scheduler):
                returned.append(x)
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_pipelines_result_is_that_of_a_loop_that_changes_the_schedulers_latents(name):
    pipe = with_scheduler(SCHEDULERS[name]())
    more = {"eta": 1.0} if "eta" in name else {}
    returned: list[Tensor] = []
    plain = draw(pipe, **more)
    wanted = by_hand(pipe, copy.deepcopy(pipe.scheduler), wanted_returned := [], **more)
    with changing(pipe, lambda at: returned.append(at.latents)) as session:
        found = draw(pipe, **more)
    assert session.stats == {"change": {"latents": STEPS if "Runge" not in name else 7}}
    assert off(found, wanted) < 2e-6 and off(plain, wanted) > 0.1
    # what steps returned, the last one too, whole steps only
    assert torch.equal(returned[-1], found) and len(returned) in (len(wanted_returned), len(wanted_returned) + 1)
    assert all(off(a, b) < 2e-6 for a, b in zip(returned, wanted_returned, strict=False))
    assert torch.equal(draw(pipe, **more), plain)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "DPM++ singlestep"])
def test_what_a_scheduler_drops_is_what_it_does_not_look_at(name):
    """A `step` that gives the same for another sample, but for rounding, has thrown it away.

    Singlestep solvers are left out: a part of the sample stays in what they predict.
    """
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(STEPS)
    x, second = noise(1, 4, 8, 8) * scheduler.init_noise_sigma, 0
    for number, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, t)
        predicted = torch.randn(1, 4, 8, 8, generator=seeded(number))
        given = {"generator": seeded()} if "generator" in inspect.signature(scheduler.step).parameters else {}
        other = copy.deepcopy(scheduler).step(predicted, t, x + 1, **given).prev_sample
        if given:
            given["generator"] = seeded()
        before, dropped = x, drops(scheduler)
        x = scheduler.step(predicted, t, x, **given).prev_sample
        assert (float((x - other).abs().max()) < 1e-3) == dropped and before is not x
        second += dropped
    assert second == {"Heun": 3, "KDPM2": 3, "PNDM": 1, "PNDM, Runge-Kutta first": 9}.get(name, 0)


def by_callback(pipe: Any, run: Callable[..., Tensor], **more: Any) -> Tensor:
    """The pipeline's own way to change the latents, between its steps: none before the first one."""
    step = 0

    def at_end(own: Any, i: int, t: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal step
        if drops(own.scheduler) or i + 1 == own.num_timesteps:
            return given
        step += 1
        return {"latents": change(given["latents"], step)}

    return run(pipe, callback_on_step_end=at_end, **more)


PICTURE = torch.rand(1, 3, 16, 16, generator=seeded(7))
MASK = {"image": PICTURE, "mask_image": PICTURE[:, :1].round(), "height": 16, "width": 16, "latents": None}


def sd3(scheduler: Any = None) -> tuple[Any, dict[str, Any]]:
    pipe = tiny_pipelines.stable_diffusion_3()
    pipe.scheduler = scheduler or pipe.scheduler
    return pipe, {"height": 16, "width": 16}


def flux() -> tuple[Any, dict[str, Any]]:
    texts = {name: noise(1, 5, 8) for name in ("prompt_embeds", "negative_prompt_embeds")}
    texts["negative_prompt_embeds"] = -texts["prompt_embeds"]
    pooled = {name: noise(1, 8) for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}
    call = {
        "prompt": None,
        "negative_prompt": None,
        "true_cfg_scale": 3.0,
        "height": 16,
        "width": 16,
        "latents": noise(1, 16, 16),
    }
    return tiny_pipelines.flux(), {**call, **texts, **pooled}


def kontext() -> tuple[Any, dict[str, Any]]:
    pipe, call = flux()
    own = made(diffusers.FluxKontextPipeline, **parts_of_flux(pipe))
    return own, {**call, "image": PICTURE, "max_area": 256, "_auto_resize": False, "latents": noise(1, 16, 16)}


def parts_of_flux(pipe: Any) -> dict[str, Any]:
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
    return {name: getattr(pipe, name) for name in names}


def img2img() -> tuple[Any, dict[str, Any]]:
    own = parts(tiny_pipelines.stable_diffusion(), scheduler=diffusers.EulerDiscreteScheduler())
    call = {"image": PICTURE, "strength": 0.5, "num_inference_steps": 2 * STEPS, "latents": None}
    return made(diffusers.StableDiffusionImg2ImgPipeline, **own), call


def inpaint(channels: int) -> tuple[Any, dict[str, Any]]:
    own = parts(tiny_pipelines.stable_diffusion(channels), scheduler=diffusers.EulerDiscreteScheduler())
    return made(diffusers.StableDiffusionInpaintPipeline, **own), {**MASK, "strength": 1.0}


def controlled(**more: Any) -> tuple[Any, dict[str, Any]]:
    own = parts(tiny_pipelines.stable_diffusion(), controlnet=tiny_pipelines.controlnet())
    return made(diffusers.StableDiffusionControlNetPipeline, **own), {"image": PICTURE, **more}


def controlled_twice() -> tuple[Any, dict[str, Any]]:
    both = [tiny_pipelines.controlnet(), tiny_pipelines.controlnet()]
    own = parts(tiny_pipelines.stable_diffusion(), controlnet=both)
    return made(diffusers.StableDiffusionControlNetPipeline, **own), {"image": [PICTURE, PICTURE]}


PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "Stable Diffusion 3, flow Euler": sd3,
    "Stable Diffusion 3, flow Heun": lambda: sd3(diffusers.FlowMatchHeunDiscreteScheduler()),
    "Flux, true guidance in two calls": flux,
    "Flux Kontext, tokens of another image": kontext,
    "img2img": img2img,
    "inpaint, 4 channels": lambda: inpaint(4),
    "inpaint, 9 channels": lambda: inpaint(9),
    "ControlNet": controlled,
    "two ControlNets": controlled_twice,
}


def run(pipe: Any, **more: Any) -> Tensor:
    call = {name: value for name, value in more.items() if value is not None or name in ("prompt", "negative_prompt")}
    if more.get("latents", 0) is None:
        call["latents"] = None
    return draw(pipe, **call)


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_of_all_kinds_give_what_their_own_callback_gives(name):
    pipe, call = PIPELINES[name]()
    plain, wanted = run(pipe, **call), by_callback(pipe, run, **call)
    with changing(pipe, first=1) as session:
        found = run(pipe, **call)
    assert off(found, wanted) < 2e-6 and off(plain, wanted) > 0.05
    assert session.stats == {"change": {"latents": STEPS - 1}}
    assert torch.equal(run(pipe, **call), plain)


@pytest.mark.parametrize("name", ["Stable Diffusion 3, flow Euler", "Flux, true guidance in two calls", "ControlNet"])
def test_a_change_before_the_first_step_is_that_of_the_noise(name):
    pipe, call = PIPELINES[name]()
    start = call.get("latents", noise(1, 4, 8, 8))
    wanted = run(pipe, **{**call, "latents": change(start, 0)})
    with attach(pipe, [Plan("first", [Latents(lambda at: change(at.latents, 0) if at.clock.step == 0 else None)])]):
        found = run(pipe, **{**call, "latents": start})
    assert off(found, wanted) < 2e-6


def test_rows_are_images_whatever_the_halves():
    """A change of one picture of two leaves the other one's bits."""
    pipe = with_scheduler(diffusers.EulerDiscreteScheduler())
    call = {"prompt": ["a b", "d"], "negative_prompt": ["c", "c"], "latents": noise(2, 4, 8, 8)}
    plain = draw(pipe, **call)

    def second(latents: Tensor, step: int) -> Tensor:
        assert latents.shape == (2, 4, 8, 8)
        return torch.cat([latents[:1], change(latents[1:], step)])

    with changing(pipe, function=second):
        found = draw(pipe, **call)
    assert torch.equal(found[:1], plain[:1]) and off(found[1:], plain[1:]) > 0.1


def test_a_step_returns_what_it_is_told():
    pipe, scheduler = tiny_pipelines.stable_diffusion(), None
    with attach(pipe, [Plan("told", [Latents(after=lambda at: torch.full_like(at.latents, float(at.clock.step)))])]) as session:
        found = draw(pipe)
    assert torch.equal(found, torch.full_like(found, STEPS - 1.0)) and session.stats == {"told": {"latents": STEPS}}
    assert scheduler is None


def test_two_changes_act_in_the_order_of_their_sessions_and_reading_changes_nothing():
    pipe, seen = with_scheduler(diffusers.EulerDiscreteScheduler()), []
    plain = draw(pipe)
    with changing(pipe, function=lambda x, i: seen.append(x)) as session:
        assert torch.equal(draw(pipe), plain)
    assert len(seen) == STEPS and session.applied == 0
    with changing(pipe, function=lambda x, i: change(change(x, i), 7)):
        wanted = draw(pipe)
    with changing(pipe), changing(pipe, function=lambda x, i: change(x, 7)):
        assert torch.equal(draw(pipe), wanted)
    with changing(pipe, function=lambda x, i: x.mul_(0.5)):
        in_place = draw(pipe)
    with changing(pipe, function=lambda x, i: x * 0.5):
        assert torch.equal(draw(pipe), in_place)


def test_half_precision_denoisers_see_rounded_latents_and_the_scheduler_keeps_its_digits():
    pipe, call = sd3()
    pipe.to(torch.bfloat16)
    wanted = by_callback(pipe, run, **call)
    with changing(pipe, first=1):
        found = run(pipe, **call)
    assert found.dtype == wanted.dtype and off(found.float(), wanted.float()) < 1e-2


# -- further passes -----------------------------------------------------------------------------------------------------


def test_predict_is_a_pass_with_the_arguments_of_the_call():
    pipe, found, texts = tiny_pipelines.stable_diffusion(), {}, noise(1, 5, 16)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    plain = draw(pipe)

    def look(at: AtStep) -> None:
        if at.clock.step == 1:
            x, steps = at.latents + 1, at.scheduler.timesteps
            found["x"], found["t"], found["scheduler"] = x, steps, copy.copy(at.scheduler)
            found["all"] = at.predict(x)
            found["conditional"] = at.predict(x, text="conditional")
            found["other"] = at.predict(x, text={"encoder_hidden_states": texts}, timestep=steps[3])

    with attach(pipe, [Plan("look", [Latents(look)])]):
        assert torch.equal(draw(pipe), plain)
    with torch.no_grad():
        positive, negative = pipe.encode_prompt("a b", "cpu", 1, True, "c")
        x, t, scheduler = found["x"], found["t"], found["scheduler"]

        def predicted(text: Tensor, at: int) -> Tensor:
            sigma = scheduler.sigmas[at]
            return pipe.unet(x / (sigma**2 + 1) ** 0.5, t[at], encoder_hidden_states=text).sample

        assert torch.allclose(found["all"], torch.cat([predicted(negative, 1), predicted(positive, 1)]), atol=1e-5)
        assert torch.allclose(found["conditional"], predicted(positive, 1), atol=1e-5)
        assert torch.allclose(found["other"], predicted(texts, 3), atol=1e-5)


def test_other_timesteps_are_scaled_for_themselves_where_a_run_begins_midway():
    """Image to image tells the scheduler where it begins, which is of no account to passes at other timesteps."""
    pipe, found = tiny_pipelines.stable_diffusion(), {}
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)

    def look(at: AtStep) -> None:
        if at.clock.step == 0:
            place = len(at.scheduler.timesteps) - 2
            found["t"], found["sigma"] = at.scheduler.timesteps[place], at.scheduler.sigmas[place]
            found["x"] = at.latents
            found["other"] = at.predict(at.latents, timestep=float(found["t"]), text="conditional")

    with attach(pipe, [Plan("look", [Latents(look)])]):
        pipe("a b", image=torch.rand(1, 3, 16, 16), num_inference_steps=6, strength=0.8, output_type="latent")
    with torch.no_grad():
        text, _ = pipe.encode_prompt("a b", "cpu", 1, False)
        x = found["x"] / (found["sigma"] ** 2 + 1) ** 0.5
        wanted = pipe.unet(x, found["t"], encoder_hidden_states=text).sample
    assert torch.allclose(found["other"], wanted, atol=1e-5)


def test_a_part_of_the_rows_cannot_run_where_a_pipeline_perturbs_a_part_of_its_own():
    kind, own = diffusers.StableDiffusionPAGPipeline, parts(tiny_pipelines.stable_diffusion())
    pipe = made(kind, **own, pag_applied_layers="mid")
    with attach(pipe, [Plan("look", [Latents(lambda at: at.look(at.latents))])]):
        draw(pipe, pag_scale=2.0)
    with attach(pipe, [Plan("look", [Latents(lambda at: at.look(at.latents, text="conditional"))])]):
        draw(pipe, pag_scale=0.0)
        with pytest.raises(
            ReattendError, match="look on StableDiffusionPAGPipeline: .*pag_scale=0, or use the pipeline without PAG"
        ):
            draw(pipe, pag_scale=2.0)


@pytest.mark.parametrize("name", ["Flux", "Lumina 2"])
def test_other_timesteps_are_given_in_the_denoisers_own_units(name):
    torch.manual_seed(2)
    if name == "Flux":
        pipe, call, _, _ = tiny_runs.flux()
        wanted = lambda t: t / 1000  # noqa: E731
    else:
        model, _ = tiny_denoisers.build("Lumina2Transformer2DModel")
        own = {"vae": tiny_pipelines.vae(4, shift_factor=0.0), "text_encoder": None, "tokenizer": None}
        pipe = made(diffusers.Lumina2Pipeline, transformer=model, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **own)
        texts = {"prompt_embeds": noise(1, 5, 8), "prompt_attention_mask": torch.ones(1, 5, dtype=torch.bool)}
        call = {**texts, **{f"negative_{key}": value for key, value in texts.items()}, "height": 32, "width": 32}
        # 1000, 750, 500, 250: also the other way round
        wanted = lambda t: 1 - t / 1000  # noqa: E731
    given: list[float] = []

    def look(at: AtStep) -> None:
        for t in at.scheduler.timesteps.tolist():
            at.predict(at.latents, timestep=t)
            assert given[-1] == pytest.approx(wanted(t))

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given.append(float(kwargs["timestep"].flatten()[0]))

    hook = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    with attach(pipe, [Plan("x", [Latents(look)])]):
        tiny_runs.draw(pipe, call, num_inference_steps=4)
    hook.remove()
    assert len(given) > 16


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", ["UNet", "DiT", "two calls", "ControlNet"])
def test_gradients_with_respect_to_the_latents_are_those_of_a_hand_written_pass(kind, inference):
    pipe, call = {
        "UNet": lambda: (tiny_pipelines.stable_diffusion(), {}),
        "DiT": sd3,
        "two calls": flux,
        "ControlNet": controlled,
    }[kind]()
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    kept: dict[str, Any] = {}

    def remember(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # the pass that counts, whose arguments the hand-written one takes
        if not torch.is_grad_enabled():
            kept["call"] = (args, kwargs)

    def look(at: AtStep) -> None:
        if at.clock.step == 2:
            kept["x"] = at.latents
            loss, kept["found"] = at.gradient(lambda x: at.predict(x, text="conditional", grad=True).square().sum(), at.latents)
            assert loss > 0 and not loss.requires_grad
            kept["clock"] = at.clock

    with attach(pipe, [Plan("look", [Latents(look)])]):
        handle = denoiser.register_forward_pre_hook(
            lambda module, args, kwargs: remember(module, args, kwargs) if "clock" in kept and "call" not in kept else None,
            with_kwargs=True,
        )
        with torch.inference_mode(inference):
            run(pipe, **call)
        handle.remove()
    args, kwargs = kept["call"]
    half = kept["clock"].branches["conditional"]

    def own(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.clone()
            return value[half] if value.dim() and value.shape[0] == len(half) and value.shape != (5, 3) else value
        return type(value)(own(item) for item in value) if isinstance(value, (list, tuple)) else value

    x = kept["x"].clone().requires_grad_()
    args, kwargs = own(args), {name: own(value) for name, value in kwargs.items()}
    if kind == "ControlNet":
        picture = pipe.prepare_image(PICTURE, 16, 16, 1, 1, "cpu", torch.float32)
        down, mid = pipe.controlnet(x, args[1], kwargs["encoder_hidden_states"], picture, return_dict=False)
        kwargs |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    if args:
        predicted = denoiser(x, *args[1:], **kwargs)[0]
    else:
        predicted = denoiser(**{**kwargs, "hidden_states": x})[0]
    wanted = torch.autograd.grad(predicted.square().sum(), x)[0]
    assert kept["found"].abs().max() > 0 and off(kept["found"], wanted) < 1e-5
    assert not any(p.grad is not None for p in denoiser.parameters())


def test_look_ends_at_the_last_site_and_only_its_own_steps_read():
    pipe, read, ran = tiny_pipelines.stable_diffusion(), [], []
    table = sites(pipe.unet).kind("cross")[:1]
    counted = pipe.unet.conv_out.register_forward_hook(lambda *_: ran.append(1))
    reader = Capture(table, lambda call, edits: read.append((call.batch, call.clock.step)))

    def look(at: AtStep) -> None:
        assert at.look(at.latents, text="conditional") is None

    with attach(pipe, [Plan("look", [Latents(look, steps=[reader])])]):
        draw(pipe)
    counted.remove()
    assert read == [(1, step) for step in range(STEPS)] and len(ran) == STEPS


def test_further_passes_know_the_words_of_their_text():
    """In all rows, in those of a half (of two prompts, with words of their own), and in another text."""
    pipe, seen = tiny_pipelines.stable_diffusion(), []
    table = sites(pipe.unet).kind("cross")[:1]

    def look(at: AtStep) -> None:
        if at.clock.step == 1:
            at.look(at.latents)
            for half in ("conditional", "unconditional"):
                at.look(at.latents, text=half)
            other = pipe.encode_prompt(["b", "d"], "cpu", 1, False)[0]
            at.look(at.latents, text={"encoder_hidden_states": other})
            with pytest.raises(ReattendError, match="came from no text encoder"):
                at.look(at.latents, text={"encoder_hidden_states": torch.randn_like(other)})

    def steps(*words: list[str]) -> list[Latents]:
        reader = Capture(table, lambda call, edits: seen.append(call.columns("word").nonzero().tolist()))
        return [Latents(look, steps=[Words("word", list(words)), reader])]

    call = {"prompt": ["a b", "c d e"], "negative_prompt": ["x", "x"], "latents": noise(2, 4, 8, 8)}
    with attach(pipe, [Plan("look", steps(["b"], ["d"]))]):
        draw(pipe, **call)
    assert seen == [[[2, 2], [3, 2]], [[0, 2], [1, 2]], [], [[0, 1], [1, 1]]]
    with pytest.raises(ReattendError, match="look.*'z'"), attach(pipe, [Plan("look", steps(["z"]))]):
        draw(pipe, **call)
    assert len(seen) == 4


# -- the scheduler ------------------------------------------------------------------------------------------------------


def state(pipe: Any) -> tuple[list[str], Any]:
    return list(vars(pipe.scheduler)), pipe.scheduler.step


def test_the_wrapper_keeps_the_signature_and_leaves_nothing():
    pipe = tiny_pipelines.stable_diffusion()
    before, plain = state(pipe), inspect.signature(pipe.scheduler.step)
    with changing(pipe):
        assert inspect.signature(pipe.scheduler.step) == plain and "step" in vars(pipe.scheduler)
    assert state(pipe) == before

    class Stop(BaseException):
        pass

    for error in (ValueError, KeyboardInterrupt, Stop):

        def fail(latents: Tensor, step: int, error: type = error) -> Tensor:
            raise error("in the middle")

        with pytest.raises(error), changing(pipe, function=fail):
            draw(pipe)
        assert state(pipe) == before
    wanted = draw(pipe)
    first, second = changing(pipe), changing(pipe)
    first.remove()
    with changing(pipe):
        second.remove()
        assert off(draw(pipe), wanted) > 0.1
    assert state(pipe) == before and torch.equal(draw(pipe), wanted)


def test_an_interrupt_inside_a_further_pass_leaves_the_session_as_it_was():
    pipe, armed = tiny_pipelines.stable_diffusion(), []
    plain, before = draw(pipe), state(pipe)

    def stop(*_: Any) -> None:
        if armed:
            armed.clear()
            raise KeyboardInterrupt

    def look(at: AtStep) -> Tensor:
        return 0.9 * at.latents + 0.01 * at.predict(at.latents, text="conditional")

    handle = pipe.unet.mid_block.register_forward_pre_hook(stop)
    with attach(pipe, [Plan("look", [Latents(look)])]):
        wanted = draw(pipe)
        armed.append(1)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe)
        assert torch.equal(draw(pipe), wanted) and not torch.equal(wanted, plain)
        armed.append(1)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe)
    assert state(pipe) == before and torch.equal(draw(pipe), plain)
    handle.remove()


def test_a_session_that_ends_between_two_steps_changes_no_further_one():
    pipe, counted = tiny_pipelines.stable_diffusion(), []
    session = changing(pipe, function=lambda x, i: counted.append(i))

    def end(own: Any, i: int, t: Any, given: dict) -> dict:
        if i == 1:
            session.remove()
        return given

    draw(pipe, callback_on_step_end=end)
    assert counted == [0, 1] and "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_the_scheduler_have_their_own_step(copied, tmp_path):
    pipe = tiny_pipelines.stable_diffusion()
    plain = draw(pipe)
    with changing(pipe):
        other = copied(pipe.scheduler)
        pipe.scheduler.save_pretrained(tmp_path)
    assert type(other) is type(pipe.scheduler) and "step" not in vars(other) and "__reduce_ex__" not in vars(other)
    assert other.step.__self__ is other and vars(other).keys() == vars(pipe.scheduler).keys()
    assert "step" not in (tmp_path / "scheduler_config.json").read_text().replace("steps", "").replace("timestep", "")
    pipe.scheduler = other
    assert torch.equal(draw(pipe), plain)


def test_a_copied_or_exchanged_scheduler_is_followed():
    pipe = tiny_pipelines.stable_diffusion()
    first = pipe.scheduler
    with changing(pipe):
        wanted = draw(pipe)
        pipe.scheduler = copy.deepcopy(first)
        assert torch.equal(draw(pipe), wanted)
        pipe.scheduler = second = diffusers.EulerDiscreteScheduler.from_config(first.config)
        found = draw(pipe)
    assert "step" not in vars(first) and "step" not in vars(second)
    other = with_scheduler(second)
    assert off(found, by_hand(other, copy.deepcopy(second), [])) < 2e-6


def test_another_threads_run_is_its_own():
    pipe, plain, results = tiny_pipelines.stable_diffusion(), None, {}
    plain = draw(pipe)
    own = made(diffusers.StableDiffusionPipeline, **parts(pipe, scheduler=copy.deepcopy(pipe.scheduler)))
    model = Plan("change", [Latents(lambda at: change(at.latents, at.clock.step))])
    with attach(pipe, [model], isolated=True):
        thread = threading.Thread(target=lambda: results.update(other=draw(own)))
        changed = draw(pipe)
        thread.start()
        thread.join()
    assert torch.equal(results["other"], plain) and off(changed, plain) > 0.1


# -- what cannot be --------------------------------------------------------------------------------------------------------


def test_refusals_when_a_session_begins():
    pipe = tiny_pipelines.stable_diffusion()
    with pytest.raises(UnsupportedError, match="needs the scheduler.*apply the recipe to the pipeline"):
        changing(pipe.unet)
    with pytest.raises(UnsupportedError, match="needs a denoiser"):
        changing(tiny_llama())
    pipe.register_modules(scheduler=None)
    with pytest.raises(UnsupportedError, match="has no `step` that is given latents"):
        changing(pipe)


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (
            lambda at: at.predict(at.latents, text={"encoder_hidden_states": noise(3, 64, 16)}),
            r"must have 1 rows .* got \(3, 64, 16\)",
        ),
        (
            lambda at: at.predict(at.latents, text={"encoder_hidden_states": noise(1, 64, 7)}),
            r"the shape \(1, 64, 16\), but for its length",
        ),
        (lambda at: at.predict(at.latents, text={"encoder_hidden_states": "a dog"}), "encoder_hidden_states .* got str"),
        (lambda at: at.gradient(lambda x: at.predict(x, grad=True), at.latents), "a loss is a tensor of one number"),
        (lambda at: at.gradient(lambda x: at.predict(x).square().sum(), at.latents), "only with grad=True"),
        (lambda at: at.gradient(lambda x: 3.0, at.latents), "a loss is a tensor of one number, got float"),
    ],
)
def test_what_a_further_pass_is_given(use, words):
    pipe = tiny_pipelines.stable_diffusion()
    with pytest.raises(ReattendError, match=words), attach(pipe, [Plan("x", [Latents(lambda at: use(at) and None)])]):
        pipe("a fox", num_inference_steps=2, output_type="latent")


def test_a_text_of_another_length_in_a_further_pass():
    pipe, found = tiny_pipelines.stable_diffusion(), []

    def look(at: AtStep) -> None:
        found.append(at.predict(at.latents, text={"encoder_hidden_states": noise(1, 9, 16)}))

    with attach(pipe, [Plan("x", [Latents(look)])]):
        pipe("a fox", num_inference_steps=2, output_type="latent")
    assert len(found) == 2 and len(found[0]) == 1


@pytest.mark.parametrize("step", [Guide("weak"), Latents(lambda at: None)])
def test_steps_that_change_whole_passes_are_none_of_a_further_pass(step):
    pipe = tiny_pipelines.stable_diffusion()
    before = traces(pipe.unet)
    with pytest.raises(UnsupportedError, match="the steps of its Latents change whole passes"):
        attach(pipe, [Plan("x", [Latents(lambda at: None, steps=[step])])])
    assert "step" not in vars(pipe.scheduler) and traces(pipe.unet) == before


def test_latents_that_cannot_be_recovered_are_refused():
    unet = tiny_pipelines.stable_diffusion(3).unet
    where = place_of(unet, {"sample": noise(2, 3, 8, 8)}, {})
    assert isinstance(where, str) and "of which it predicts 4, is not known" in where
    assert "floating point" in str(place_of(unet, {"sample": torch.zeros(2, 8, dtype=torch.long)}, {}))
    halves = {"conditional": torch.tensor([False, True])}
    assert "different latents" in str(place_of(tiny_pipelines.stable_diffusion().unet, {"sample": noise(2, 4, 8, 8)}, halves))
    transformer = tiny_pipelines.flux().transformer
    ids = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    assert "come before" in str(place_of(transformer, {"hidden_states": noise(1, 2, 16), "img_ids": ids}, {}))

    pipe = tiny_pipelines.stable_diffusion()
    with pytest.raises(ReattendError, match="guess_mode"), changing(controlled()[0]) as session:
        run(session.model, image=PICTURE, guess_mode=True)
    with (
        pytest.raises(ReattendError, match="new latents must be a tensor of shape"),
        changing(pipe, function=lambda x, i: x[:, :2]),
    ):
        draw(pipe)
    with pytest.raises(ReattendError, match="text names 'texts'"), changing(pipe, function=None) as session:
        session.remove()
        with attach(pipe, [Plan("x", [Latents(lambda at: at.predict(at.latents, text={"texts": 1}))])]):
            draw(pipe)


def test_a_loop_with_another_scheduler_or_other_latents_is_an_error():
    pipe = tiny_pipelines.stable_diffusion()
    other = copy.deepcopy(pipe.scheduler)
    texts = pipe.encode_prompt("a b", "cpu", 1, False)[0]
    for scheduler in (pipe.scheduler, other):
        scheduler.set_timesteps(STEPS)

    def loop(scheduler: Any, shift: float = 0.0) -> Tensor:
        x = noise(1, 4, 8, 8)
        for t in scheduler.timesteps:
            x = scheduler.step(pipe.unet(x, t, encoder_hidden_states=texts).sample, t, x + shift).prev_sample
        return x

    with torch.no_grad():
        with changing(pipe):
            loop(pipe.scheduler)
        with pytest.raises(ReattendError, match="never came to the `step` of DDIMScheduler"), changing(pipe):
            loop(other)
        with pytest.raises(ReattendError, match="are not those .* in the denoiser's input"), changing(pipe):
            loop(pipe.scheduler, shift=5.0)
