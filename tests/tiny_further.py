"""Tiny random transformers whose image lies in one sequence with a text, of families that no other file builds; with inputs of two samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tiny_denoisers import TEXT, noise
from tiny_families import HALF, HEADS, MASK, TIMES, made, text
from tiny_streams import Built, ids_of


def flux3(reference: bool = False) -> Built:
    """Text, image and reference each in blocks of their own, then all three together."""
    model = made(
        "Flux3Transformer2DModel", in_channels=4, cond_in_channels=4, num_layers=1, num_single_layers=2, joint_attention_dim=8,
        timestep_channels=8, axes_dims_rope=(2, 2, 2, 2), **HEADS,
    )  # fmt: skip
    # as large as the image that is made
    more = {"image_cond_hidden_states": noise(2, 24, 4), "image_cond_ids": ids_of((10, 4, 6), width=4)} if reference else {}
    return model, text(
        hidden_states=noise(2, 24, 4), timestep=HALF, img_ids=ids_of((0, 4, 6), width=4), txt_ids=torch.zeros(TEXT, 4), **more
    )


def ideogram4() -> Built:
    """One sequence in which an indicator tells text (3) from image (2)."""
    from diffusers.models.transformers import transformer_ideogram4 as home

    model = made(
        "Ideogram4Transformer2DModel", in_channels=4, num_layers=2, intermediate_size=32, adaln_dim=8, llm_features_dim=8,
        mrope_section=(2, 1, 1), **HEADS,
    )  # fmt: skip
    places = torch.cat([torch.arange(TEXT)[:, None].expand(-1, 3), ids_of((TEXT, 4, 6)).long()])
    roles = torch.tensor([home.LLM_TOKEN_INDICATOR] * TEXT + [home.OUTPUT_IMAGE_INDICATOR] * 24)
    return model, {
        "hidden_states": noise(2, TEXT + 24, 4), "timestep": HALF, "encoder_hidden_states": noise(2, TEXT + 24, 8),
        "position_ids": places.expand(2, -1, -1), "segment_ids": torch.zeros(2, TEXT + 24, dtype=torch.long),
        "indicator": roles.expand(2, -1),
    }  # fmt: skip


def joy_image_plus() -> Built:
    model = made(
        "JoyImageEditPlusTransformer3DModel", in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=8, num_layers=2,
        rope_dim_list=[4, 6, 6],
    )  # fmt: skip
    return model, text(
        hidden_states=noise(2, 30, 4, 1, 2, 2),
        timestep=TIMES,
        encoder_hidden_states_mask=MASK,
        shape_list=[[(1, 4, 6), (1, 2, 3)]] * 2,
    )


def krea2() -> Built:
    model = made(
        "Krea2Transformer2DModel", in_channels=4, num_layers=2, num_key_value_heads=1, intermediate_size=32, timestep_embed_dim=8,
        text_hidden_dim=8, num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=16,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(2, 2, 4), **HEADS,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, 24, 4), "encoder_hidden_states": noise(2, TEXT, 3, 8), "timestep": HALF,
        "position_ids": torch.cat([torch.zeros(TEXT, 3), ids_of((0, 4, 6))]), "encoder_attention_mask": MASK.bool(),
    }  # fmt: skip


def lumina_next() -> Built:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    model = made(
        "LuminaNextDiT2DModel", sample_size=8, in_channels=4, hidden_size=16, num_layers=2, num_attention_heads=2, num_kv_heads=1,
        multiple_of=8, cross_attention_dim=8,
    )  # fmt: skip
    return model, text(
        hidden_states=noise(2, 4, 8, 12),
        timestep=HALF,
        encoder_mask=MASK,
        image_rotary_emb=get_2d_rotary_pos_embed_lumina(8, 16, 16),
        cross_attention_kwargs={},
    )


def omni_gen() -> Built:
    """Words, then the time in one token, then the image."""
    model = made(
        "OmniGenTransformer2DModel", in_channels=4, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
        num_layers=2, pad_token_id=0, vocab_size=32, pos_embed_max_size=8, time_step_dim=8,
        rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
    )  # fmt: skip
    count = TEXT + 1 + 24
    return model, {
        "hidden_states": noise(2, 4, 8, 12), "timestep": HALF, "input_ids": torch.arange(2 * TEXT).view(2, TEXT), "input_img_latents": [],
        "input_image_sizes": {}, "attention_mask": torch.ones(2, count, count), "position_ids": torch.arange(count).expand(2, -1),
    }  # fmt: skip


def qwen_image21() -> Built:
    model = made(
        "QwenImage21Transformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=2,
        context_in_dim=8,
        axes_dims_rope=(2, 2, 4),
        **HEADS,
    )
    slots = torch.tensor([False] * TEXT + [True] * 6)
    return model, text(
        hidden_states=noise(2, 24, 4), timestep=HALF, img_shapes=[[(1, 4, 6)]] * 2, img_mask=slots.expand(2, -1),
        encoder_hidden_states_mask=MASK.bool(),
    )  # fmt: skip


def bria_fibo2() -> Built:
    """A few tokens that a perceiver makes of the text stand in its stream; some blocks look at the text itself."""
    model = made(
        "BriaFibo2Transformer2DModel", in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=8,
        injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=2, gist_min_text_len=2,
        gist_max_text_len=8, axes_dims=(4, 6, 6), axes_lens=(16, 16, 16),
    )  # fmt: skip
    return model, {"hidden_states": noise(2, 4, 8, 12), "timestep": HALF, "encoder_hidden_states": noise(2, 2, TEXT, 8)}


def minimax_h3() -> Built:
    """Text, video and sound packed into one sequence."""
    model = made(
        "MiniMaxH3Transformer3DModel", num_attention_heads=2, attention_head_dim=12, hidden_size=24, num_layers=2, num_refiner_layers=1,
        ffn_dim=32, in_channels=4, audio_in_channels=4, text_dim=8, freq_dim=8, time_embed_hidden_dim=16, time_embed_dim=8,
        rope_freq_dim=2,
    )  # fmt: skip
    count = TEXT + 24 + 3
    tags = torch.tensor([1] * TEXT + [0] * 24 + [2] * 3)
    return model, text(
        hidden_states=noise(2, 24, 16), audio_hidden_states=noise(2, 3, 4), timestep=torch.tensor([0.5]),
        timestep_indices=torch.zeros(count, dtype=torch.long), token_tags=tags,
        position_ids=torch.cat([torch.zeros(TEXT, 3), ids_of((0, 4, 6)), torch.zeros(3, 3)]),
        video_indices=torch.arange(TEXT, TEXT + 24), audio_indices=torch.arange(TEXT + 24, count), text_indices=torch.arange(TEXT),
    )  # fmt: skip


def cosmos3() -> Built:
    """A text of one sample, read by a language model, and the frames that it tells of, in one row."""
    model = made(
        "Cosmos3OmniTransformer", head_dim=8, hidden_size=16, intermediate_size=32, latent_channel=4, num_attention_heads=2,
        num_hidden_layers=2, num_key_value_heads=1, patch_latent_dim=16, vocab_size=32, rope_axes_dim=(2, 1, 1),
    )  # fmt: skip
    count = TEXT + 24
    return model, {
        "input_ids": torch.arange(TEXT), "text_indexes": torch.arange(TEXT), "position_ids": torch.arange(count).expand(3, -1),
        "und_len": TEXT, "sequence_length": count, "vision_tokens": [noise(1, 4, 1, 8, 12)], "vision_token_shapes": [(1, 4, 6)],
        "vision_sequence_indexes": torch.arange(TEXT, count), "vision_mse_loss_indexes": torch.arange(TEXT, count),
        "vision_timesteps": torch.full((24,), 5.0), "vision_noisy_frame_indexes": [torch.tensor([0])],
    }  # fmt: skip


PACKED: dict[str, Callable[[], Built]] = {
    "BriaFibo2Transformer2DModel": bria_fibo2,
    "Cosmos3OmniTransformer": cosmos3,
    "Flux3Transformer2DModel": flux3,
    "Flux3Transformer2DModel (edit)": lambda: flux3(reference=True),
    "Ideogram4Transformer2DModel": ideogram4,
    "JoyImageEditPlusTransformer3DModel": joy_image_plus,
    "Krea2Transformer2DModel": krea2,
    "LuminaNextDiT2DModel": lumina_next,
    "MiniMaxH3Transformer3DModel": minimax_h3,
    "OmniGenTransformer2DModel": omni_gen,
    "QwenImage21Transformer2DModel": qwen_image21,
}
