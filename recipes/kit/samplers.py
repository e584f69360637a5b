"""What a run's scheduler does to a picture: how much of it and of noise the latents hold at each step, and the way back to noise.

All of it is read from public parts of a pipeline (timesteps, sigmas or alphas of its scheduler, its VAE), inside a run: recipes call it
with what the latents door hands them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...hooks import AtStep
from ...interventions import Clock, ReattendError


class Level(NamedTuple):
    """What latents are made of: signal * picture + noise * noise."""

    signal: float
    noise: float

    def mixed(self, picture: Tensor, noise: Tensor) -> Tensor:
        """The latents at this level of a clean picture's latents and noise, in the picture's dtype."""
        return self.signal * picture + self.noise * noise

    def noise_of(self, latents: Tensor, picture: Tensor) -> Tensor:
        """The noise with which `mixed` gives these latents. Raises ReattendError for a level without noise."""
        if not self.noise:
            raise ReattendError("the noise in these latents cannot be told: they are at a level without noise")
        return (latents - self.signal * picture) / self.noise


CLEAN = Level(1.0, 0.0)


def levels(scheduler: Any) -> list[Level]:
    """The level at each of a scheduler's timesteps, and last that of what its last step returns.

    Raises ReattendError for a scheduler whose steps are no mixtures of a picture with noise.
    """
    name, config, times = type(scheduler).__name__, scheduler.config, scheduler.timesteps.tolist()
    sigmas, alphas = getattr(scheduler, "sigmas", None), getattr(scheduler, "alphas_cumprod", None)
    if getattr(config, "skip_prk_steps", True) and getattr(config, "sigma_data", None) is None:
        if isinstance(sigmas, Tensor) and len(sigmas) == len(times) + 1:
            return [_of_sigma(scheduler, sigma) for sigma in sigmas.tolist()]
        if isinstance(alphas, Tensor):
            end = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
            shares = [*(float(alphas[int(time)]) for time in times), end]
            return [Level(share**0.5, (1 - share) ** 0.5) for share in shares]
    raise ReattendError(
        f"how much noise latents hold at the timesteps of {name} is not known: use DDIM, Euler, DPM-Solver++, UniPC, a flow scheduler, or "
        "PNDM with skip_prk_steps"
    )


def flows(scheduler: Any) -> bool:
    """Whether latents lie on straight lines from the picture to noise (flow matching), and velocities are predicted."""
    return "FlowMatch" in type(scheduler).__name__ or bool(getattr(scheduler.config, "use_flow_sigmas", False))


def _of_sigma(scheduler: Any, sigma: float) -> Level:
    if flows(scheduler):
        return Level(1 - sigma, sigma)
    # Euler and its kin hold the picture at full size, and scale the denoiser's input
    if float(getattr(scheduler, "init_noise_sigma", 1.0)) > 1:
        return Level(1.0, sigma)
    size = (1 + sigma**2) ** 0.5
    return Level(1 / size, sigma / size)


def place(scheduler: Any, clock: Clock) -> int:
    """Which of the scheduler's timesteps this step begins at. Raises ReattendError where the run is on none of them."""
    times = scheduler.timesteps.tolist()
    if clock.scheduled not in times:
        raise ReattendError(
            f"the step at timestep {clock.scheduled} is none of the schedule of {type(scheduler).__name__}: run the pipeline as a whole"
        )
    return times.index(clock.scheduled)


def reached(scheduler: Any, clock: Clock) -> int:
    """Which of `levels` the latents are at that `step` has just returned, at this clock."""
    index = getattr(scheduler, "step_index", None)
    if isinstance(index, int):
        return index
    times = scheduler.timesteps.tolist()
    last = len(times) - 1 - times[::-1].index(times[place(scheduler, clock)])
    # PNDM does its first step twice: the second time it arrives where it already stood
    return last if hasattr(scheduler, "ets") and scheduler.counter == 2 else last + 1


def inverted(at: AtStep, picture: Tensor, text: str | Mapping[str, Any] = "conditional") -> dict[int, Tensor]:
    """DDIM inversion: {place in the scheduler's timesteps: latents [B, ...]}, from the step under way on, of clean latents [B, ...].

    From the clean end backwards, each step's prediction is made at the timestep that it leads to, as in diffusers' DDIMInverseScheduler;
    the denoiser runs once a step, on rows with this text alone. Raises ReattendError for what is predicted in a way that is not known.
    """
    scheduler, kind = at.scheduler, getattr(at.scheduler.config, "prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction") and not flows(scheduler):
        raise ReattendError(
            f"a picture cannot be turned back to noise where a denoiser predicts {kind!r}: noise or a velocity is needed"
        )
    known, times, begin = levels(scheduler), scheduler.timesteps.tolist(), place(scheduler, at.clock)
    x, level, found, before = picture, known[-1], {}, None
    for index in range(len(times) - 1, begin - 1, -1):
        if times[index] != before:  # schedulers that evaluate twice name a timestep twice
            predicted = at.predict(x, timestep=times[index], text=text)[:, : picture.shape[1]].to(x)
            clean, noise = _parts(x, predicted, level, "flow" if flows(scheduler) else kind)
            x, level, before = known[index].mixed(clean, noise), known[index], times[index]
        found[index] = x
    return found


def _parts(x: Tensor, predicted: Tensor, level: Level, kind: str) -> tuple[Tensor, Tensor]:
    """(picture, noise) of latents at a level, from what the denoiser predicts for them."""
    signal, noise = level
    if kind == "flow":
        return x - noise * predicted, x + signal * predicted
    if kind == "epsilon":
        return (x - noise * predicted) / signal, predicted
    size = (signal**2 + noise**2) ** 0.5
    signal, noise, x = signal / size, noise / size, x / size
    return signal * x - noise * predicted, signal * predicted + noise * x


def encoded(pipeline: Any, pictures: Sequence[Any], like: Tensor) -> Tensor:
    """Clean latents [n, ...] of pictures (PIL) of a run whose latents are `like` [B, channels, height, width]: the mean of what the VAE gives.

    Raises ReattendError for a pipeline without a VAE of its own, packed latents, and a picture of other proportions than the run's.
    """
    vae, processor, name = getattr(pipeline, "vae", None), getattr(pipeline, "image_processor", None), type(pipeline).__name__
    if vae is None or processor is None or like.dim() != 4:
        why = "its latents are packed or a video's" if like.dim() != 4 else "it has no vae and image_processor"
        raise ReattendError(f"{name} cannot take up a picture: {why}")
    height, width = like.shape[-2:]
    for picture in pictures:
        if picture.height * width != picture.width * height:
            raise ReattendError(
                f"a picture of {picture.width} x {picture.height} pixels has other proportions than the run's latents of {width} x {height}"
            )
    factor = int(getattr(pipeline, "vae_scale_factor", 8))
    pixels = torch.cat([processor.preprocess(picture, height=height * factor, width=width * factor) for picture in pictures])
    weights = next(vae.parameters())
    narrow = weights.dtype == torch.float16 and bool(getattr(vae.config, "force_upcast", False))
    if narrow:  # SDXL's overflows in float16
        vae.to(torch.float32)
    dtype = torch.float32 if narrow else weights.dtype
    with torch.no_grad():
        given = vae.encode(pixels.to(like.device, dtype))
    if narrow:
        vae.to(torch.float16)
    latents = given.latent_dist.mode() if hasattr(given, "latent_dist") else given.latent
    shift, factor = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
    return ((latents - shift) * factor).to(like)
