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


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "PNDM"])
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
