"""Runs of tiny pipelines, watched step by step, under schedulers by name."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor


def scheduled(pipe: Any, scheduler: str | None) -> Any:
    """The pipeline with a scheduler of this class of diffusers; None: its own."""
    if scheduler is not None:
        more = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **more)
    return pipe


def draw_steps(pipe: Any, **more: Any) -> tuple[Tensor, list[Tensor]]:
    """The last latents, and those after every step."""
    steps: list[Tensor] = []
    images = pipe(**{
        "num_inference_steps": 5, "generator": torch.Generator().manual_seed(1), "output_type": "latent",
        "callback_on_step_end": lambda _, step, t, given: steps.append(given["latents"]) or given, **more,
    }).images  # fmt: skip
    return images, steps
