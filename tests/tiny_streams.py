"""Tiny random denoisers beside those of `tiny_denoisers`, whose tokens lie in another way; each with inputs of two samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_denoisers import FRAMES, TEXT, noise
from torch import nn

Built = tuple[nn.Module, dict[str, Any]]
TIMES = {"timestep": torch.tensor([5, 5])}


def ids_of(*images: tuple[int, int, int], width: int = 3) -> torch.Tensor:
    """img_ids [N, width] of images given as (number, height, width)."""
    parts = []
    for number, rows, cols in images:
        ids = torch.zeros(rows, cols, width)
        ids[..., 0] = number
        ids[..., 1] = torch.arange(float(rows))[:, None]
        ids[..., 2] = torch.arange(float(cols))
        parts.append(ids.view(-1, width))
    return torch.cat(parts)


def cogview(name: str) -> Built:
    import diffusers

    config = {
        "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "out_channels": 4,
        "text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8,
    }  # fmt: skip
    if name == "CogView4Transformer2DModel":
        config["rope_axes_dim"] = (8, 8)
    size = {"original_size": torch.full((2, 2), 8.0), "target_size": torch.full((2, 2), 8.0), "crop_coords": torch.zeros(2, 2)}
    return getattr(diffusers, name)(**config), {
        "hidden_states": noise(2, 4, 8, 12), "encoder_hidden_states": noise(2, TEXT, 8), **TIMES, **size,
    }  # fmt: skip


def consisid() -> Built:
    from diffusers import ConsisIDTransformer3DModel

    model = ConsisIDTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=8, num_layers=2,
        sample_width=12, sample_height=8, sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=TEXT,
        is_train_face=False,
    )  # fmt: skip
    return model, {"hidden_states": noise(2, FRAMES, 4, 8, 12), "encoder_hidden_states": noise(2, TEXT, 8), **TIMES}


def ernie() -> Built:
    from diffusers import ErnieImageTransformer2DModel

    model = ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=4, out_channels=4, patch_size=1,
        text_in_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 4, 6),
        "timestep": torch.tensor([5.0, 5.0]),
        "text_bth": noise(2, TEXT, 8),
        "text_lens": torch.tensor([TEXT, 3]),
    }


def hidream() -> Built:
    from diffusers import HiDreamImageTransformer2DModel

    model = HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        caption_channels=[8, 8], text_emb_dim=8, num_routed_experts=2, num_activated_experts=1, axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8), llama_layers=[0, 1], force_inference_output=True,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, 8, 6),
        "timesteps": torch.tensor([5, 5]),
        "encoder_hidden_states_t5": noise(2, TEXT, 8),
        "encoder_hidden_states_llama3": noise(2, 2, 4, 8),
        "pooled_embeds": noise(2, 8),
    }


def flux(images: list[tuple[int, int, int]]) -> Built:
    """Flux as Kontext calls it: further images after the one that is made."""
    import tiny_denoisers

    model, inputs = tiny_denoisers.flux()
    ids = ids_of(*images)
    return model, {**inputs, "img_ids": ids, "hidden_states": noise(2, len(ids), 4)}


def flux2() -> Built:
    from diffusers import Flux2Transformer2DModel

    model = Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2),
    )  # fmt: skip
    ids = ids_of((0, 4, 6), (10, 2, 3), width=4)[None].expand(2, -1, -1)
    return model, {
        "hidden_states": noise(2, 30, 4),
        "encoder_hidden_states": noise(2, TEXT, 8),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(2, TEXT, 4),
        "guidance": torch.tensor([1.0, 1.0]),
    }


def chroma() -> Built:
    from diffusers import ChromaTransformer2DModel

    model = ChromaTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(2, 2, 4), approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 24, 4),
        "encoder_hidden_states": noise(2, TEXT, 8),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": ids_of((0, 4, 6)),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def qwen(shapes: list[tuple[int, int, int]], **changes: Any) -> Built:
    """Qwen-Image as its editing pipelines call it."""
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(2, 2, 4), **changes,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, sum(f * h * w for f, h, w in shapes), 16),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": noise(2, TEXT, 8),
        "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "img_shapes": [shapes] * 2,
    }


def z_image() -> Built:
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8, axes_dims=[4, 6, 6],
        axes_lens=[256, 64, 64],
    )  # fmt: skip
    return model, {
        "x": [noise(4, 1, 8, 12), noise(4, 1, 8, 12)],
        "t": torch.tensor([0.5, 0.5]),
        "cap_feats": [noise(TEXT, 8), noise(40, 8)],
    }


def kandinsky() -> Built:
    """The UNet of Kandinsky 2.2: its queries look at the text's keys and their own."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=8, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        addition_embed_type="image", encoder_hid_dim=8, encoder_hid_dim_type="image_proj", cross_attention_dim=32,
        attention_head_dim=4, resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    return model, {
        "sample": noise(2, 4, 8, 12),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": None,
        "added_cond_kwargs": {"image_embeds": noise(2, 8)},
    }


def unet3d() -> Built:
    from diffusers import UNet3DConditionModel

    model = UNet3DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    return model, {
        "sample": noise(2, 4, FRAMES, 8, 12),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": noise(2, TEXT, 8),
    }


def svd() -> Built:
    """Stable Video Diffusion: what it is told is an image's embedding, no text."""
    from diffusers import UNetSpatioTemporalConditionModel

    model = UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, num_attention_heads=(2, 2),
        cross_attention_dim=8, addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, num_frames=FRAMES,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )  # fmt: skip
    return model, {
        "sample": noise(2, FRAMES, 4, 8, 12),
        "timestep": torch.tensor(5.0),
        "encoder_hidden_states": noise(2, 1, 8),
        "added_time_ids": torch.zeros(2, 3),
    }


def cascade() -> Built:
    from diffusers import StableCascadeUNet

    model = StableCascadeUNet(
        in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, patch_size=1, conditioning_dim=16, block_out_channels=(16, 16),
        num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
        clip_text_in_channels=8, clip_text_pooled_in_channels=8, clip_image_in_channels=8, clip_seq=4, effnet_in_channels=None,
        pixel_mapper_in_channels=None, kernel_size=3, dropout=(0.0, 0.0), self_attn=True, timestep_conditioning_type=("sca", "crp"),
        switch_level=(False,),
    )  # fmt: skip
    return model, {
        "sample": noise(2, 4, 8, 12),
        "timestep_ratio": torch.tensor([0.5, 0.5]),
        "clip_text_pooled": noise(2, 1, 8),
        "clip_text": noise(2, TEXT, 8),
        "clip_img": noise(2, 1, 8),
    }


def wan_i2v() -> Built:
    """Wan as it makes a video from an image: its keys are the image's, then, in a second call, the text's."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32, image_dim=8, added_kv_proj_dim=24,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 4, FRAMES, 8, 12),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": noise(2, 512, 8),
        "encoder_hidden_states_image": noise(2, 17, 8),
    }


def prior() -> Built:
    from diffusers import PriorTransformer

    model = PriorTransformer(num_attention_heads=2, attention_head_dim=4, num_layers=2, embedding_dim=8, num_embeddings=TEXT)
    return model, {
        "hidden_states": noise(2, 8),
        "timestep": torch.tensor([5, 5]),
        "proj_embedding": noise(2, 8),
        "encoder_hidden_states": noise(2, TEXT, 8),
    }


STREAMS: dict[str, Callable[[], Built]] = {
    "CogView4Transformer2DModel": lambda: cogview("CogView4Transformer2DModel"),
    "CogView3PlusTransformer2DModel": lambda: cogview("CogView3PlusTransformer2DModel"),
    "ConsisIDTransformer3DModel": consisid,
    "ErnieImageTransformer2DModel": ernie,
    "HiDreamImageTransformer2DModel": hidream,
    "FluxTransformer2DModel (Kontext)": lambda: flux([(0, 4, 6), (1, 2, 3), (1, 3, 2)]),
    "Flux2Transformer2DModel": flux2,
    "ChromaTransformer2DModel": chroma,
    "QwenImageTransformer2DModel (edit)": lambda: qwen([(1, 4, 6), (1, 2, 3)]),
    "QwenImageTransformer2DModel (layered)": lambda: qwen([(1, 4, 6), (1, 4, 6), (1, 2, 3)], use_layer3d_rope=True),
    "ZImageTransformer2DModel": z_image,
    "UNet2DConditionModel (Kandinsky)": kandinsky,
    "UNet3DConditionModel": unet3d,
    "UNetSpatioTemporalConditionModel": svd,
    "StableCascadeUNet": cascade,
    "WanTransformer3DModel (image)": wan_i2v,
    "PriorTransformer": prior,
}
