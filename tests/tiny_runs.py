"""Runs of the tiny diffusers pipelines, by how they guide: in one batch, in two calls, or not at all."""

from __future__ import annotations

from typing import Any

import tiny_pipelines
import torch
from tiny_denoisers import pixart
from torch import Tensor

STEPS = 3


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def stable_diffusion(images: int = 1, guidance: float = 4.0) -> tuple[Any, dict[str, Any], str, float]:
    call = {"prompt": ["a fox", "a map"], "num_images_per_prompt": images, "guidance_scale": guidance}
    return tiny_pipelines.stable_diffusion(), call, "unet", guidance


def stable_diffusion_3(images: int = 1, guidance: float = 4.0) -> tuple[Any, dict[str, Any], str, float]:
    call = {"prompt": "a fox", "num_images_per_prompt": images, "guidance_scale": guidance, "height": 16, "width": 16}
    return tiny_pipelines.stable_diffusion_3(), call, "transformer", guidance


def flux(guidance: float = 3.0) -> tuple[Any, dict[str, Any], str, float]:
    torch.manual_seed(3)
    call = {
        "prompt_embeds": torch.randn(2, 5, 8), "pooled_prompt_embeds": torch.randn(2, 8), "height": 16, "width": 16,
        "negative_prompt_embeds": torch.randn(2, 5, 8), "negative_pooled_prompt_embeds": torch.randn(2, 8),
        "true_cfg_scale": guidance,
    }  # fmt: skip
    return tiny_pipelines.flux(), call, "transformer", guidance


def pixart_alpha(guidance: float = 4.0) -> tuple[Any, dict[str, Any], str, float]:
    """A pipeline that tells nobody whether it guides."""
    from diffusers import DDIMScheduler, PixArtAlphaPipeline

    torch.manual_seed(3)
    transformer = pixart()[0].eval()
    pipe = PixArtAlphaPipeline(None, None, tiny_pipelines.vae(4), transformer, DDIMScheduler(clip_sample=False))  # type: ignore[arg-type]
    pipe.set_progress_bar_config(disable=True)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    call = {
        "prompt_embeds": torch.randn(1, 5, 8), "prompt_attention_mask": mask, "negative_prompt_embeds": torch.randn(1, 5, 8),
        "negative_prompt_attention_mask": mask, "guidance_scale": guidance, "negative_prompt": None, "height": 16, "width": 16,
        "use_resolution_binning": False,
    }  # fmt: skip
    return pipe, call, "transformer", guidance


CASES = {
    "SD": stable_diffusion,
    "SD, two images each": lambda: stable_diffusion(images=2),
    "SD, no guidance": lambda: stable_diffusion(guidance=1.0),
    "SD3": stable_diffusion_3,
    "SD3, two images, no guidance": lambda: stable_diffusion_3(images=2, guidance=1.0),
    "Flux, two calls": flux,
    "Flux, no guidance": lambda: flux(guidance=1.0),
    "PixArt": pixart_alpha,
}


def draw(pipe: Any, call: dict[str, Any], **more: Any) -> Tensor:
    return pipe(**{"num_inference_steps": STEPS, "generator": seeded(), "output_type": "latent", **call, **more}).images
