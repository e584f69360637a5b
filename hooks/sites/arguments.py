"""Which arguments of a denoiser's forward hold one entry per row of its batch, by name: what must be known, since shapes may agree by chance.

A rope position of length 1 looks like a row at batch 1, and states [layers, batch, ...] do not look like rows at all. A name that stands
nowhere here is not known, and nothing is guessed from its shape.
"""

from __future__ import annotations

# one entry per row along the first dimension (or one for all rows); what lists and dictionaries of these names hold, too
ROWS = {
    "sample", "hidden_states", "hidden_states_masks", "timestep", "timesteps", "timestep_r", "r_timestep", "timestep_ratio",
    "timestep_cond", "guidance", "sigma", "encoder_hidden_states", "encoder_hidden_states_2", "encoder_hidden_states_t5",
    "encoder_hidden_states_image", "encoder_hidden_states_mask", "encoder_attention_mask", "encoder_attention_mask_2", "encoder_mask",
    "attention_mask", "text_embedding_mask", "text_embedding_mask_t5", "pooled_projections", "pooled_embeds", "pooled_text_emb",
    "clip_text", "clip_text_pooled", "clip_img", "class_labels", "style", "image_meta_size", "micro_conds", "added_time_ids",
    "added_cond_kwargs", "text_embeds", "text_bth", "text_lens", "time_ids", "image_embeds", "image_embeddings", "image_latents", "hint",
    "resolution", "aspect_ratio", "original_size", "target_size", "crop_coords", "fps", "proj_embedding", "global_hidden_states",
    "id_cond", "id_vit_hidden", "prior_token_id", "prior_token_drop", "condition_mask", "control_hidden_states", "control_latents",
    "inpaint_latents", "video_coords", "effnet", "pixels", "sca", "crp", "down_block_additional_residuals",
    "mid_block_additional_residual", "down_intrablock_additional_residuals", "block_controlnet_hidden_states", "controlnet_block_samples",
    "controlnet_single_block_samples", "ip_hidden_states", "ip_adapter_image_embeds", "boxes", "positive_embeddings", "masks",
    "pose_hidden_states", "face_pixel_values", "text_encoder_layers", "controlnet_cond", "controlnet_mode",
    "control_type", "conditioning_mask", "audio_hidden_states", "audio_encoder_hidden_states", "audio_encoder_attention_mask",
    "audio_timestep", "audio_sigma", "image_cond_hidden_states", "latents_clean", "latents_history_2x", "latents_history_4x",
    "latents_history_short", "latents_history_mid", "latents_history_long", "camera_conditions", "context_latents", "latent_cond",
    "local_add_cond", "segment_ids", "indicator", "img_mask",
}  # fmt: skip
# one for all rows, whatever the first dimension happens to be: places of tokens, and masks over them
SHARED = {
    "img_ids", "txt_ids", "image_cond_ids", "image_rotary_emb", "rotary_embedding", "rope_interpolation_scale", "visual_rope_pos",
    "text_rope_pos", "scale_factor", "ip_adapter_masks", "ip_adapter_scale", "control_hidden_states_scale", "scale",
}  # fmt: skip
# rows along the second dimension: the states of several layers of a text encoder
SECOND = {"encoder_hidden_states_llama3"}
# several entries per row, in a row: one text per frame (AnimateDiff)
FOLDED = {
    "encoder_hidden_states", "encoder_attention_mask", "image_embeds", "ip_hidden_states", "down_block_additional_residuals",
    "mid_block_additional_residual",
}  # fmt: skip
# one entry per row, in a list of what are no tensors
LISTED = {"img_shapes", "txt_seq_lens", "img_sizes", "shape_list"}
# names that mean something else in one class: Cosmos repeats one mask for all rows, HiDream has places of its own for each; numbers of
# frames come once for all rows (Framepack) or for each (Helios)
OWN: dict[str, dict[str, str]] = {
    "CosmosTransformer3DModel": {"padding_mask": "shared"},
    "HeliosTransformer3DModel": {
        "indices_hidden_states": "rows",
        **{f"indices_latents_history_{term}": "rows" for term in ("short", "mid", "long")},
    },
    "HiDreamImageTransformer2DModel": {"img_ids": "rows", "img_sizes": "rows"},
    "HunyuanVideoFramepackTransformer3DModel": {
        f"indices_latents{part}": "shared" for part in ("", "_clean", "_history_2x", "_history_4x")
    },
    "Ideogram4Transformer2DModel": {"position_ids": "rows"},
    "Krea2Transformer2DModel": {"position_ids": "shared"},
    "MiniMaxH3Transformer3DModel": {"timestep": "shared"},
    "UVit2DModel": {"input_ids": "rows"},
}


def rows_of(kind: str, name: str) -> str:
    """How an argument of a denoiser class holds rows: "rows", "folded", "second", "shared", or "" where it is not known."""
    own = OWN.get(kind, {}).get(name)
    if own is not None:
        return own
    if name in SHARED:
        return "shared"
    if name in SECOND:
        return "second"
    if name in FOLDED:
        return "folded"
    return "rows" if name in ROWS else ""
