"""Random language models of a few thousand weights, and tokenizers trained here on a few sentences. Nothing comes from a hub."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Answer in French. Answer in one word. Please do not use the letter e.",
    "Anna has a red house and Paul has a blue garden; the dog sat in the garden.",
    "system user assistant: what colour is the house of Anna? the capital, the answer",
]
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def tokenizer(template: str | None = CHATML, side: str = "left") -> PreTrainedTokenizerFast:
    """Byte-level pieces, so that any text is its own decoding; `<pad>`, `<s>` and the markers of ChatML are special."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(SENTENCES * 4, trainer)
    result = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side=side
    )
    result.chat_template = template
    return result


def language_model(kind: str = "Llama", **changes: Any) -> Any:
    """A random causal language model with 4 layers, 4 heads and 2 key heads, whose weights attend unevenly enough for edits to show."""
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{kind}TextConfig", None) or getattr(transformers, f"{kind}Config")
    config = config_class(
        **{
            "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes,
        }
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 20
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
