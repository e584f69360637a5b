"""The models and prompts on which recipes are timed: a real language model, a small trained LLaVA, and one with a real decoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import reattend
import torch
from reattend.comparison.loading import packaged_smollm2
from reattend.hooks.trackers.caches import cache_name, cache_of
from reattend.recipes import Profile, recipe_class
from timing import Answer, PromptUpTo, Variant

MARKED = "Answer with a single word and nothing else."
SENTENCE = "The {n}th visitor of the museum wrote in the guest book that the lamps were too bright for the old maps. "
SINK_DIM = 507  # in which SmolLM2's sinks show


@dataclass
class Subject:
    """A model with one prompt. recipes: {label: parameters of the recipe(s)}. others: further ways to answer, for comparison.

    floors: {label: (which passes the method needs by its definition, how the untouched model does them)}.
    """

    title: str
    model: Any
    tokenizer: Any
    inputs: dict[str, torch.Tensor]
    recipes: dict[str, list[tuple[str, dict[str, Any]]]]
    floors: dict[str, tuple[str, Variant]] = field(default_factory=dict)
    others: dict[str, Variant] = field(default_factory=dict)

    def under(self, chosen: list[tuple[str, dict[str, Any]]]) -> Variant:
        return Variant(lambda model: reattend.apply(model, *chosen, tokenizer=self.tokenizer))


EAGER = Variant(lambda model: switched(model, "eager"))


def smollm2(folder: Path, tokens: int = 512) -> Subject:
    """SmolLM2-135M-Instruct with a prompt of so many tokens, of which one sentence is marked."""
    model, tokenizer = packaged_smollm2()
    paragraphs: list[str] = []
    while len(tokenizer("\n".join([MARKED, *paragraphs])).input_ids) < tokens - 60:
        first = 5 * len(paragraphs)
        paragraphs.append("".join(SENTENCE.format(n=n) for n in range(first, first + 5)))
    story, segments = "\n".join([MARKED, *paragraphs, "What was too bright?"]), paragraphs[:3]
    inputs = dict(tokenizer(story, return_tensors="pt"))
    marked = {"text": MARKED}
    heads = [[layer, head] for layer in range(5, 25, 2) for head in (1, 4)]
    recipes = {
        "act, all heads of layers 2 to 28": [("act", {"heads": "all"})],
        "act, 20 heads": [("act", {"heads": heads})],
        "emphasise, all heads": [("emphasise", marked)],
        "emphasise, 20 heads": [("emphasise", {**marked, "heads": heads})],
        "instaboost": [("instaboost", marked)],
        "pine, 3 segments": [("pine", {"segments": segments})],
        "retrieval-heads, 20 heads sharpened": [("retrieval-heads", {"heads": heads})],
        "seka": [("seka", {**marked, "profile_path": str(seka_profile(model, tokenizer, folder))})],
        "soft-injection": [("soft-injection", {"profile_path": str(injection_profile(model, folder))})],
        "spa": [("spa", marked)],
        "spotlight": [("spotlight", marked)],
        "streaming, window 256": [("streaming", {"window": 252})],
        "emphasise + instaboost": [("emphasise", marked), ("instaboost", marked)],
    }
    twice = Variant(more=lambda model: [Answer(model, inputs)], each=True)
    again = Variant(attended_twice)
    floors = {
        "spa": ("every token is computed twice", twice),
        "pine, 3 segments": ("a second attention, without positions, ranks the segments", again),
    }
    title = f"SmolLM2-135M, prompt of {inputs['input_ids'].shape[1]} tokens"
    return Subject(title, model, tokenizer, inputs, recipes, floors, {"untouched, eager attention": EAGER})


def attended_twice(model: Any) -> switched:
    """Every attention of the model twice, by transformers' own function."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def twice(*args: Any, **kwargs: Any) -> Any:
        sdpa_attention_forward(*args, **kwargs)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("sdpa_twice", twice)
    AttentionMaskInterface.register("sdpa_twice", sdpa_mask)
    return switched(model, "sdpa_twice")


def seka_profile(model: Any, tokenizer: Any, folder: Path) -> Path:
    file = folder / "seka.safetensors"
    if not file.is_file():
        recipe_class("seka").profile(model, tokenizer).save(file)
    return file


def injection_profile(model: Any, folder: Path) -> Path:
    """Shares of a half everywhere: what is mixed in does not matter for the time it takes."""
    from reattend.recipes.kit.profile import fingerprint

    text = model.config
    shape = (text.num_hidden_layers, text.num_attention_heads)
    tensors = {"task_embedding": torch.ones(1, *shape, text.head_dim), "alpha": torch.full(shape, 0.5)}
    return Profile("soft-injection", fingerprint(model), tensors, {"tasks": ["timing"]}).save(folder / "soft.safetensors")


def shapes_llava(folder: Path) -> Subject:
    """The zoo's model and one scene: so small that the operations around a kernel cost more than kernels do."""
    import numpy as np
    from reattend.zoo.worlds.drawing import picture
    from reattend.zoo.worlds.shapes import World, sample_scene

    model, processor = reattend.zoo.load("shapes-llava")
    scene = picture(sample_scene(np.random.default_rng(0), World()), 48, World())
    question = "describe the image ."
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    inputs = dict(processor(text=text, images=[scene], return_tensors="pt"))
    return vision(
        "shapes-llava (6 layers of width 128), 36 image tokens", model, processor, inputs, question,
        var={"sink_dims": [0], "tau": 1.0, "first_layer": 1}, layers=6,
    )  # fmt: skip


def llava_around_smollm2(folder: Path, patches: int = 18) -> Subject:
    """A LLaVA whose decoder is SmolLM2 and whose eyes are random: what recipes cost there is real, what it says is not."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    language, tokenizer = packaged_smollm2()
    vision_config = CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, image_size=8 * patches, patch_size=8
    )
    image = tokenizer.convert_tokens_to_ids("<repo_name>")
    config = LlavaConfig(
        vision_config=vision_config, text_config=language.config, image_token_index=image, vision_feature_layer=-1,
        image_seq_length=patches**2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    question = "Which lamp in this picture is the brightest, and what stands beside it?"
    before, after = (tokenizer(t).input_ids for t in ("<|im_start|>user\n", question + "<|im_end|>\n<|im_start|>assistant\n"))
    ids = torch.tensor([before + [image] * patches**2 + after])
    pixels = torch.randn(1, 3, 8 * patches, 8 * patches)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    # sinks on the first token and on three image tokens, as a trained LLaVA has them
    model.model.language_model.layers[1].register_forward_pre_hook(plant, with_kwargs=True)
    return vision(
        f"LLaVA around SmolLM2 (30 layers of width 576), {patches**2} image tokens", model, tokenizer, inputs, question,
        var={"sink_dims": [SINK_DIM]}, layers=30,
    )  # fmt: skip


def plant(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    hidden = args[0]
    if hidden.shape[1] <= 90:  # decode, or a pass without the image
        return None
    hidden = hidden.clone()
    hidden[:, [0, 20, 50, 90], SINK_DIM] = 1e4
    return (hidden, *args[1:]), kwargs


def vision(
    title: str, model: Any, processor: Any, inputs: dict[str, torch.Tensor], question: str, var: dict[str, Any], layers: int
) -> Subject:
    """The vision-language recipes on a model of so many layers, with their published strengths."""
    from eager_var import EagerVAR

    late = list(range(layers // 3, layers * 2 // 3))
    gift = {"question": question, "saliency_layers": [late[0] - 1], "enhance_layers": late}
    early = {"question": question, "saliency_layers": [layers // 2], "enhance_layers": late}
    recipes = {
        "var": [("var", var)],
        "vhr": [("vhr", {})],
        "gift, map from the prompt's own pass": [("gift", gift)],
        "gift, map from a probe": [("gift", early)],
        "selective-emphasis": [("selective-emphasis", {})],
        "pai, attention part": [("pai", {"gamma": 1})],
        "pai": [("pai", {})],
        "cmai": [("cmai", {})],
        "opera": [("opera", {})],
        "visual-token-exit, hidden after half of the layers": [("visual-token-exit", {"exit_layer": layers // 2})],
        "visual-token-exit, leaving": [("visual-token-exit", {"exit_layer": layers // 2, "mode": "leave"})],
        "vhr + var": [("vhr", {}), ("var", var)],
    }
    ids = inputs["input_ids"]
    text = ids[ids != model.config.image_token_id][None]
    blind = {"input_ids": text, "attention_mask": torch.ones_like(text)}

    def blind_answer(model: Any) -> list[Answer]:
        return [Answer(model, blind)]

    read_again = Variant(more=lambda model: [PromptUpTo(model, inputs, model.model.language_model.layers, layers // 2)])
    floors = {
        "vhr": ("the prompt's text is read once more without the image", Variant(more=blind_answer)),
        "vhr + var": ("as vhr", Variant(more=blind_answer)),
        "pai": ("every token is computed once more without the image", Variant(more=blind_answer, each=True)),
        "gift, map from a probe": ("the prompt is read once more up to the saliency layer", read_again),
        "opera": ("five next tokens are tried before one is chosen", Variant(lambda model: Trying(model, 5))),
    }
    others = {
        "untouched, eager attention": EAGER,
        "var, written eagerly": Variant(lambda model: EagerVAR(model, ids, var)),
    }
    return Subject(title, model, processor, inputs, recipes, floors, others)


class Trying:
    """For a while every pass of a model is followed by further ones with a single token, which the cache forgets again."""

    def __init__(self, model: Any, times: int) -> None:
        self.model, self.times, self.busy = model, times, False

    def __enter__(self) -> None:
        self.handle = self.model.register_forward_hook(self.try_tokens)

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()

    def try_tokens(self, module: Any, args: tuple, output: Any) -> None:
        if self.busy:
            return
        self.busy, cache, token = True, cache_of(output), output.logits[:, -1:].argmax(dim=-1)
        for _ in range(self.times):
            module(input_ids=token, use_cache=True, **{cache_name(module): cache})
            cache.crop(-1)
        self.busy = False


class switched:
    """Another attention implementation for a while."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name

    def __enter__(self) -> None:
        self.model.set_attn_implementation(self.name)

    def __exit__(self, *_: Any) -> None:
        self.model.set_attn_implementation("sdpa")
