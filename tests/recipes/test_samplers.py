"""What a scheduler does to a picture: the level at each step, DDIM inversion against diffusers' own scheduler, pictures as latents."""

from __future__ import annotations

import diffusers
import pytest
import reattend
import tiny_pipelines
import torch
from PIL import Image
from reattend.hooks import AtStep, Latents, Plan, attach
from reattend.interventions import Clock, Memory
from reattend.recipes.kit.samplers import CLEAN, encoded, flows, inverted, levels, place, reached

SCHEDULERS = {
    "DDIM": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "DDIM, Stable Diffusion": lambda: diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "PNDM": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(),
    "Heun": lambda: diffusers.HeunDiscreteScheduler(),
    "KDPM2": lambda: diffusers.KDPM2DiscreteScheduler(),
    "DPM-Solver++": lambda: diffusers.DPMSolverMultistepScheduler(),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
}


def at_clock(step: int, scheduled: float, steps: int | None = 8) -> Clock:
    return Clock("denoise", step, steps, scheduled, scheduled)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_latents_of_a_known_picture_and_noise_are_at_the_levels(name):
    """A denoiser that knows the noise moves from level to level."""
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(8)
    known = levels(scheduler)
    torch.manual_seed(0)
    picture, noise = torch.randn(2, 1, 4, 6, 6, dtype=torch.float64)
    x = known[0].mixed(picture, noise)
    for step, t in enumerate(scheduler.timesteps):
        if step == 0:
            assert place(scheduler, at_clock(0, float(t))) == 0
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        x = scheduler.step(noise - picture if flows(scheduler) else noise, t, x).prev_sample
        level = known[reached(scheduler, at_clock(step, float(t)))]
        # schedulers keep their tables in single precision
        torch.testing.assert_close(x, level.mixed(picture, noise), atol=2e-5, rtol=1e-4)
    assert reached(scheduler, at_clock(step, float(t))) == len(known) - 1
    torch.testing.assert_close(known[0].noise_of(known[0].mixed(picture, noise), picture), noise)


NOISY = {
    "Euler": lambda **betas: diffusers.EulerAncestralDiscreteScheduler(**betas),
    "KDPM2": lambda **betas: diffusers.KDPM2AncestralDiscreteScheduler(**betas),
    "DPM-Solver++": lambda **betas: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **betas),
    "DDPM": lambda **betas: diffusers.DDPMScheduler(clip_sample=False, **betas),
    "LCM": lambda **betas: diffusers.LCMScheduler(**betas),
}


@pytest.mark.parametrize("name", NOISY)
def test_schedulers_that_draw_noise_hold_as_much_of_it_as_their_levels_say(name):
    """A denoiser that knows the picture finds noise of deviation 1 at every level."""
    scheduler = NOISY[name](beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.set_timesteps(8)
    known = levels(scheduler)
    torch.manual_seed(0)
    picture, noise = torch.randn(2, 1, 4, 64, 64, dtype=torch.float64)
    x, level = known[0].mixed(picture, noise), known[0]
    for step, t in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        x = scheduler.step(level.noise_of(x, picture), t, x).prev_sample
        level = known[reached(scheduler, at_clock(step, float(t)))]
        if level.noise < 1e-6:
            assert step >= len(scheduler.timesteps) - 2
            torch.testing.assert_close(x, picture, atol=1e-5, rtol=1e-4)
            break
        assert 0.97 < float(level.noise_of(x, picture).std()) < 1.03


def test_euler_that_begins_with_little_noise_holds_the_picture_at_full_size():
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.0])
    assert [level.signal for level in levels(scheduler)] == [1.0] * 3
    assert [level.noise for level in levels(scheduler)] == pytest.approx([0.9, 0.5, 0.0])


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in ("PNDM", "KDPM2")])
def test_known_noise_leads_back_to_itself(name):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(8)
    known = levels(scheduler)
    torch.manual_seed(0)
    picture, noise = torch.randn(2, 1, 4, 6, 6, dtype=torch.float64)
    asked: list[float] = []

    def predict(latents, timestep, text, *rest):
        asked.append(timestep)
        return noise - picture if flows(scheduler) else noise

    times = scheduler.timesteps.tolist()
    at = AtStep(picture, at_clock(2, times[3]), Memory(since=0), scheduler, None, predict)
    begin = place(scheduler, at.clock)
    found = inverted(at, known[-1].mixed(picture, noise))
    assert list(found) == list(range(len(times) - 1, begin - 1, -1)), "from the step under way on"
    assert asked == list(dict.fromkeys(reversed(times[begin:])))
    for index, x in found.items():
        torch.testing.assert_close(x, known[index].mixed(picture, noise), atol=1e-6, rtol=1e-5)


def test_halfway_latents_lie_on_the_way_to_the_step_itself():
    scheduler = SCHEDULERS["KDPM2"]()
    scheduler.set_timesteps(8)
    known, times, asked = levels(scheduler), scheduler.timesteps.tolist(), []
    torch.manual_seed(0)
    picture, noise = torch.randn(2, 1, 4, 6, 6, dtype=torch.float64)

    def predict(latents, timestep, text, *rest):
        asked.append(timestep)
        return noise + 1e-3 * timestep

    found = inverted(AtStep(picture, at_clock(1, times[2]), Memory(since=0), scheduler, None, predict), picture)
    assert list(found) == list(range(14, 1, -1)) and asked == times[14:1:-2]
    for index in range(3, 14, 2):
        before, between, after = (known[one].noise for one in (index - 1, index, index + 1))
        straight = found[index + 1] + (found[index - 1] - found[index + 1]) * (between - after) / (before - after)
        assert after < between < before
        torch.testing.assert_close(found[index], straight, atol=1e-5, rtol=1e-5)


def test_a_timestep_that_stands_twice_in_a_schedule_is_at_two_levels():
    scheduler = diffusers.DPMSolverMultistepScheduler(use_exponential_sigmas=True)
    scheduler.set_timesteps(50)
    times, known, asked = scheduler.timesteps.tolist(), levels(scheduler), []
    second = next(index for index in range(49, 0, -1) if times[index] == times[index - 1])
    assert known[second].noise < known[second - 1].noise
    picture = torch.ones(1, 4, 6, 6, dtype=torch.float64)

    def predict(latents, timestep, text, *rest):
        asked.append(timestep)
        return torch.ones_like(latents)

    at = AtStep(picture, at_clock(0, times[0]), Memory(since=0), scheduler, None, predict)
    found = inverted(at, known[-1].mixed(picture, picture))
    assert asked == times[::-1]
    for index, x in found.items():
        torch.testing.assert_close(x, known[index].mixed(picture, picture), atol=1e-6, rtol=1e-5)
    for t in scheduler.timesteps[:second]:
        scheduler.step(picture, t, picture)
    assert place(scheduler, at_clock(second, times[second])) == second


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_inversion_is_that_of_diffusers(kind):
    pipe = tiny_pipelines.stable_diffusion()
    config = {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False, "prediction_type": kind}
    pipe.scheduler = diffusers.DDIMScheduler(**config)
    picture, got = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)), {}

    def before(at: AtStep) -> None:
        if at.clock.step == 0:
            got.update(inverted(at, picture))

    with attach(pipe, [Plan("invert", [Latents(before)])]):
        pipe("a", num_inference_steps=5, guidance_scale=3.0, output_type="latent")
    inverse = diffusers.DDIMInverseScheduler.from_config(pipe.scheduler.config)
    inverse.set_timesteps(5)
    text, x = pipe.encode_prompt("a", "cpu", 1, False)[0], picture
    for number, t in enumerate(inverse.timesteps):
        with torch.no_grad():
            x = inverse.step(pipe.unet(x, t, encoder_hidden_states=text).sample, t, x).prev_sample
        torch.testing.assert_close(got[4 - number], x, atol=1e-5, rtol=1e-4)


def test_schedulers_and_predictions_that_are_not_known_are_refused():
    with pytest.raises(reattend.ReattendError, match="timesteps of EDMEulerScheduler is not known"):
        levels(diffusers.EDMEulerScheduler())
    upwards = diffusers.FlowMatchEulerDiscreteScheduler()
    upwards.register_to_config(invert_sigmas=True)
    with pytest.raises(reattend.ReattendError, match="is not known"):
        levels(upwards)
    scheduler = diffusers.DDIMScheduler(prediction_type="sample")
    scheduler.set_timesteps(4)
    with pytest.raises(reattend.ReattendError, match="predicts 'sample'"):
        inverted(AtStep(torch.zeros(1), at_clock(0, 750), Memory(since=0), scheduler), torch.zeros(1))
    with pytest.raises(reattend.ReattendError, match="timestep 3 is none of the schedule"):
        place(scheduler, at_clock(0, 3))
    with pytest.raises(reattend.ReattendError, match="level without noise"):
        CLEAN.noise_of(torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize("build", [tiny_pipelines.stable_diffusion, tiny_pipelines.stable_diffusion_3])
def test_a_picture_is_what_the_vae_makes_of_it(build):
    pipe = build()
    torch.manual_seed(0)
    pixels = torch.rand(16, 16, 3)
    picture = Image.fromarray((pixels * 255).byte().numpy())
    got = encoded(pipe, [picture, picture], torch.zeros(2, 4, 8, 8))
    with torch.no_grad():
        given = pipe.vae.encode(pipe.image_processor.preprocess(picture)).latent_dist.mode()
    torch.testing.assert_close(got[1:], given * pipe.vae.config.scaling_factor)


def test_pictures_that_a_run_cannot_take_up():
    picture = Image.new("RGB", (16, 12))
    with pytest.raises(reattend.ReattendError, match="16 x 12 pixels has other proportions than the run's latents of 8 x 8"):
        encoded(tiny_pipelines.stable_diffusion(), [picture], torch.zeros(1, 4, 8, 8))
    with pytest.raises(reattend.ReattendError, match="latents are packed"):
        encoded(tiny_pipelines.flux(), [picture], torch.zeros(1, 16, 16))


def random_picture(width: int, height: int) -> Image.Image:
    torch.manual_seed(0)
    return Image.fromarray((torch.rand(height, width, 3) * 255).byte().numpy())


@pytest.mark.parametrize("sides", [(35, 27), (34, 26), (17, 13)])
def test_sides_that_are_no_whole_places_are_brought_to_them_as_a_pipeline_brings_them(sides):
    pipe, got = diffusers.AutoPipelineForImage2Image.from_pipe(tiny_pipelines.stable_diffusion()), {}
    pipe.set_progress_bar_config(disable=True)
    picture = random_picture(*sides)

    def note(at: AtStep) -> None:
        got["latents"] = encoded(at.pipeline, [picture], at.latents)

    with attach(pipe, [Plan("note", [Latents(note)])]):
        pipe("a", image=picture, num_inference_steps=2, strength=1.0, output_type="latent")
    pixels = pipe.image_processor.preprocess(picture)
    with torch.no_grad():
        given = pipe.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(got["latents"], given * pipe.vae.config.scaling_factor)


def test_latents_of_other_vaes_and_of_those_with_a_mean():
    pipe, picture, like = tiny_pipelines.stable_diffusion(), random_picture(16, 16), torch.zeros(1, 4, 8, 8)
    with torch.no_grad():
        raw = pipe.vae.encode(pipe.image_processor.preprocess(picture)).latent_dist.mode()
    pipe.vae.register_to_config(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[0.5, 1.0, 2.0, 4.0])
    mean, deviation = (
        torch.tensor(one).view(1, 4, 1, 1) for one in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    torch.testing.assert_close(encoded(pipe, [picture], like), (raw - mean) * pipe.vae.config.scaling_factor / deviation)
    pipe.vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)
    ).eval()  # fmt: skip
    with torch.no_grad():
        raw = pipe.vae.encode(pipe.image_processor.preprocess(picture)).latents
    torch.testing.assert_close(encoded(pipe, [picture], like), raw * pipe.vae.config.scaling_factor)


def test_a_vae_that_overflows_has_its_dtype_again_also_after_an_error(monkeypatch):
    pipe = tiny_pipelines.stable_diffusion()
    pipe.vae.to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    seen = []

    def encode(pixels):
        seen.append((pixels.dtype, pipe.vae.dtype))
        raise KeyboardInterrupt

    monkeypatch.setattr(pipe.vae, "encode", encode)
    with pytest.raises(KeyboardInterrupt):
        encoded(pipe, [random_picture(16, 16)], torch.zeros(1, 4, 8, 8))
    assert seen == [(torch.float32, torch.float32)] and pipe.vae.dtype == torch.float16
