"""Tiny random UNets and parts of other models that no other file builds, denoisers of sound and of molecules; with two samples each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tiny_denoisers import FRAMES, TEXT, noise
from tiny_families import HALF, HEADS, MASK, made, text
from tiny_streams import Built

LENGTH = 12


def transformer2d() -> Built:
    model = made("Transformer2DModel", in_channels=16, num_layers=2, norm_num_groups=4, cross_attention_dim=8, **HEADS)
    return model, text(hidden_states=noise(2, 16, 4, 6))


def dream_lite_transformer() -> Built:
    model = made("DreamLiteTransformer2DModel", in_channels=16, num_layers=2, norm_num_groups=4, cross_attention_dim=8, **HEADS)
    return model, text(hidden_states=noise(2, 16, 4, 6))


def transformer_temporal() -> Built:
    model = made("TransformerTemporalModel", in_channels=16, num_layers=1, norm_num_groups=4, **HEADS)
    return model, {"hidden_states": noise(2 * FRAMES, 16, 4, 6), "num_frames": FRAMES}


def dream_lite() -> Built:
    model = made(
        "DreamLiteUNetModel", sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=2, down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
    )  # fmt: skip
    return model, text(sample=noise(2, 4, 8, 12), timestep=torch.tensor(5))


def kandinsky3() -> Built:
    model = made(
        "Kandinsky3UNet", time_embedding_dim=16, groups=4, attention_head_dim=8, layers_per_block=2, block_out_channels=(16, 32, 64, 128),
        cross_attention_dim=16, encoder_hid_dim=8,
    )  # fmt: skip
    return model, text(sample=noise(2, 4, 16, 24), timestep=torch.tensor(5), encoder_attention_mask=MASK)


def uvit2d() -> Built:
    """aMUSEd: tokens of a codebook, most of them masked."""
    model = made(
        "UVit2DModel", hidden_size=16, cond_embed_dim=8, micro_cond_encode_dim=4, micro_cond_embed_dim=20, encoder_hidden_size=8,
        vocab_size=32, codebook_size=24, in_channels=16, block_out_channels=16, num_res_blocks=1, block_num_heads=2, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32, sample_size=8,
    )  # fmt: skip
    return model, text(
        input_ids=torch.arange(48).view(2, 4, 6) % 32, pooled_text_emb=noise(2, 8), micro_conds=torch.full((2, 5), 8.0)
    )


def unet1d() -> Built:
    model = made(
        "UNet1DModel", sample_size=32, in_channels=2, out_channels=2, block_out_channels=(32, 64), extra_in_channels=64,
        down_block_types=("DownBlock1DNoSkip", "AttnDownBlock1D"), up_block_types=("AttnUpBlock1D", "UpBlock1DNoSkip"),
    )  # fmt: skip
    return model, {"sample": noise(2, 2, 32), "timestep": torch.tensor(5)}


def t5_film() -> Built:
    model = made("T5FilmDecoder", input_dims=8, targets_length=LENGTH, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=32)
    return model, {
        "encodings_and_masks": [(noise(2, TEXT, 16), torch.ones(2, TEXT))],
        "decoder_input_tokens": noise(2, LENGTH, 8),
        "decoder_noise_time": HALF,
    }


def stable_audio() -> Built:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    model = made(
        "StableAudioDiTModel", sample_size=LENGTH, in_channels=4, num_layers=2, num_key_value_attention_heads=1, out_channels=4,
        cross_attention_dim=8, time_proj_dim=8, global_states_input_dim=8, cross_attention_input_dim=8, **HEADS,
    )  # fmt: skip
    rotary = get_1d_rotary_pos_embed(4, LENGTH + 1, use_real=True, repeat_interleave_real=False)
    return model, text(
        hidden_states=noise(2, 4, LENGTH), timestep=HALF, global_hidden_states=noise(2, 1, 8), rotary_embedding=rotary
    )


def stable_audio3() -> Built:
    model = made(
        "StableAudio3DiTModel", io_channels=4, embed_dim=16, depth=2, num_heads=2, cond_token_dim=8, global_cond_dim=8, local_add_cond_dim=4,
        timestep_features_dim=8, num_memory_tokens=3,
    )  # fmt: skip
    return model, text(
        hidden_states=noise(2, 4, LENGTH), timestep=HALF, global_hidden_states=noise(2, 8), local_add_cond=noise(2, 4, LENGTH)
    )


def ace_step() -> Built:
    model = made(
        "AceStepTransformer1DModel", hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, in_channels=12, audio_acoustic_hidden_dim=4, sliding_window=4,
    )  # fmt: skip
    return model, {
        "hidden_states": noise(2, LENGTH, 4), "timestep": HALF, "timestep_r": HALF, "encoder_hidden_states": noise(2, TEXT, 16),
        "context_latents": noise(2, LENGTH, 8),
    }  # fmt: skip


def longcat_audio() -> Built:
    model = made("LongCatAudioDiTTransformer", dit_dim=16, dit_depth=2, dit_heads=2, dit_text_dim=8, latent_dim=4)
    return model, text(
        hidden_states=noise(2, LENGTH, 4), encoder_attention_mask=MASK.bool(), timestep=HALF, latent_cond=noise(2, LENGTH, 4)
    )


def minimax_music3() -> Built:
    model = made(
        "MiniMaxMusic3Transformer1DModel", in_channels=4, condition_dim=8, num_layers=2, ff_inner_dim=32, rotary_dim=4,
        fourier_embedding_dim=8, **HEADS,
    )  # fmt: skip
    return model, {"hidden_states": noise(2, 4, LENGTH), "timestep": HALF, "encoder_hidden_states": noise(2, LENGTH, 8)}


def proteina() -> Built:
    """Molecules: a token is a residue."""
    times = ("time_emb_bb_ca", "time_emb_local_latents")
    model = made(
        "RFD4ProteinaTransformer", nlayers=2, token_dim=16, nheads=2, dim_cond=8, pair_repr_dim=8, latent_dim=4, token_type_emb_dim=4,
        cath_emb_dim=4, t_emb_dim=8, seq_sep_dim=8, xt_pair_dist_dim=6, tri_mult_c=8, feats_seq=("xt_bb_ca", "xt_local_latents"),
        feats_cond_seq=times, feats_pair_repr=("xt_bb_ca_pair_dists",), feats_pair_cond=times,
    )  # fmt: skip
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    return model, {
        "bb_ca": noise(2, LENGTH, 3), "local_latents": noise(2, LENGTH, 4), "bb_ca_time": HALF, "local_latents_time": HALF,
        "padding_mask": real, "conditioning": {"is_in_context_conditioning": ~real, "supports_local_latent": real},
    }  # fmt: skip


PARTS: dict[str, Callable[[], Built]] = {
    "AceStepTransformer1DModel": ace_step,
    "DreamLiteTransformer2DModel": dream_lite_transformer,
    "DreamLiteUNetModel": dream_lite,
    "Kandinsky3UNet": kandinsky3,
    "LongCatAudioDiTTransformer": longcat_audio,
    "MiniMaxMusic3Transformer1DModel": minimax_music3,
    "RFD4ProteinaTransformer": proteina,
    "StableAudio3DiTModel": stable_audio3,
    "StableAudioDiTModel": stable_audio,
    "T5FilmDecoder": t5_film,
    "Transformer2DModel": transformer2d,
    "TransformerTemporalModel": transformer_temporal,
    "UNet1DModel": unet1d,
    "UVit2DModel": uvit2d,
}
