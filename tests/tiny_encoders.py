"""Random encoders of images (and texts) of a few thousand weights, built from configs, each with inputs for two of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as T

SIZES = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, image_size=24, patch_size=6)
TEXT = dict(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, vocab_size=100, max_position_embeddings=16,
    bos_token_id=1, pad_token_id=0,
)  # fmt: skip
# the second text is shorter: its end is its highest id, and what follows is padding
IDS = torch.tensor([[1, 5, 6, 7, 8, 99], [1, 9, 10, 99, 0, 0]])


def _model(name: str, config: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(T, name)(config).eval()
    for key, parameter in model.named_parameters():
        # random weights of the usual scale hardly attend at all: larger ones make every edit show
        if parameter.dim() == 2 and any(part in key for part in ("q_proj", "k_proj", "qkv")):
            parameter.data *= 10
        # zero at the start of a training
        if "rel_pos" in key or key.endswith(("position_embeddings", "cls_token", "register_tokens", "distillation_token")):
            parameter.data.normal_(std=0.5)
    return model


def pixels(batch: int = 2, height: int = 24, width: int = 24) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(7))


def vit(**more: Any) -> Any:
    return _model("ViTForImageClassification", T.ViTConfig(**{**SIZES, "num_labels": 5, **more}))


def deit() -> Any:
    return _model("DeiTForImageClassificationWithTeacher", T.DeiTConfig(**SIZES, num_labels=5))


def clip_vision() -> Any:
    return _model("CLIPVisionModelWithProjection", T.CLIPVisionConfig(**SIZES, projection_dim=16))


def clip_text() -> Any:
    return _model("CLIPTextModel", T.CLIPTextConfig(**TEXT, eos_token_id=2))


def clip() -> Any:
    text, vision = {**TEXT, "eos_token_id": 2}, SIZES
    return _model("CLIPModel", T.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def siglip_vision() -> Any:
    return _model("SiglipVisionModel", T.SiglipVisionConfig(**SIZES))


def siglip() -> Any:
    text = {**TEXT, "projection_size": 32, "eos_token_id": 99}
    return _model("SiglipModel", T.SiglipConfig(text_config=text, vision_config=SIZES))


def dinov2() -> Any:
    return _model("Dinov2Model", T.Dinov2Config(**SIZES, mlp_ratio=2))


def dinov2_registers() -> Any:
    return _model(
        "Dinov2WithRegistersForImageClassification",
        T.Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_labels=5, num_register_tokens=3),
    )


def dinov3() -> Any:
    return _model("DINOv3ViTModel", T.DINOv3ViTConfig(**SIZES, num_register_tokens=2))


def ijepa() -> Any:
    return _model("IJepaModel", T.IJepaConfig(**SIZES))


def metaclip_2() -> Any:
    return _model("MetaClip2VisionModel", T.MetaClip2VisionConfig(**SIZES))


def sam() -> Any:
    """Four layers over 8 x 8 patches, the first and third in windows of 3 x 3."""
    vision = dict(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=4, window_size=3,
        global_attn_indexes=[1, 3], output_channels=16, mlp_dim=48, num_pos_feats=8, initializer_range=0.1,
    )  # fmt: skip
    prompts = dict(hidden_size=16, image_size=32, patch_size=4, mask_input_channels=4)
    masks = dict(hidden_size=16, num_attention_heads=2, mlp_dim=32, iou_head_hidden_dim=16)
    return _model("SamModel", T.SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=masks))


# by name: the model, its inputs, and the roles before the patches of its image encoder
ENCODERS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "vit": (vit, ["cls"]),
    "deit": (deit, ["cls", "distillation"]),
    "clip_vision": (clip_vision, ["cls"]),
    "clip": (clip, ["cls"]),
    "siglip_vision": (siglip_vision, []),
    "siglip": (siglip, []),
    "dinov2": (dinov2, ["cls"]),
    "dinov2_registers": (dinov2_registers, ["cls", *["register"] * 3]),
    "dinov3": (dinov3, ["cls", *["register"] * 2]),
    "ijepa": (ijepa, []),
    "metaclip_2": (metaclip_2, ["cls"]),
}


def inputs_of(model: Any, batch: int = 2) -> dict[str, torch.Tensor]:
    """What a model's processor would give it: pictures, and texts where it reads any."""
    size = 32 if "Sam" in type(model).__name__ else 24
    found = {"pixel_values": pixels(batch, size, size)}
    if type(model).__name__ in ("CLIPModel", "SiglipModel"):
        found["input_ids"] = IDS[:batch]
    if size == 32:
        found["input_points"] = torch.tensor([[[[4.0, 5.0]], [[20.0, 9.0]]]] * batch)
    return found


@torch.no_grad()
def features(model: Any, inputs: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """[B, n]: logits, embeddings or pooled states, whichever the model is asked for first."""
    out = model(**(inputs_of(model) if inputs is None else inputs))
    names = ("logits", "logits_per_image", "image_embeds", "pred_masks", "pooler_output", "last_hidden_state")
    found = next(out[name] for name in names if out.get(name) is not None)
    return found.flatten(1)
