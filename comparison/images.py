"""Generated pictures before and after: PSNR, SSIM, pixel difference and the difference as a picture. Needs no trained metric."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hooks import SiteTable
from ..hooks.sites.discovery import components
from ..interventions import ReattendError
from .job import Job, Tick
from .outcome import Outcome

# A clip shows this many of its frames; the metrics are means over all of them.
SHOWN_FRAMES = 4


class ImageJob(Job):
    """A diffusers pipeline with the arguments of its call. one_noise: whether all prompts begin with the same noise."""

    kind = "image"

    def __init__(self, pipe: Any, options: dict[str, Any], seed: int, one_noise: bool = False) -> None:
        super().__init__(pipe, getattr(pipe, "tokenizer", None), seed)
        self.one_noise = one_noise
        self.options = _drawn_alike(dict(options))
        self.accepted, takes_any = taken_by(pipe)
        # what a modular pipeline is asked for; "" of others, which return it with all the rest
        self.output = _drawn(pipe) if _modular(pipe) else ""
        unknown = [k for k in self.options if k not in self.accepted]
        if unknown and not takes_any:
            own = " (a picture for a recipe is a parameter of the recipe's own)" if unknown[0] == "image" else ""
            raise ReattendError(f"{type(pipe).__name__} takes no {unknown[0]!r}{own}; it takes: {', '.join(self.accepted)}")

    @property
    def module(self) -> nn.Module:
        parts = components(self.model)
        return next((parts[k] for k in ("transformer", "unet") if k in parts), next(iter(parts.values())))

    @property
    def device(self) -> torch.device:
        return torch.device(getattr(self.model, "_execution_device", None) or super().device)

    @property
    def ticks(self) -> int:
        default = self.accepted.get("num_inference_steps")
        steps = self.options.get("num_inference_steps", default.default if default else 1)
        return steps if isinstance(steps, int) else 1

    def watched(self, table: SiteTable) -> SiteTable:
        found = super().watched(table).stack("denoiser")
        joint = found.kind("joint")
        return joint if len(joint) else found

    def roles_tell(self, watched: SiteTable) -> bool:
        # a cross-attention sees text only and a self-attention the image only, whatever is done to them
        return any(site.kind == "joint" for site in watched)

    def warm(self) -> None:
        self._call(1, None)

    def glance(self, tick: Tick, untouched: list[Any]) -> None:
        self._call(2, None)
        tick()

    def run(self, tick: Tick) -> list[Any]:
        return self._call(None, tick)

    def steps(self, result: Any) -> int:
        return self.ticks

    def show(self, result: list[Any]) -> list[Any]:
        return result

    def _call(self, steps: int | None, tick: Tick | None) -> list[Any]:
        options = _drawn_alike(self.options)
        if steps is not None and "num_inference_steps" in self.accepted:
            options["num_inference_steps"] = min(self._asking(steps), self.ticks)
        if "generator" in self.accepted:
            options.setdefault("generator", torch.Generator("cpu").manual_seed(self.seed))
            if self.one_noise and isinstance(options["generator"], torch.Generator):
                options["generator"] = _of_one_noise(options["generator"], *self._asked(options))
        if "output_type" in self.accepted:
            options["output_type"] = "pil"
        if tick is not None and "callback_on_step_end" in self.accepted and "callback_on_step_end" not in options:
            options["callback_on_step_end"] = lambda pipe, step, time, values: (tick(), values)[1]
        self.reseed()
        if self.output:
            options["output"] = self.output
        try:
            output = self.model(**options)
        except (ValueError, TypeError) as error:
            if isinstance(error, ReattendError) or not self._lacks_prompt or "prompt" not in str(error):
                raise
            raise ReattendError(
                f"{type(self.model).__name__} draws what a prompt says: give prompt (or prompt_embeds); it says: {error}"
            ) from error
        pictures = output
        if not self.output:
            pictures = getattr(output, "images", None)
            if pictures is None:
                pictures = getattr(output, "frames", None)
        if pictures is None:
            raise ReattendError(
                f"{type(self.model).__name__} returns neither images nor frames, so there is nothing to compare"
            )
        pictures = list(pictures)
        return list(pictures[0]) if pictures and isinstance(pictures[0], (list, tuple)) else pictures

    @property
    def _lacks_prompt(self) -> bool:
        """Whether the pipeline takes a prompt and was given none; some draw without, and say themselves that they do not."""
        return "prompt" in self.accepted and self.options.get("prompt") is None

    @staticmethod
    def _asked(options: dict[str, Any]) -> tuple[int, int]:
        """(prompts, pictures of each)."""
        given = next((value for name in ("prompt", "prompt_embeds") if (value := options.get(name)) is not None), "")
        return 1 if isinstance(given, str) else len(given), int(options.get("num_images_per_prompt") or 1)

    def _asking(self, steps: int) -> int:
        """How many steps to ask for, where image to image does only the share `strength` of them, rounded down, for so many to be done."""
        strength = self.options.get("strength", getattr(self.accepted.get("strength"), "default", None))
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 < strength < 1:
            return steps
        asked = math.ceil(steps / strength)
        return asked if int(asked * strength) >= steps else asked + 1

    def request(self) -> dict[str, Any]:
        shown = {k: v for k, v in self.options.items() if isinstance(v, (str, int, float, bool, list, tuple)) and k != "prompt"}
        prompt = self.options.get("prompt")
        return {"prompt": prompt if prompt is None else str(prompt), "prompt_tokens": None, "settings": shown}

    def fill(self, report: Outcome, before: list[Any], after: list[Any]) -> None:
        pairs = [(to_tensor(a), to_tensor(b)) for a, b in zip(before, after, strict=True)]
        values = [picture_metrics(a, b) for a, b in pairs]
        for name in values[0]:
            numbers = [v[name] for v in values]
            report.metrics[name] = all(numbers) if name == "identical" else sum(numbers) / len(numbers)
        chosen = sorted({round(i * (len(pairs) - 1) / max(1, SHOWN_FRAMES - 1)) for i in range(SHOWN_FRAMES)})
        report.before.pictures = [before[i] for i in chosen]
        report.after.pictures = [after[i] for i in chosen]
        report.before.shown = report.after.shown = chosen
        largest = max(float((a - b).abs().max()) for a, b in pairs)
        report.difference = [difference_picture(*pairs[i], largest) for i in chosen]
        report.metrics["largest_difference"] = largest
        given = self.options.get("image")
        report.inputs = [given] if given is not None and hasattr(given, "save") else []


def taken_by(pipe: Any) -> tuple[dict[str, Any], bool]:
    """(parameters of a pipeline's call by name, each with a default; whether it takes any others too)."""
    if _modular(pipe):
        return {one.name: one for one in pipe.blocks.inputs if one.name}, False
    _, *parameters = inspect.signature(type(pipe).__call__).parameters.values()
    # diffusers' own pipelines swallow what they do not know; a pipeline of somebody else's may use it
    any_more = any(one.kind is one.VAR_KEYWORD for one in parameters)
    return {one.name: one for one in parameters}, any_more and not type(pipe).__module__.startswith("diffusers.")


def _modular(pipe: Any) -> bool:
    """Whether this is one of diffusers' modular pipelines, whose call takes whatever its blocks take."""
    return any(base.__name__ == "ModularPipeline" for base in type(pipe).__mro__)


def _drawn(pipe: Any) -> str:
    """What a modular pipeline calls the pictures it makes. Raises ReattendError for one that makes none."""
    names = pipe.blocks.output_names
    found = next((name for name in ("images", "videos") if name in names), "")
    if not found:
        raise ReattendError(
            f"{type(pipe).__name__} makes neither images nor videos, so there is nothing to compare; its blocks give: "
            f"{', '.join(names)}: compare the pipeline with its decoding blocks"
        )
    return found


def _drawn_alike(options: dict[str, Any]) -> dict[str, Any]:
    """Options with generators of their own in the state of those that are given, which stay there: every run begins with the same noise."""
    given = options.get("generator")
    if isinstance(given, torch.Generator):
        return {**options, "generator": _twin(given)}
    if isinstance(given, (list, tuple)) and all(isinstance(one, torch.Generator) for one in given):
        return {**options, "generator": [_twin(one) for one in given]}
    return dict(options)


def _of_one_noise(generator: torch.Generator, prompts: int, pictures: int) -> list[torch.Generator]:
    """A generator for every picture, those of a prompt after each other: what one prompt's begin with, all prompts' do."""
    further = [(generator.initial_seed() + number) % 2**63 for number in range(1, pictures)]
    first = [generator, *(torch.Generator(generator.device).manual_seed(seed) for seed in further)]
    return [_twin(one) for _ in range(prompts) for one in first]


def _twin(generator: torch.Generator) -> torch.Generator:
    twin = torch.Generator(generator.device)
    twin.set_state(generator.get_state())
    return twin


def to_tensor(picture: Any) -> Tensor:
    """A PIL picture, array or tensor [h, w], [h, w, c] or [c, h, w] as float64 [c, h, w] in [0, 1]."""
    if isinstance(picture, Tensor):
        tensor = picture.detach().cpu()
    else:
        import numpy as np

        array = np.asarray(picture.convert("RGB") if hasattr(picture, "convert") else picture)
        tensor = torch.from_numpy(np.array(array))
    scale = 1.0 if tensor.is_floating_point() else 255.0
    tensor = tensor.to(torch.float64) / scale
    if tensor.dim() == 2:
        return tensor[None]
    return tensor if tensor.shape[0] in (1, 3) else tensor.permute(2, 0, 1)


def picture_metrics(before: Tensor, after: Tensor) -> dict[str, float]:
    """PSNR in dB (infinite for equal pictures), SSIM and mean absolute difference of two pictures [c, h, w] in [0, 1]."""
    if before.shape != after.shape:
        raise ReattendError(f"pictures of different sizes cannot be compared: {tuple(before.shape)} and {tuple(after.shape)}")
    return {
        "psnr": psnr(before, after),
        "ssim": ssim(before, after),
        "mean_absolute_difference": float((before - after).abs().mean()),
        "identical": bool(torch.equal(before, after)),
    }


def psnr(before: Tensor, after: Tensor) -> float:
    """Peak signal-to-noise ratio in dB for values in [0, 1]."""
    error = float((before.double() - after.double()).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(before: Tensor, after: Tensor, size: int = 11, sigma: float = 1.5) -> float:
    """Structural similarity (Wang et al. 2004) of [c, h, w] in [0, 1]: Gaussian window, K1 = 0.01, K2 = 0.03, mean over channels.

    Only windows that lie wholly inside count; for pictures smaller than the window it shrinks to the largest odd size that fits.
    """
    return float(ssim_map(before, after, size, sigma).mean())


def ssim_map(before: Tensor, after: Tensor, size: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity in every window that lies wholly inside, [c, h - size + 1, w - size + 1]; see `ssim`."""
    size = min(size, *before.shape[1:])
    size -= 1 - size % 2
    places = torch.arange(size, dtype=torch.float64) - size // 2
    line = (-places.square() / (2 * sigma**2)).exp()
    line = line / line.sum()
    window = (line[:, None] * line[None, :])[None, None]

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x[:, None], window)[:, 0]

    x, y = before.double(), after.double()
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))


def difference_picture(before: Tensor, after: Tensor, largest: float) -> Any:
    """Absolute difference, mean over channels, as a grey PIL picture in which white is `largest`."""
    from PIL import Image

    grey = (before - after).abs().mean(dim=0) / max(largest, 1e-12)
    return Image.fromarray((grey.clamp(0, 1) * 255).round().to(torch.uint8).numpy())
