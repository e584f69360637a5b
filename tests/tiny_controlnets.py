"""Tiny random ControlNets, and the UNet that has one inside, each with inputs of two samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_denoisers import DENOISERS, FRAMES, TEXT, noise
from tiny_families import HALF, MASK, TIMES, made, text
from tiny_streams import STREAMS, Built, ids_of

# a UNet of two levels that attends to the text on the first
LEVELS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8}
DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")


def picture(frames: int = 0) -> torch.Tensor:
    """What a ControlNet is shown: an image of 16 x 24 pixels, halved once by its embedding."""
    return noise(2, 3, frames, 16, 24) if frames else noise(2, 3, 16, 24)


def controlnet() -> Built:
    model = made(
        "ControlNetModel", down_block_types=DOWN, attention_head_dim=2, conditioning_embedding_out_channels=(4, 8), **LEVELS
    )
    return model, text(sample=noise(2, 4, 8, 12), timestep=torch.tensor(500), controlnet_cond=picture())


def union() -> Built:
    model = made(
        "ControlNetUnionModel", down_block_types=DOWN, attention_head_dim=2, conditioning_embedding_out_channels=(4, 8),
        addition_time_embed_dim=8, num_control_type=2, num_trans_channel=16, num_trans_head=2, num_proj_channel=16, **LEVELS,
    )  # fmt: skip
    return model, text(
        sample=noise(2, 4, 8, 12), timestep=torch.tensor(500), controlnet_cond=[picture()], control_type=torch.tensor([[0, 1], [0, 1]]),
        control_type_idx=[1],
    )  # fmt: skip


def sparse() -> Built:
    """SparseCtrl, to which the pipeline gives the text once for each frame."""
    model = made(
        "SparseControlNetModel", down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), num_attention_heads=2,
        motion_num_attention_heads=2, **LEVELS,
    )  # fmt: skip
    return model, {
        "sample": noise(2, 4, FRAMES, 8, 12),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": noise(2, TEXT, 8).repeat_interleave(FRAMES, dim=0),
        "controlnet_cond": noise(2, 4, FRAMES, 8, 12),
        "conditioning_mask": torch.ones(2, 1, FRAMES, 8, 12),
    }


def xs() -> Built:
    model = made(
        "UNetControlNetXSModel", sample_size=8, down_block_types=DOWN, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        num_attention_heads=2, block_out_channels=(16, 32), norm_num_groups=4, cross_attention_dim=8, ctrl_num_attention_heads=2,
        ctrl_block_out_channels=(4, 8), ctrl_conditioning_embedding_out_channels=(4, 8), ctrl_max_norm_num_groups=4,
    )  # fmt: skip
    return model, text(sample=noise(2, 4, 8, 12), timestep=torch.tensor(500), controlnet_cond=picture())


def flux() -> Built:
    model = made(
        "FluxControlNetModel", patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=[2, 2, 4],
    )  # fmt: skip
    return model, text(
        hidden_states=noise(2, 24, 4), controlnet_cond=noise(2, 24, 4), timestep=HALF, pooled_projections=noise(2, 8),
        img_ids=ids_of((0, 4, 6)), txt_ids=torch.zeros(TEXT, 3),
    )  # fmt: skip


def flux_union() -> Built:
    """Its stream begins with a token that says which kind of picture it is shown."""
    model = made(
        "FluxControlNetModel", patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=[2, 2, 4], num_mode=3,
    )  # fmt: skip
    return model, {**flux()[1], "controlnet_mode": torch.tensor([[1], [1]])}


def sd3(**changes: Any) -> Built:
    model = made(
        "SD3ControlNetModel", **{
            "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
            "joint_attention_dim": 8, "caption_projection_dim": 16, "pooled_projection_dim": 8, "pos_embed_max_size": 8, **changes,
        },
    )  # fmt: skip
    return model, text(
        hidden_states=noise(2, 4, 8, 12), controlnet_cond=noise(2, 4, 8, 12), timestep=TIMES, pooled_projections=noise(2, 8)
    )


def sd3_image_only() -> Built:
    """The ControlNets of Stable Diffusion 3.5, which are given no text and their latents already embedded."""
    model, inputs = sd3(use_pos_embed=False, joint_attention_dim=None)
    return model, {**inputs, "encoder_hidden_states": None, "hidden_states": noise(2, 24, 16)}


def qwen_image() -> Built:
    model = made(
        "QwenImageControlNetModel", in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return model, text(
        hidden_states=noise(2, 24, 16), controlnet_cond=noise(2, 24, 16), timestep=HALF, encoder_hidden_states_mask=MASK,
        img_shapes=[[(1, 4, 6)]] * 2,
    )  # fmt: skip


def hunyuan_dit() -> Built:
    _, inputs = DENOISERS["HunyuanDiT2DModel"]()
    model = made(
        "HunyuanDiT2DControlNetModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=16,
        transformer_num_layers=4, cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=8, text_len=3, text_len_t5=2,
    )  # fmt: skip
    return model, {**inputs, "controlnet_cond": noise(2, 4, 8, 8)}


def sana() -> Built:
    model = made(
        "SanaControlNetModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8, sample_size=8,
    )  # fmt: skip
    return model, text(hidden_states=noise(2, 4, 8, 12), timestep=TIMES, controlnet_cond=noise(2, 4, 8, 12))


def cosmos() -> Built:
    from diffusers.utils import is_torchvision_available

    if not is_torchvision_available():
        raise ImportError("its forward needs torchvision")
    model = made(
        "CosmosControlNetModel", n_controlnet_blocks=2, in_channels=6, latent_channels=6, model_channels=24, num_attention_heads=2,
        attention_head_dim=12, text_embed_dim=8, adaln_lora_dim=4, max_size=(8, 16, 16),
    )  # fmt: skip
    return model, text(
        controls_latents=noise(2, 4, FRAMES, 8, 12), latents=noise(2, 4, FRAMES, 8, 12), timestep=TIMES,
        condition_mask=torch.ones(2, 1, FRAMES, 8, 12), padding_mask=torch.zeros(1, 1, 8, 12), fps=8,
    )  # fmt: skip


def z_image() -> Built:
    """It works with the embeddings and refiners of the transformer that it steers."""
    transformer, inputs = STREAMS["ZImageTransformer2DModel"]()
    model = made(
        "ZImageControlNetModel", control_layers_places=[0, 1], control_refiner_layers_places=[0], control_in_dim=4, dim=32,
        n_refiner_layers=1, n_heads=2, n_kv_heads=2,
    )  # fmt: skip
    model = type(model).from_transformer(model, transformer)
    return model, {**inputs, "control_context": [noise(4, 1, 8, 12), noise(4, 1, 8, 12)]}


CONTROLNETS: dict[str, Callable[[], Built]] = {
    "ControlNetModel": controlnet,
    "ControlNetUnionModel": union,
    "CosmosControlNetModel": cosmos,
    "FluxControlNetModel": flux,
    "FluxControlNetModel (union)": flux_union,
    "HunyuanDiT2DControlNetModel": hunyuan_dit,
    "QwenImageControlNetModel": qwen_image,
    "SD3ControlNetModel": sd3,
    "SD3ControlNetModel (image only)": sd3_image_only,
    "SanaControlNetModel": sana,
    "SparseControlNetModel": sparse,
    "UNetControlNetXSModel": xs,
    "ZImageControlNetModel": z_image,
}
