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
from .layout import alike


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
    plain = getattr(config, "skip_prk_steps", True) and getattr(config, "sigma_data", None) is None
    if plain and not getattr(config, "invert_sigmas", False) and (flows(scheduler) or isinstance(alphas, Tensor)):
        if _halves(scheduler):
            return [*(_of_sigma(scheduler, sigma) for sigma in _halved(scheduler)), CLEAN]
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


def _halves(scheduler: Any) -> bool:
    """Whether every other evaluation is made halfway to the next step (KDPM2, the SDE solver): at odd places of the timesteps."""
    return hasattr(scheduler, "sigmas_interpol") or "noise_sampler_seed" in scheduler.config


def _halved(scheduler: Any) -> list[float]:
    """The sigma at each timestep of a scheduler that halves its steps."""
    sigmas, count = scheduler.sigmas.tolist(), len(scheduler.timesteps)
    if hasattr(scheduler, "sigmas_interpol"):
        # the ancestral one keeps them where the step begins, the other where it ends
        between, back = scheduler.sigmas_interpol.tolist(), int(hasattr(scheduler, "sigmas_up"))
        return [between[index - back] if index % 2 else sigmas[index] for index in range(count)]
    # the SDE solver's are even in the logarithm
    return [(sigmas[index - 1] * sigmas[index]) ** 0.5 if index % 2 else sigmas[index] for index in range(count)]


def flows(scheduler: Any) -> bool:
    """Whether latents lie on straight lines from the picture to noise (flow matching), and velocities are predicted."""
    return "FlowMatch" in type(scheduler).__name__ or bool(getattr(scheduler.config, "use_flow_sigmas", False))


def _of_sigma(scheduler: Any, sigma: float) -> Level:
    if flows(scheduler):
        return Level(1 - sigma, sigma)
    # Euler and its kin hold the picture at full size and scale the denoiser's input, so that they begin with noise of the largest sigma
    if isinstance(getattr(type(scheduler), "init_noise_sigma", None), property):
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
    # a timestep may stand there twice, at levels that are nearly alike
    index = getattr(scheduler, "step_index", None)
    if isinstance(index, int) and index < len(times) and times[index] == clock.scheduled:
        return index
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
    x, level, found, before, parts = picture, known[-1], {}, None, (picture, picture)
    for index in range(len(times) - 1, begin - 1, -1):
        # halfway latents lie on the way to the step's own timestep
        to = index - 1 if _halves(scheduler) and index % 2 else index
        if (times[to], known[to]) != before:  # schedulers that evaluate twice name a timestep twice
            predicted = at.predict(x, timestep=times[to], text=text)[:, : picture.shape[1]].to(x)
            parts, before = _parts(x, predicted, level, "flow" if flows(scheduler) else kind), (times[to], known[to])
        level = known[index]
        found[index] = x = level.mixed(*parts)
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


def encoded(pipeline: Any, pictures: Sequence[Any], like: Tensor, whose: str = "picture") -> Tensor:
    """Clean latents [n, ...] of pictures (PIL) of a run whose latents are `like` [B, channels, height, width]: the mean of what the VAE gives.

    whose: what messages call them. Raises ReattendError for a pipeline without a VAE of its own, packed latents, and a picture of other
    proportions than the run's: pipelines bring the sides of a picture to whole places too, so that these may differ by less than one.
    """
    vae, processor, name = getattr(pipeline, "vae", None), getattr(pipeline, "image_processor", None), type(pipeline).__name__
    if vae is None or processor is None or like.dim() != 4:
        why = "its latents are packed or a video's" if like.dim() != 4 else "it has no vae and image_processor"
        raise ReattendError(f"{whose}: {name} cannot take up a picture: {why}")
    height, width = like.shape[-2:]
    for picture in pictures:
        if not alike((picture.height, picture.width), (height, width)):
            raise ReattendError(
                f"{whose}: a picture of {picture.width} x {picture.height} pixels has other proportions than the run's latents of "
                f"{width} x {height}"
            )
    factor = int(getattr(pipeline, "vae_scale_factor", 8))
    pixels = torch.cat([processor.preprocess(picture, height=height * factor, width=width * factor) for picture in pictures])
    weights = next(vae.parameters())
    narrow = weights.dtype == torch.float16 and bool(getattr(vae.config, "force_upcast", False))
    dtype = torch.float32 if narrow else weights.dtype
    try:
        if narrow:  # SDXL's overflows in float16
            vae.to(torch.float32)
        with torch.no_grad():
            given = vae.encode(pixels.to(like.device, dtype))
    finally:
        if narrow:
            vae.to(torch.float16)
    if hasattr(given, "latent_dist"):
        latents = given.latent_dist.mode()
    else:
        latents = given.latents if hasattr(given, "latents") else given.latent
    mean, deviation = (getattr(vae.config, f"latents_{one}", None) for one in ("mean", "std"))
    if mean and deviation:
        mean, deviation = (torch.tensor(one).view(1, -1, 1, 1).to(latents) for one in (mean, deviation))
    else:
        mean, deviation = getattr(vae.config, "shift_factor", None) or 0.0, 1.0
    return ((latents - mean) * vae.config.scaling_factor / deviation).to(like)
