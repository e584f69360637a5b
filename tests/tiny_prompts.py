"""Whole tiny pipelines with text encoders of every kind, their tokenizers of the genuine classes with vocabularies of a few pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny_denoisers
import tiny_pipelines
import torch
from torch import nn

LETTERS = [chr(c) for c in range(ord("!"), ord("~") + 1)]
WIDTH = 8
CLIP_LENGTH = 64


def t5_tokenizer(length: int = 16) -> Any:
    """Words as pieces; "circle" is two of them."""
    from transformers import T5Tokenizer

    pieces = ["▁a", "▁red", "▁cir", "cle", "▁and", "▁blue", "▁square", "▁the", "▁sky", ",", "."]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((p, -2.0) for p in pieces), ("▁", -8.0)]
    return T5Tokenizer(vocab=[*vocab, *((letter, -9.0) for letter in LETTERS)], extra_ids=0, model_max_length=length)


def gemma_tokenizer() -> Any:
    """Letters as tokens, and a space."""
    from transformers import GemmaTokenizer

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *LETTERS]
    tokenizer = GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=64)
    tokenizer.add_bos_token = True
    return tokenizer


def qwen_tokenizer() -> Any:
    """Bytes as tokens, with marks of turns."""
    from transformers import Qwen2Tokenizer

    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ġ", "Ċ", *LETTERS]
    return Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip


def t5(cls: str = "T5") -> nn.Module:
    import transformers

    config = getattr(transformers, f"{cls}Config")(
        vocab_size=160, d_model=WIDTH, d_kv=4, d_ff=16, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    return getattr(transformers, f"{cls}EncoderModel")(config).eval()


def gemma() -> nn.Module:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            vocab_size=160, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=4,
        )
    ).eval()  # fmt: skip


def qwen() -> nn.Module:
    from transformers import Qwen2Config, Qwen2Model

    return Qwen2Model(
        Qwen2Config(
            vocab_size=160, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
        )
    ).eval()  # fmt: skip


def clip(pooled: bool = False) -> nn.Module:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    if pooled:
        return CLIPTextModelWithProjection(tiny_pipelines.text_config(projection_dim=16)).eval()
    return CLIPTextModel(tiny_pipelines.text_config()).eval()


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flow() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def denoiser(name: str) -> Any:
    return tiny_denoisers.build(name)[0]


SMALL = {"height": 16, "width": 16}


def sd() -> tuple[Any, dict[str, Any]]:
    return tiny_pipelines.stable_diffusion(), {}


def sdxl() -> tuple[Any, dict[str, Any]]:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    torch.manual_seed(0)
    unet = tiny_denoisers.unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )[0]
    pipe = StableDiffusionXLPipeline(
        vae=tiny_pipelines.vae(4), text_encoder=clip(), text_encoder_2=clip(True), tokenizer=tiny_pipelines.tokenizer(),
        tokenizer_2=tiny_pipelines.tokenizer(), unet=unet.eval(), scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )  # fmt: skip
    return quiet(pipe), SMALL


def sd3() -> tuple[Any, dict[str, Any]]:
    """Two CLIPs of 16 channels each, and a T5 of 32."""
    from transformers import T5Config, T5EncoderModel

    pipe = tiny_pipelines.stable_diffusion_3()
    config = T5Config(vocab_size=160, d_model=32, d_kv=4, d_ff=16, num_layers=2, num_heads=2, dropout_rate=0.0)
    pipe.text_encoder_3, pipe.tokenizer_3 = T5EncoderModel(config).eval(), t5_tokenizer()
    pipe.register_modules(text_encoder_3=pipe.text_encoder_3, tokenizer_3=pipe.tokenizer_3)
    return pipe, {**SMALL, "max_sequence_length": 16}


def flux() -> tuple[Any, dict[str, Any]]:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    pipe = FluxPipeline(
        transformer=transformer.eval(), scheduler=flow(), vae=None, text_encoder=clip(), tokenizer=tiny_pipelines.tokenizer(),
        text_encoder_2=t5(), tokenizer_2=t5_tokenizer(),
    )  # fmt: skip
    return quiet(pipe), {**SMALL, "max_sequence_length": 16}


def pixart() -> tuple[Any, dict[str, Any]]:
    from diffusers import DDIMScheduler, PixArtAlphaPipeline

    pipe = PixArtAlphaPipeline(
        t5_tokenizer(), t5(), None, denoiser("PixArtTransformer2DModel"), DDIMScheduler(clip_sample=False)
    )  # fmt: skip
    return quiet(pipe), {**SMALL, "max_sequence_length": 16, "use_resolution_binning": False}


def aura_flow() -> tuple[Any, dict[str, Any]]:
    from diffusers import AuraFlowPipeline

    pipe = AuraFlowPipeline(t5_tokenizer(), t5("UMT5"), None, denoiser("AuraFlowTransformer2DModel"), flow())
    return quiet(pipe), {**SMALL, "max_sequence_length": 16}


def sana() -> tuple[Any, dict[str, Any]]:
    from diffusers import SanaPipeline

    pipe = SanaPipeline(gemma_tokenizer(), gemma(), None, denoiser("SanaTransformer2DModel"), flow())
    return quiet(pipe), {"height": 256, "width": 256, "max_sequence_length": 40, "use_resolution_binning": False}


def lumina2() -> tuple[Any, dict[str, Any]]:
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1, num_attention_heads=4,
        num_kv_heads=2, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(96, 16, 16), cap_feat_dim=8,
    )  # fmt: skip
    pipe = Lumina2Pipeline(transformer.eval(), flow(), None, gemma(), gemma_tokenizer())
    return quiet(pipe), {**SMALL, "max_sequence_length": 64, "system_prompt": "Be red ."}


def qwen_image() -> tuple[Any, dict[str, Any]]:
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline(flow(), None, qwen(), qwen_tokenizer(), denoiser("QwenImageTransformer2DModel"))
    before = pipe.prompt_template_encode.partition("{}")[0]
    pipe.prompt_template_encode_start_idx = len(pipe.tokenizer(before)["input_ids"])
    return quiet(pipe), {**SMALL, "true_cfg_scale": 2.0}


def wan() -> tuple[Any, dict[str, Any]]:
    from diffusers import WanPipeline

    pipe = WanPipeline(t5_tokenizer(), t5("UMT5"), None, flow(), denoiser("WanTransformer3DModel"))
    return quiet(pipe), {**SMALL, "num_frames": 5, "max_sequence_length": 16}


def cogvideox() -> tuple[Any, dict[str, Any]]:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=8,
        num_layers=2, sample_width=2, sample_height=2, sample_frames=5, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=16,
    )  # fmt: skip
    pipe = CogVideoXPipeline(t5_tokenizer(), t5(), None, transformer.eval(), CogVideoXDDIMScheduler())
    return quiet(pipe), {**SMALL, "num_frames": 5, "max_sequence_length": 16}


FAMILIES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "SD": sd,
    "SDXL": sdxl,
    "SD3": sd3,
    "Flux": flux,
    "PixArt": pixart,
    "AuraFlow": aura_flow,
    "Sana": sana,
    "Lumina2": lumina2,
    "QwenImage": qwen_image,
    "Wan": wan,
    "CogVideoX": cogvideox,
}
