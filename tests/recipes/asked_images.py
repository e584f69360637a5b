"""A tokenizer and prompts for the tiny vision-language models: questions that can be read, beside images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tiny_models
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FAMILIES = [
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "idefics3", "gemma3",
    "paligemma", "pixtral", "mistral3",
]  # fmt: skip
USER, ASSISTANT, NEWLINE = 50, 51, 52
WORDS = {
    "what": 5,
    "is": 6,
    "the": 7,
    "red": 8,
    "dog": 9,
    "on": 10,
    "doing": 11,
    "how": 12,
    "many": 13,
    "cats": 14,
    "?": 15,
    "a": 16,
}
WHAT = [5, 6, 7, 8, 9, 11, 15]  # what is the red dog doing ?
HOW = [12, 13, 14, 15]  # how many cats ?
TEMPLATE = (
    "{% for m in messages %}{{ 'USER' if m['role'] == 'user' else 'ASSISTANT' if m['role'] == 'assistant' else 'SYSTEM' }} "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """100 words, the ids of `tiny_models` among them. Image, wrapper and separator tokens are special, as in processors."""
    names = {f"w{i}": i for i in range(tiny_models.VOCABULARY)}
    fixed = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "USER": USER, "ASSISTANT": ASSISTANT, "\\n": NEWLINE, **WORDS}
    special = {"<image>": 90, "<video>": 91, "<break>": 92, "<end>": 93, "<wrap>": 94, "</wrap>": 95, "<row>": 96}
    special |= {f"<tile{i}>": 60 + i for i in range(3)}
    for name, i in {**fixed, **special}.items():
        names = {k: v for k, v in names.items() if v != i} | {name: i}
    inner = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=[AddedToken(name, special=True) for name in special],
    )  # fmt: skip
    made.chat_template = template
    return made


def turn(*content: int | str) -> list[int | str]:
    return [USER, *content, ASSISTANT]


ONE = [1, *turn("image", *WHAT)]
TWO = [1, *turn(*HOW, "image", 8, 9), 30, *turn("image", *HOW)]
NONE = [1, *turn(*WHAT)]
PROMPTS = [ONE, TWO, NONE]


def asked(prompt: list[int | str], ids: torch.Tensor) -> torch.Tensor:
    """Bool [T]: the tokens of a left-padded prompt's last question, from how the prompt was built."""
    last = max(i for i, piece in enumerate(prompt) if piece == USER)
    found = torch.zeros(len(ids), dtype=torch.bool)
    place = len(ids) - 1
    for piece in reversed(prompt[last:]):
        if piece == "image":
            break
        found[place] = piece not in (USER, ASSISTANT)
        place -= 1
    return found


def build(family: str, **text: object) -> tiny_models.Tiny:
    """A tiny model whose text branch can be cut out of its prompts: Gemma 3 is told which tokens wrap an image."""
    tiny = getattr(tiny_models, family)(**text)
    if family == "gemma3":
        tiny.model.config.boi_token_id, tiny.model.config.eoi_token_id = 94, 95
    return tiny


def inputs_of(tiny: tiny_models.Tiny, prompts: Sequence[Sequence[int | str]], side: str = "left") -> dict[str, Any]:
    """As processors make them."""
    inputs = tiny.inputs(prompts, side)
    if "aspect_ratio_ids" in inputs:  # mllama: one row of pixels per sample, and who sees them
        sees = torch.tensor([[("image" in prompt)] * inputs["input_ids"].shape[1] for prompt in prompts])
        inputs["cross_attention_mask"] = sees.long()[:, :, None, None]
    if type(tiny.model).__name__.startswith("PaliGemma"):  # all of the prompt sees all of it
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return inputs
