"""Tiny random transformers that make videos, of families that no other file builds; each with inputs of two samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tiny_denoisers import FRAMES, TEXT, noise
from tiny_families import HEADS, MASK, TIMES, made, text, wan_like
from tiny_streams import Built

VIDEO = (2, 4, FRAMES, 8, 12)


def frames(*numbers: int) -> torch.Tensor:
    """Places of frames in time, one row for both samples."""
    return torch.tensor(numbers)


def any_flow() -> Built:
    model, inputs = wan_like("AnyFlowTransformer3DModel")
    times = torch.full((2, FRAMES), 5.0)
    return model, {**inputs, "hidden_states": noise(2, FRAMES, 4, 8, 12), "timestep": times, "r_timestep": times - 1}


def any_flow_far() -> Built:
    """AnyFlow that makes a video chunk by chunk."""
    model, inputs = wan_like("AnyFlowFARTransformer3DModel", chunk_partition=(1, 2))
    times = torch.full((2, FRAMES), 5.0)
    return model, {
        **inputs, "hidden_states": noise(2, FRAMES, 4, 8, 12), "timestep": times, "r_timestep": times - 1, "chunk_partition": [1, 2],
    }  # fmt: skip


def chrono_edit() -> Built:
    return wan_like("ChronoEditTransformer3DModel")


def wan_animate() -> Built:
    """Wan as it moves a person as another one moves: image and text in one cross-attention, faces in another."""
    model, inputs = wan_like(
        "WanAnimateTransformer3DModel", in_channels=12, latent_channels=4, image_dim=8, added_kv_proj_dim=24, motion_encoder_size=8,
        motion_encoder_channel_sizes={"4": 4, "8": 4}, motion_style_dim=8, motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=16,
        face_encoder_num_heads=2, inject_face_latents_blocks=2,
    )  # fmt: skip
    return model, {
        **inputs,
        "encoder_hidden_states": noise(2, 512, 8),
        "encoder_hidden_states_image": noise(2, 17, 8),
        "hidden_states": noise(2, 12, FRAMES, 8, 12),
        "pose_hidden_states": noise(2, 4, FRAMES - 1, 8, 12),
        "face_pixel_values": noise(2, 3, 5, 8, 8),
    }


def wan_animate2() -> Built:
    """The pass over the person that is shown, which fills a store of keys."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    model = made(
        "WanAnimate2Transformer3DModel", text_len=TEXT, in_dim=8, dim=24, ffn_dim=32, freq_dim=16, text_dim=8, out_dim=4, num_heads=2,
        num_layers=2, use_img_emb=False,
    )  # fmt: skip
    return model, {
        "hidden_states": [noise(4, 1, 8, 12), noise(4, 1, 8, 12)], "timestep": TIMES, "condition_latents": [noise(4, 1, 8, 12)] * 2,
        "encoder_hidden_states": [noise(TEXT, 8), noise(TEXT, 8)], "kv_cache": WanAnimate2KVCache(2), "kv_cache_mode": "extract",
        "seq_len": 24, "offset_grid_sizes": torch.tensor([[1, 4, 6]] * 2),
    }  # fmt: skip


def helios() -> Built:
    """Its stream begins with latents of earlier frames, the oldest in coarser patches."""
    model = made(
        "HeliosTransformer3DModel", num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_dim=(4, 4, 4),
    )  # fmt: skip
    return model, text(
        hidden_states=noise(*VIDEO), timestep=TIMES, indices_hidden_states=frames(7, 8, 9).expand(2, -1),
        indices_latents_history_short=frames(6).expand(2, -1), indices_latents_history_mid=frames(4, 5).expand(2, -1),
        indices_latents_history_long=frames(0, 1, 2, 3).expand(2, -1), latents_history_short=noise(2, 4, 1, 8, 12),
        latents_history_mid=noise(2, 4, 2, 8, 12), latents_history_long=noise(2, 4, 4, 8, 12),
    )  # fmt: skip


def framepack() -> Built:
    model = made(
        "HunyuanVideoFramepackTransformer3DModel", in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1,
        text_embed_dim=8, pooled_projection_dim=8, rope_axes_dim=(2, 2, 4), has_image_proj=True, image_proj_dim=8,
        has_clean_x_embedder=True, **HEADS,
    )  # fmt: skip
    return model, text(
        hidden_states=noise(*VIDEO), timestep=TIMES, encoder_attention_mask=MASK, pooled_projections=noise(2, 8),
        image_embeds=noise(2, 3, 8), indices_latents=frames(7, 8, 9), guidance=torch.tensor([6000.0, 6000.0]),
        latents_clean=noise(2, 4, 2, 8, 12), indices_latents_clean=frames(0, 10), latents_history_2x=noise(2, 4, 2, 8, 12),
        indices_latents_history_2x=frames(5, 6), latents_history_4x=noise(2, 4, 4, 8, 12),
        indices_latents_history_4x=frames(1, 2, 3, 4),
    )  # fmt: skip


def hunyuan_video15() -> Built:
    model = made(
        "HunyuanVideo15Transformer3DModel", in_channels=4, out_channels=4, num_layers=2, num_refiner_layers=1, text_embed_dim=8,
        text_embed_2_dim=8, image_embed_dim=8, rope_axes_dim=(2, 2, 4), **HEADS,
    )  # fmt: skip
    return model, text(
        hidden_states=noise(2, 4, FRAMES, 4, 6), timestep=TIMES.float(), encoder_attention_mask=MASK, encoder_hidden_states_2=noise(2, 3, 8),
        encoder_attention_mask_2=torch.tensor([[1, 1, 0], [1, 0, 0]]), image_embeds=noise(2, 4, 8),
    )  # fmt: skip


def motif_video() -> Built:
    model = made(
        "MotifVideoTransformer3DModel", in_channels=4, out_channels=4, num_layers=1, num_single_layers=2, num_decoder_layers=1,
        text_embed_dim=8, rope_axes_dim=(2, 2, 4), enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True, **HEADS,
    )  # fmt: skip
    return model, text(hidden_states=noise(*VIDEO), timestep=TIMES, encoder_attention_mask=MASK)


def kandinsky6() -> Built:
    """Video and sound in one block, each with a text of its own."""
    model = made(
        "Kandinsky6Transformer3DModel", in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=8, time_dim=8, model_dim=16,
        ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 2, 2), visual_cond=False, in_audio_dim=4, out_audio_dim=4,
    )  # fmt: skip
    return model, text(
        hidden_states=noise(2, FRAMES, 8, 12, 4),
        timestep=TIMES,
        pooled_projections=noise(2, 8),
        audio_hidden_states=noise(2, 7, 4),
    )


def kandinsky6_sr() -> Built:
    model = made(
        "Kandinsky6SRTransformer3DModel", in_visual_dim=4, out_visual_dim=4, time_dim=8, model_dim=16, ff_dim=32, num_visual_blocks=2,
        axes_dims=(4, 2, 2),
    )  # fmt: skip
    return model, {"hidden_states": noise(2, FRAMES, 8, 16, 9), "timestep": TIMES}


def ltx2() -> Built:
    """Video and sound in streams of their own that look at each other."""
    model = made(
        "LTX2VideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8, audio_cross_attention_dim=16,
        num_layers=2, caption_channels=8,
    )  # fmt: skip
    return model, text(
        hidden_states=noise(2, FRAMES * 24, 4), audio_hidden_states=noise(2, 7, 4), audio_encoder_hidden_states=noise(2, TEXT, 8),
        timestep=TIMES, encoder_attention_mask=MASK, audio_encoder_attention_mask=MASK, num_frames=FRAMES, height=4, width=6,
        audio_num_frames=7,
    )  # fmt: skip


def sana_wm_refiner() -> Built:
    model = made(
        "SanaWMLTX2RefinerTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12,
        cross_attention_dim=24, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8,
        audio_cross_attention_dim=16, num_layers=2, caption_channels=8,
    )  # fmt: skip
    count = FRAMES * 24
    rotary = model.build_rotary_emb_for_absolute_positions(2, list(range(FRAMES)), 4, 6, torch.device("cpu"), 24.0)
    return model, text(hidden_states=noise(2, count, 4), timestep=torch.full((2, count), 5.0), video_rotary_emb=rotary)


def sana_wm() -> Built:
    model = made(
        "SanaWMTransformer3DModel", in_channels=4, num_layers=2, hidden_size=48, num_attention_heads=2, softmax_every_n=2,
        linear_head_dim=24, caption_channels=8, image_size=256, use_chunk_plucker_post_attn=False, fp32_attention=False,
    )  # fmt: skip
    camera = torch.cat([torch.eye(4).flatten(), torch.tensor([12.0, 8.0, 6.0, 4.0])]).expand(2, FRAMES, -1)
    return model, {
        "hidden_states": noise(*VIDEO), "timestep": torch.full((2, 1, FRAMES), 5), "encoder_hidden_states": noise(2, 1, TEXT, 8),
        "encoder_attention_mask": MASK, "camera_conditions": camera,
    }  # fmt: skip


VIDEOS: dict[str, Callable[[], Built]] = {
    "AnyFlowFARTransformer3DModel": any_flow_far,
    "AnyFlowTransformer3DModel": any_flow,
    "ChronoEditTransformer3DModel": chrono_edit,
    "HeliosTransformer3DModel": helios,
    "HunyuanVideo15Transformer3DModel": hunyuan_video15,
    "HunyuanVideoFramepackTransformer3DModel": framepack,
    "Kandinsky6SRTransformer3DModel": kandinsky6_sr,
    "Kandinsky6Transformer3DModel": kandinsky6,
    "LTX2VideoTransformer3DModel": ltx2,
    "MotifVideoTransformer3DModel": motif_video,
    "SanaWMLTX2RefinerTransformer3DModel": sana_wm_refiner,
    "SanaWMTransformer3DModel": sana_wm,
    "WanAnimate2Transformer3DModel": wan_animate2,
    "WanAnimateTransformer3DModel": wan_animate,
}
