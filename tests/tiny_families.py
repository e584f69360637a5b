"""Tiny random denoisers of further families, each with inputs of two samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import tiny_denoisers
import torch
from tiny_denoisers import FRAMES, TEXT, noise
from tiny_streams import Built, ids_of

HALF = torch.tensor([0.5, 0.5])
TIMES = torch.tensor([5, 5])
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}


def made(name: str, **config: Any) -> Any:
    import diffusers

    return getattr(diffusers, name)(**config)


def text(**more: Any) -> dict[str, Any]:
    return {"encoder_hidden_states": noise(2, TEXT, 8), **more}


def flux_like(name: str, start: int = 0, **config: Any) -> Built:
    """Double and single blocks over packed latents."""
    model = made(
        name,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=8,
        axes_dims_rope=(2, 2, 4),
        **HEADS,
        **config,
    )
    return model, text(
        hidden_states=noise(2, 24, 4), timestep=HALF, img_ids=ids_of((start, 4, 6)), txt_ids=torch.zeros(TEXT, 3)
    )


def bria() -> Built:
    return flux_like("BriaTransformer2DModel")


def bria_fibo() -> Built:
    model, inputs = flux_like("BriaFiboTransformer2DModel", text_encoder_dim=4)
    return model, {**inputs, "text_encoder_layers": [noise(2, TEXT, 4) for _ in range(3)]}


def longcat() -> Built:
    return flux_like("LongCatImageTransformer2DModel", start=1, pooled_projection_dim=8)


def ovis() -> Built:
    return flux_like("OvisImageTransformer2DModel", out_channels=4)


def hunyuan_image() -> Built:
    model = made(
        "HunyuanImageTransformer2DModel", in_channels=4, out_channels=4, num_layers=1, num_single_layers=2, num_refiner_layers=1,
        text_embed_dim=8, rope_axes_dim=(4, 4), **HEADS,
    )  # fmt: skip
    return model, text(hidden_states=noise(2, 4, 4, 6), timestep=TIMES.float(), encoder_attention_mask=MASK)


def nucleus() -> Built:
    model = made(
        "NucleusMoEImageTransformer2DModel", patch_size=2, in_channels=16, num_layers=2, joint_attention_dim=8, axes_dims_rope=(2, 2, 4),
        moe_enabled=False, **HEADS,
    )  # fmt: skip
    return model, text(
        hidden_states=noise(2, 24, 16), timestep=HALF, img_shapes=[[(1, 4, 6)]] * 2, encoder_hidden_states_mask=MASK
    )


def prx() -> Built:
    model = made(
        "PRXTransformer2DModel", in_channels=4, context_in_dim=8, hidden_size=16, num_heads=2, depth=2, axes_dim=[4, 4]
    )
    return model, text(hidden_states=noise(2, 4, 8, 12), timestep=HALF)


def glm_image() -> Built:
    model = made(
        "GlmImageTransformer2DModel", in_channels=4, out_channels=4, num_layers=2, text_embed_dim=8, time_embed_dim=8, condition_dim=4,
        prior_vq_quantizer_codebook_size=16, **HEADS,
    )  # fmt: skip
    return model, text(
        hidden_states=noise(2, 4, 8, 12), timestep=TIMES, prior_token_id=torch.zeros(2, 24, dtype=torch.long),
        prior_token_drop=torch.zeros(2, 24, dtype=torch.bool), target_size=torch.full((2, 2), 8.0), crop_coords=torch.zeros(2, 2),
    )  # fmt: skip


def easy_animate() -> Built:
    model = made(
        "EasyAnimateTransformer3DModel", in_channels=4, out_channels=4, patch_size=2, sample_width=12, sample_height=8, num_layers=2,
        mmdit_layers=1, time_embed_dim=8, text_embed_dim=8, num_attention_heads=2, attention_head_dim=16,
    )  # fmt: skip
    return model, text(hidden_states=noise(2, 4, FRAMES, 8, 12), timestep=TIMES)


def kandinsky5() -> Built:
    model = made(
        "Kandinsky5Transformer3DModel", in_visual_dim=4, in_text_dim=8, in_text_dim2=8, time_dim=8, out_visual_dim=4, model_dim=16,
        ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 2, 2),
    )  # fmt: skip
    return model, text(
        hidden_states=noise(2, FRAMES, 8, 12, 4), timestep=TIMES, pooled_projections=noise(2, 8),
        visual_rope_pos=[torch.arange(FRAMES), torch.arange(4), torch.arange(6)], text_rope_pos=torch.arange(TEXT),
    )  # fmt: skip


def wan_like(name: str, **config: Any) -> Built:
    model = made(
        name, **{
            "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 8,
            "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32, **config,
        },
    )  # fmt: skip
    return model, text(hidden_states=noise(2, 4, FRAMES, 8, 12), timestep=TIMES)


def vace() -> Built:
    model, inputs = wan_like("WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=4)
    return model, {**inputs, "control_hidden_states": noise(2, 4, FRAMES, 8, 12)}


def allegro() -> Built:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    model = made(
        "AllegroTransformer3DModel", num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=24, sample_height=8, sample_width=12, sample_frames=FRAMES, caption_channels=8,
    )  # fmt: skip
    *freqs, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(12, ((0, 0), (4, 6)), (4, 6), FRAMES, (1.0, 1.0, 1.0))
    places = torch.cartesian_prod(grid_t.long(), grid_h.long(), grid_w.long()).T.reshape(3, 1, -1)
    rotary = (tuple(freqs), tuple(places))
    return model, text(hidden_states=noise(2, 4, FRAMES, 8, 12), timestep=TIMES, image_rotary_emb=rotary)


def latte() -> Built:
    model = made(
        "LatteTransformer3DModel", in_channels=4, out_channels=4, num_layers=2, sample_size=8, patch_size=2, caption_channels=8,
        cross_attention_dim=16, norm_type="ada_norm_single", num_embeds_ada_norm=1000, video_length=FRAMES,
        norm_elementwise_affine=False, **HEADS,
    )  # fmt: skip
    return model, text(hidden_states=noise(2, 4, FRAMES, 8, 8), timestep=TIMES)


def dit() -> Built:
    model = made("DiTTransformer2DModel", num_layers=2, sample_size=8, norm_num_groups=4, num_embeds_ada_norm=10, **HEADS)
    return model, {"hidden_states": noise(2, 4, 8, 8), "timestep": TIMES, "class_labels": torch.tensor([1, 2])}


def cosmos() -> Built:
    model = made(
        "CosmosTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, text_embed_dim=8,
        adaln_lora_dim=4, max_size=(8, 16, 16), extra_pos_embed_type=None, concat_padding_mask=False,
    )  # fmt: skip
    return model, text(hidden_states=noise(2, 4, FRAMES, 8, 12), timestep=TIMES, fps=8)


def unet2d() -> Built:
    model = made(
        "UNet2DModel", sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D"),
    )  # fmt: skip
    return model, {"sample": noise(2, 4, 8, 12), "timestep": torch.tensor(5)}


def i2vgen() -> Built:
    model = made(
        "I2VGenXLUNet", block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), num_attention_heads=2,
    )  # fmt: skip
    return model, text(
        sample=noise(2, 4, FRAMES, 8, 8), timestep=torch.tensor(5), fps=torch.tensor([8, 8]), image_latents=noise(2, 4, FRAMES, 8, 8),
        image_embeddings=noise(2, 8),
    )  # fmt: skip


def skyreels() -> Built:
    return wan_like("SkyReelsV2Transformer3DModel")


def sana_video() -> Built:
    model = made(
        "SanaVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8, sample_size=8,
    )  # fmt: skip
    return model, text(hidden_states=noise(2, 4, FRAMES, 8, 12), timestep=TIMES)


def joy_image() -> Built:
    model = made(
        "JoyImageEditTransformer3DModel", in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=8, num_layers=2,
        rope_dim_list=[4, 6, 6],
    )  # fmt: skip
    return model, text(hidden_states=noise(2, 2, 4, 1, 8, 12), timestep=TIMES)


def controlnet(name: str, beside: Callable[[], Built], **more: Any) -> Built:
    """A ControlNet alone, made for a denoiser and called with its inputs."""
    import diffusers

    denoiser, inputs = beside()
    model = getattr(diffusers, name).from_transformer(denoiser, num_layers=1, load_weights_from_transformer=False, **more)
    names = inspect.signature(model.forward).parameters
    inputs = {key: value for key, value in inputs.items() if key in names}
    return model, {**inputs, "controlnet_cond": torch.randn_like(inputs["hidden_states"])}


FURTHER: dict[str, Callable[[], Built]] = {
    "AllegroTransformer3DModel": allegro,
    "BriaFiboTransformer2DModel": bria_fibo,
    "BriaTransformer2DModel": bria,
    "CosmosTransformer3DModel": cosmos,
    "DiTTransformer2DModel": dit,
    "EasyAnimateTransformer3DModel": easy_animate,
    "GlmImageTransformer2DModel": glm_image,
    "FluxControlNetModel": lambda: controlnet("FluxControlNetModel", tiny_denoisers.flux, num_single_layers=1, **HEADS),
    "HunyuanImageTransformer2DModel": hunyuan_image,
    "I2VGenXLUNet": i2vgen,
    "JoyImageEditTransformer3DModel": joy_image,
    "Kandinsky5Transformer3DModel": kandinsky5,
    "LatteTransformer3DModel": latte,
    "LongCatImageTransformer2DModel": longcat,
    "NucleusMoEImageTransformer2DModel": nucleus,
    "OvisImageTransformer2DModel": ovis,
    "PRXTransformer2DModel": prx,
    "QwenImageControlNetModel": lambda: controlnet("QwenImageControlNetModel", tiny_denoisers.qwen_image, **HEADS),
    "SD3ControlNetModel": lambda: controlnet("SD3ControlNetModel", tiny_denoisers.sd3, num_extra_conditioning_channels=0),
    "SanaVideoTransformer3DModel": sana_video,
    "SkyReelsV2Transformer3DModel": skyreels,
    "UNet2DModel": unet2d,
    "WanVACETransformer3DModel": vace,
}
