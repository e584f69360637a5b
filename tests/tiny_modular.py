"""Tiny modular pipelines of diffusers', from their denoising steps on: they are given embeddings and give latents."""

from __future__ import annotations

from typing import Any

import torch
from tiny_denoisers import build, qwen_image, sd3, unet
from torch import Tensor, nn

STEPS = 4


def sdxl(scheduler: Any = None) -> tuple[Any, nn.Module, dict[str, Any]]:
    from diffusers import EulerDiscreteScheduler
    from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
        StableDiffusionXLCoreDenoiseStep,
    )

    def model() -> Any:
        return unet(addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=8 + 6 * 4)

    denoiser, _ = build("sdxl", among={"sdxl": model})
    pipe = StableDiffusionXLCoreDenoiseStep().init_pipeline()
    from tiny_pipelines import vae

    pipe.update_components(unet=denoiser, scheduler=scheduler or EulerDiscreteScheduler(), vae=vae(4))
    return pipe, denoiser, {**texts(pooled=True), "height": 16, "width": 16}


def stable_diffusion_3() -> tuple[Any, nn.Module, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
        StableDiffusion3T2ICoreDenoiseStep,
    )

    denoiser, _ = build("sd3", among={"sd3": sd3})
    pipe = StableDiffusion3T2ICoreDenoiseStep().init_pipeline()
    pipe.update_components(transformer=denoiser, scheduler=FlowMatchEulerDiscreteScheduler())
    return pipe, denoiser, {**texts(pooled=True), "height": 64, "width": 64}


def qwen() -> tuple[Any, nn.Module, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage import QwenImageCoreDenoiseStep

    denoiser, _ = build("qwen", among={"qwen": qwen_image})
    pipe = QwenImageCoreDenoiseStep().init_pipeline()
    pipe.update_components(transformer=denoiser, scheduler=FlowMatchEulerDiscreteScheduler())
    masks = {
        "prompt_embeds_mask": torch.ones(1, 5, dtype=torch.long),
        "negative_prompt_embeds_mask": torch.ones(1, 5, dtype=torch.long),
    }
    return pipe, denoiser, {**texts(pooled=False), **masks, "height": 64, "width": 64}


def whole_sdxl() -> Any:
    """From the prompt to the picture; its pictures are of 16 x 16."""
    import tiny_pipelines
    from diffusers import EulerDiscreteScheduler
    from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import StableDiffusionXLAutoBlocks
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    def model() -> Any:
        sizes = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 16 + 6 * 4, "cross_attention_dim": 32}
        return unet(addition_embed_type="text_time", layers_per_block=2, **sizes)

    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(
        unet=build("sdxl", among={"sdxl": model})[0],
        scheduler=EulerDiscreteScheduler(),
        vae=tiny_pipelines.vae(4),
        text_encoder=CLIPTextModel(tiny_pipelines.text_config()).eval(),
        text_encoder_2=CLIPTextModelWithProjection(tiny_pipelines.text_config(projection_dim=16)).eval(),
        tokenizer=tiny_pipelines.tokenizer(),
        tokenizer_2=tiny_pipelines.tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES = {"SDXL": sdxl, "SD3": stable_diffusion_3, "Qwen-Image": qwen}


def texts(pooled: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    given = {name: torch.randn(1, 5, 8, generator=generator) for name in ("prompt_embeds", "negative_prompt_embeds")}
    if pooled:
        for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
            given[name] = torch.randn(1, 8, generator=generator)
    return given


def draw(pipe: Any, call: dict[str, Any], **more: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(7), "output": "latents", **call, **more}
    return pipe(**given)
