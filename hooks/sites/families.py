"""Facts of diffusers' denoiser classes that must be known because nothing in a model says them.

Each entry was tried on the class itself (tests/hooks/test_roles.py): one text token, then one patch of the latents is changed, and the key
columns that change with it are compared. Classes without an entry are served as far as names, attributes and numbers of tokens go; a role
that would have to be guessed there is unknown.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Family:
    """Facts of one denoiser class.

    order: which tokens come first in its joint streams ("image" | "text"), None where it has none or it is not known. joint: modules
    whose name matches are joint although nothing on them says so. own: modules that attend to their own tokens although they call
    themselves cross-attention. text: the arguments that hold the text, as often and in the order in which
    their tokens stand. lengths: an argument [batch] with the number of each sample's real text tokens. registers: parameter
    [1, n, width] put before the text. ragged: every sample has its own text length, and image tokens follow the sample's last text token.
    per_sample: one attention call per sample, with that sample's text only. block: image and text of each sample are filled up to a
    multiple of so many tokens. latents: the argument that holds the latents, where it is neither hidden_states nor sample. axes: their
    axes, where these are not "bchw" or "bcfhw". made: the first of the img_ids of the image that is made, where an editing pipeline puts
    others beside it. context: what its `text` is, where that is no text. apart: (pattern, role) of modules in whose calls all tokens are of
    one role that is no image; a role other than "text" and "reference" is unknown to those who ask.
    """

    order: str | None = None
    joint: str | None = None
    own: str | None = None
    text: tuple[str, ...] = ("encoder_hidden_states",)
    lengths: str = ""
    registers: str | None = None
    ragged: bool = False
    per_sample: bool = False
    block: int = 1
    latents: str = ""
    axes: str = ""
    made: int = 0
    context: str = "text"
    apart: tuple[tuple[str, str], ...] = ()


FAMILIES: dict[str, Family] = {
    "AnyFlowFARTransformer3DModel": Family(axes="bfchw"),
    "AnyFlowTransformer3DModel": Family(axes="bfchw"),
    "AuraFlowTransformer2DModel": Family("text", registers="register_tokens"),
    "BriaFibo2Transformer2DModel": Family(
        joint=r"(^|\.)layers\.\d+\.attention$", apart=((r"^perceiver\.", "a gist of the text"),)
    ),
    "BriaFiboTransformer2DModel": Family("text"),
    "BriaTransformer2DModel": Family("text"),
    "ChromaTransformer2DModel": Family("text"),
    "CogVideoXTransformer3DModel": Family("text", joint=r"attn1$", axes="bfchw"),
    "CogView3PlusTransformer2DModel": Family("text", joint=r"attn1$"),
    "CogView4Transformer2DModel": Family("text", joint=r"attn1$"),
    "ConsisIDTransformer3DModel": Family("text", joint=r"attn1$", axes="bfchw"),
    "EasyAnimateTransformer3DModel": Family("text", joint=r"attn1$"),
    "ErnieImageTransformer2DModel": Family("image", joint=r"self_attention$", text=("text_bth",), lengths="text_lens"),
    "Flux3Transformer2DModel": Family(
        "text", apart=((r"^txt_mode_blocks", "text"), (r"^mode_blocks\.image_cond", "reference"))
    ),
    "Flux2Transformer2DModel": Family("text"),
    "FluxControlNetModel": Family("text"),
    "FluxTransformer2DModel": Family("text"),
    "GlmImageTransformer2DModel": Family("text", joint=r"attn1$"),
    "HiDreamImageTransformer2DModel": Family(
        "image",
        joint=r"attn1$",
        text=("encoder_hidden_states_t5", "encoder_hidden_states_llama3", "encoder_hidden_states_llama3"),
    ),
    "HunyuanDiT2DControlNetModel": Family(text=("encoder_hidden_states", "encoder_hidden_states_t5")),
    "HunyuanDiT2DModel": Family(text=("encoder_hidden_states", "encoder_hidden_states_t5")),
    "HunyuanImageTransformer2DModel": Family("image"),
    "HunyuanVideoTransformer3DModel": Family("image"),
    "Ideogram4Transformer2DModel": Family(joint=r"attention$"),
    "JoyImageEditPlusTransformer3DModel": Family(joint=r"attn$"),
    "JoyImageEditTransformer3DModel": Family(joint=r"attn$"),
    "Kandinsky3UNet": Family(own=r"_blocks\.\d+\.attentions\.0\."),
    "Kandinsky5Transformer3DModel": Family(axes="bfhwc"),
    "Kandinsky6Transformer3DModel": Family(axes="bfhwc", apart=((r"audio_dec_block|(va|av)_cross", "sound"),)),
    "Krea2Transformer2DModel": Family(joint=r"^transformer_blocks\.", apart=((r"^text_fusion\.", "layers of a text encoder"),)),
    "LTX2VideoTransformer3DModel": Family(apart=((r"audio", "sound"),)),
    "LongCatImageTransformer2DModel": Family("text", made=1),
    "Lumina2Transformer2DModel": Family("text", joint=r"(^|\.)layers\.", ragged=True),
    "MiniMaxH3Transformer3DModel": Family(joint=r"^transformer_blocks\."),
    "MochiTransformer3DModel": Family("image", per_sample=True),
    "MotifVideoTransformer3DModel": Family("image"),
    "NucleusMoEImageTransformer2DModel": Family("image", joint=r"attn$"),
    "OmniGenTransformer2DModel": Family(joint=r"self_attn$"),
    "OvisImageTransformer2DModel": Family("text"),
    "PRXTransformer2DModel": Family("text", joint=r"attention$"),
    "QwenImage21Transformer2DModel": Family(joint=r"attn$"),
    "QwenImageControlNetModel": Family("text"),
    "QwenImageTransformer2DModel": Family("text"),
    "SD3ControlNetModel": Family("image"),
    "SD3Transformer2DModel": Family("image"),
    "StableCascadeUNet": Family("image", joint=r"attention$", text=()),
    "UNetSpatioTemporalConditionModel": Family(axes="bfchw", context="reference"),
    "WanAnimateTransformer3DModel": Family(apart=((r"^face_adapter", "movements of a face"),)),
    "ZImageControlNetModel": Family(
        "image",
        joint=r"^control_layers\.",
        text=("cap_feats",),
        block=32,
        latents="x",
        axes="bcfhw",
        apart=((r"^context_ref", "text"),),
    ),
    "ZImageTransformer2DModel": Family(
        "image", joint=r"(^|\.)layers\.", text=("cap_feats",), block=32, latents="x", axes="bcfhw"
    ),
}


def family_of(denoiser: nn.Module) -> Family:
    return FAMILIES.get(type(denoiser).__name__, Family())
