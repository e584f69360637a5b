"""Tiny models and processors, built here: nothing comes from a hub."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)

WORDS = [
    "the",
    "a",
    "red",
    "blue",
    "dog",
    "cat",
    "sat",
    "ran",
    "on",
    "in",
    "house",
    "garden",
    "and",
    "then",
    "it",
    "was",
    "very",
    "big",
    "small",
    "answer",
    "french",
    "please",
    "key",
    "is",
]


def word_tokenizer(*, template: str | None = None) -> PreTrainedTokenizerFast:
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<mask>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>"
    )
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def without_torchvision(name: str) -> Any:
    """An image processor that works on PIL pictures: newer transformers give it a name of its own."""
    import transformers

    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


@pytest.fixture(scope="session")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def llama(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=None, pad_token_id=0, max_position_embeddings=512,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def text_pipe(llama, tokenizer):
    return pipeline("text-generation", model=llama, tokenizer=tokenizer, device="cpu")


@pytest.fixture
def fill_pipe(tokenizer):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, vocab_size=len(tokenizer),
        pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return pipeline("fill-mask", model=BertForMaskedLM(config).eval(), tokenizer=tokenizer, device="cpu")


@pytest.fixture
def class_pipe():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=32, patch_size=8,
        initializer_range=0.3, num_labels=6,
    )  # fmt: skip
    processor = without_torchvision("ViTImageProcessor")(size={"height": 32, "width": 32})
    model = ViTForImageClassification(config).eval()
    return pipeline("image-classification", model=model, image_processor=processor, device="cpu")


@pytest.fixture
def image_pipe():
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8,), in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    words = word_tokenizer()
    words.model_max_length = 16
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(words),
        max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text).eval(), tokenizer=words, unet=unet, feature_extractor=None,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def look_pipe():
    """image-text-to-text: a tiny LLaVA with its processor and a chat template."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    torch.manual_seed(0)
    words = word_tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    words.image_token = "<image>"
    template = (
        "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}"
        "{% endif %}{% endfor %}{% endfor %}"
    )
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = LlavaProcessor(
        without_torchvision("CLIPImageProcessor")(**sizes), words, patch_size=8, vision_feature_select_strategy="default",
        chat_template=template, num_additional_image_tokens=1,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(words), bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=words.convert_tokens_to_ids("<image>"))
    model = LlavaForConditionalGeneration(config).eval()
    return pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
