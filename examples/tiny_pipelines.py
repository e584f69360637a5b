"""Pipelines with tiny random weights, built from configs: they draw noise, but they run anywhere in seconds and without a download."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

LETTERS = [chr(c) for c in range(ord("!"), ord("~") + 1)]


def tokenizer() -> CLIPTokenizer:
    """Letters as tokens, with CLIP's special ones."""
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=64)


def text_config(**changes: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=2 + 2 * len(LETTERS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1, **changes,
    )  # fmt: skip


def vae(channels: int, **changes: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=channels, norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **changes,
    ).eval()  # fmt: skip


def stable_diffusion(in_channels: int = 4) -> StableDiffusionPipeline:
    """A UNet with one text encoder, as Stable Diffusion 1.5 has them; images of 16 x 16. in_channels: 9 for an inpainting UNet."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=in_channels, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=16, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae(4), text_encoder=CLIPTextModel(text_config()).eval(), tokenizer=tokenizer(), unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def controlnet(channels: int = 3) -> ControlNetModel:
    """A ControlNet for `stable_diffusion`, for pictures of so many channels, whose zero convolutions let something through."""
    torch.manual_seed(1)
    model = ControlNetModel(
        in_channels=4, conditioning_channels=channels, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=16, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(8, 16),
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "controlnet_down_blocks" in name or "controlnet_mid_block" in name or "conv_out" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    """An MM-DiT with two text encoders (the third may be missing, as it may in the real one); images of 16 x 16."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, pos_embed_max_size=16,
    )  # fmt: skip
    encoders = [CLIPTextModelWithProjection(text_config(projection_dim=16)).eval() for _ in range(2)]
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(4, shift_factor=0.0),
        text_encoder=encoders[0], tokenizer=tokenizer(), text_encoder_2=encoders[1], tokenizer_2=tokenizer(),
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux(in_channels: int = 16) -> FluxPipeline:
    """Double and single blocks, and true guidance in two calls; call it with prompt_embeds, it has no text encoders.

    in_channels: more than 16 for a model that is given other things beside the latents.
    """
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=in_channels, out_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    pipe = FluxPipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(4, shift_factor=0.0),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
