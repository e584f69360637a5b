"""Tiny random denoisers of every diffusers family that reattend knows, each with inputs for one forward pass of two samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

TEXT = 5
FRAMES = 3


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape)


def unet(**changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8,
        "attention_head_dim": 2, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    model = UNet2DConditionModel(**{**config, **changes})
    return model, {
        "sample": noise(2, 4, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": noise(2, TEXT, 8),
    }


def unet_motion() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import UNetMotionModel

    model = UNetMotionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        num_attention_heads=2, motion_num_attention_heads=2, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    )  # fmt: skip
    text = noise(2, TEXT, 8).repeat_interleave(FRAMES, dim=0)
    return model, {
        "sample": noise(2, 4, FRAMES, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": text,
    }


def sd3(**changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import SD3Transformer2DModel

    config = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 8, "caption_projection_dim": 16, "pooled_projection_dim": 8,
        "pos_embed_max_size": 8,
    }  # fmt: skip
    return SD3Transformer2DModel(**{**config, **changes}), {
        "hidden_states": noise(2, 4, 8, 8),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": noise(2, TEXT, 8),
        "pooled_projections": noise(2, 8),
    }


def sd35() -> tuple[nn.Module, dict[str, Any]]:
    return sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm")


def flux() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    grid = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1)
    return model, {
        "hidden_states": noise(2, 16, 4),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": noise(2, TEXT, 8),
        "pooled_projections": noise(2, 8),
        "img_ids": grid.reshape(16, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def pixart() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, norm_num_groups=4,
        cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 8, 8),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": noise(2, TEXT, 8),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def hunyuan_dit() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import HunyuanDiT2DModel
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    model = HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=16, num_layers=2,
        cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=8, text_len=3, text_len_t5=2,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 8, 8),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": noise(2, 3, 8),
        "text_embedding_mask": torch.ones(2, 3),
        "encoder_hidden_states_t5": noise(2, 2, 8),
        "text_embedding_mask_t5": torch.ones(2, 2),
        "image_meta_size": torch.tensor([[8.0] * 6] * 2),
        "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": get_2d_rotary_pos_embed(8, ((0, 0), (4, 4)), (4, 4), output_type="pt"),
    }


def sana() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import SanaTransformer2DModel

    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8, sample_size=8,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 8, 8),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": noise(2, TEXT, 8),
    }


def lumina2() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import Lumina2Transformer2DModel

    model = Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1, num_attention_heads=4,
        num_kv_heads=2, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(32, 16, 16), cap_feat_dim=8,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 8, 8),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": noise(2, TEXT, 8),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool),
    }


def aura_flow() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import AuraFlowTransformer2DModel

    model = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 8, 8),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": noise(2, TEXT, 8),
    }


def cogvideox() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=8,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=TEXT,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, FRAMES, 4, 8, 8),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": noise(2, TEXT, 8),
    }


def hunyuan_video() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=8, pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 2, 8, 8),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": noise(2, TEXT, 8),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "pooled_projections": noise(2, 8),
        "guidance": torch.tensor([6000.0, 6000.0]),
    }


def ltx() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=2,
        caption_channels=8,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 2 * 4 * 4, 4),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": noise(2, TEXT, 8),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }


def wan() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 2, 8, 8),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": noise(2, TEXT, 8),
    }


def mochi() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import MochiTransformer3DModel

    model = MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=3, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=8, time_embed_dim=8, max_sequence_length=TEXT,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 2, 8, 8),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": noise(2, TEXT, 8),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool),
    }


def qwen_image() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    # older diffusers want the text lengths beside the mask
    lengths = {"txt_seq_lens": [TEXT, TEXT]} if "txt_seq_lens" in inspect.signature(model.forward).parameters else {}
    return model, lengths | {
        "hidden_states": noise(2, 16, 16),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": noise(2, TEXT, 8),
        "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "img_shapes": [[(1, 4, 4)]] * 2,
    }


DENOISERS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "UNet2DConditionModel": unet,
    "UNetMotionModel": unet_motion,
    "SD3Transformer2DModel": sd3,
    "SD3Transformer2DModel (3.5)": sd35,
    "FluxTransformer2DModel": flux,
    "PixArtTransformer2DModel": pixart,
    "HunyuanDiT2DModel": hunyuan_dit,
    "SanaTransformer2DModel": sana,
    "Lumina2Transformer2DModel": lumina2,
    "AuraFlowTransformer2DModel": aura_flow,
    "CogVideoXTransformer3DModel": cogvideox,
    "HunyuanVideoTransformer3DModel": hunyuan_video,
    "LTXVideoTransformer3DModel": ltx,
    "WanTransformer3DModel": wan,
    "MochiTransformer3DModel": mochi,
    "QwenImageTransformer2DModel": qwen_image,
}


def build(
    name: str, seed: int = 0, among: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = DENOISERS
) -> tuple[nn.Module, dict[str, Any]]:
    """A denoiser in eval mode with non-degenerate random weights (many end in a zero-initialised projection), and its inputs."""
    torch.manual_seed(seed)
    model, inputs = among[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return model.eval().requires_grad_(False), inputs
