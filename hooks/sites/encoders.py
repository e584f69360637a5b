"""What must be known of encoders of images and texts: which tokens come before the patches, and what a layer's second half is called.

What is in no table here is said to be unknown: its sites can be edited, its tokens have no roles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .source import source_of

# stacks (up to the first dot) whose passes are followed one by one: they may run inside a pass of the model or before it
STACKS = ("vision", "text_encoder", "mask_decoder")


@dataclass(frozen=True)
class Encoder:
    """Facts of one type of image encoder.

    prefix: (role, how many) of the tokens before the patches, in order; a text names the attribute of its config that holds the number.
    pictures: its layers hold tokens as pictures [B, rows, cols, width], some of them cut into windows. second_half: the norm with which
    the second half of a layer begins, x + last(... norm(x)), and the module whose output is added; None where a layer is built otherwise.
    """

    prefix: tuple[tuple[str, int | str], ...] = ()
    pictures: bool = False
    second_half: tuple[str, str] | None = None


CLS, DISTILLATION, REGISTERS = ("cls", 1), ("distillation", 1), ("register", "num_register_tokens")
VIT, CLIP, DINO = ("layernorm_after", "mlp"), ("layer_norm2", "mlp"), ("norm2", "layer_scale2")
# by the model_type of its config
ENCODERS = {
    "vit": Encoder((CLS,), second_half=VIT),
    "deit": Encoder((CLS, DISTILLATION), second_half=VIT),
    "ijepa": Encoder((), second_half=VIT),
    "clip_vision_model": Encoder((CLS,), second_half=CLIP),
    "metaclip_2_vision_model": Encoder((CLS,), second_half=CLIP),
    "siglip_vision_model": Encoder((), second_half=CLIP),
    "dinov2": Encoder((CLS,), second_half=DINO),
    "dinov2_with_registers": Encoder((CLS, REGISTERS), second_half=DINO),
    "dinov3_vit": Encoder((CLS, REGISTERS)),  # its layers take the positions of patches
    "internvl_vision": Encoder((CLS,)),
    "sam_vision_model": Encoder((), pictures=True),
    "sam_hq_vision_model": Encoder((), pictures=True),
}


def model_type(module: Any) -> str:
    return str(getattr(getattr(module, "config", None), "model_type", ""))


def reads_texts(config: Any) -> bool:
    """Whether a config is that of the text half of a model that compares texts and images (or sounds)."""
    return str(getattr(config, "model_type", "")).endswith("text_model")


def towers(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(stack, module) of the encoders and mask decoders in a model, each the module that embeds its input and runs its layers."""
    for module in root.modules():
        if hasattr(module, "num_mask_tokens") and isinstance(getattr(module, "transformer", None), nn.Module):
            yield "mask_decoder", module
        elif isinstance(getattr(module, "embeddings", None) or getattr(module, "patch_embed", None), nn.Module):
            if model_type(module) in ENCODERS:
                yield "vision", module
            elif reads_texts(getattr(module, "config", None)):
                yield "text_encoder", module


def prefix_of(config: Any) -> list[str]:
    """Roles of the tokens before the patches of an encoder with this config, one per token."""
    found = []
    for role, count in ENCODERS[config.model_type].prefix:
        found += [role] * (getattr(config, count) if isinstance(count, str) else count)
    return found


def is_causal(root: nn.Module, path: str) -> bool:
    """Whether the model that holds this text layer hides later tokens from earlier ones (CLIP does, SigLIP does not)."""
    names: frozenset[str] = frozenset()
    module: Any = root
    for part in ["", *path.split(".")]:
        module = getattr(module, part) if part else module
        if reads_texts(getattr(module, "config", None)) and hasattr(type(module), "set_attn_implementation"):
            names = source_of(type(module).forward).names
    return "create_causal_mask" in names
