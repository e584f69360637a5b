"""The models and prompts on which recipes are timed: a real language model, a small trained LLaVA, and one with a real decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import methods
import reattend
import torch
from reattend.comparison.loading import packaged_smollm2
from reattend.hooks.trackers.caches import cache_name, cache_of
from reattend.recipes import Profile, recipe_class
from timing import Answer, PromptUpTo, Variant, switched

MARKED = "Answer with a single word and nothing else."
SENTENCE = "The {n}th visitor of the museum wrote in the guest book that the lamps were too bright for the old maps. "
SINK_DIM = 507  # in which SmolLM2's sinks show


@dataclass
class Subject:
    """A model with one prompt, and what rows of the methods' examples ask of it (see `methods`).

    kind: of the methods that are timed on it. marks: {kind of passage: what is marked of the prompt}. var: parameters under which var
    acts. together: {label: recipes that are timed together}. others: further ways to answer, for comparison.
    """

    title: str
    kind: str
    model: Any
    tokenizer: Any
    inputs: dict[str, torch.Tensor]
    layers: int
    folder: Path
    marks: dict[str, Any] = field(default_factory=dict)
    question: str = ""
    var: dict[str, Any] = field(default_factory=dict)
    together: dict[str, list[str]] = field(default_factory=dict)
    others: dict[str, Variant] = field(default_factory=dict)

    @property
    def recipes(self) -> dict[str, list[tuple[str, dict[str, Any]]]]:
        """{label: recipes with their parameters}, those of every method of this kind."""
        alone = {
            label: (slug, given(self) if callable(given) else given)
            for label, (slug, given) in methods.timed(self.kind, self.marks).items()
        }
        together = {label: [alone[part] for part in parts] for label, parts in self.together.items()}
        return {label: [choice] for label, choice in alone.items()} | together

    @property
    def floors(self) -> dict[str, tuple[str, Variant]]:
        """{label: (which passes the method needs by its definition, how the untouched model does them)}"""
        alone = {label: (why, FLOORS[name](self)) for label, (why, name) in methods.floors(self.kind).items()}
        # together what one of them needs; two floors would be two further passes of their own, which no variant does
        known = {label: [part for part in parts if part in alone] for label, parts in self.together.items()}
        return alone | {label: (f"as {parts[0]}", alone[parts[0]][1]) for label, parts in known.items() if len(parts) == 1}

    @property
    def marked(self) -> dict[str, Any]:
        return {"text": self.marks["highlight"]}

    @property
    def segments(self) -> list[str]:
        return self.marks["segments"]

    @property
    def heads(self) -> list[list[int]]:
        """Twenty of a model with 30 layers."""
        return [[layer, head] for layer in range(5, 25, 2) for head in (1, 4)]

    @property
    def late(self) -> list[int]:
        """The middle third of the layers."""
        return list(range(self.layers // 3, self.layers * 2 // 3))

    def under(self, chosen: list[tuple[str, dict[str, Any]]]) -> Variant:
        return Variant(lambda model: reattend.apply(model, *chosen, tokenizer=self.tokenizer))

    def learned(self, slug: str) -> str:
        """The profile that a method's own run makes, once."""
        file = self.folder / f"{slug}.safetensors"
        if not file.is_file():
            recipe_class(slug).profile(self.model, self.tokenizer).save(file)
        return str(file)

    def evenly(self, slug: str) -> str:
        """A profile of soft-injection's form with shares of a half: what is mixed in does not matter for the time it takes."""
        from reattend.recipes.kit.profile import fingerprint

        text = self.model.config
        shape = (text.num_hidden_layers, text.num_attention_heads)
        tensors = {"task_embedding": torch.ones(1, *shape, text.head_dim), "alpha": torch.full(shape, 0.5)}
        made = Profile(slug, fingerprint(self.model), tensors, {"tasks": ["timing"]})
        return str(made.save(self.folder / f"{slug}.safetensors"))

    def blind(self) -> Answer:
        """The prompt without its image."""
        ids = self.inputs["input_ids"]
        text = ids[ids != self.model.config.image_token_id][None]
        return Answer(self.model, {"input_ids": text, "attention_mask": torch.ones_like(text)})

    def half(self) -> Answer:
        return PromptUpTo(self.model, self.inputs, self.model.model.language_model.layers, self.layers // 2)


# how the untouched model does the passes that a method needs by its definition
FLOORS: dict[str, Callable[[Subject], Variant]] = {
    "twice": lambda subject: Variant(more=lambda model: [Answer(model, subject.inputs)], each=True),
    "attended twice": lambda subject: Variant(lambda model: attended_twice(model)),
    "blind prompt": lambda subject: Variant(more=lambda model: [subject.blind()]),
    "blind answer": lambda subject: Variant(more=lambda model: [subject.blind()], each=True),
    "read up to half": lambda subject: Variant(more=lambda model: [subject.half()]),
    "five trials": lambda subject: Variant(lambda model: Trying(model, 5)),
}
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
    title = f"SmolLM2-135M, prompt of {inputs['input_ids'].shape[1]} tokens"
    return Subject(
        title, "llm", model, tokenizer, inputs, 30, folder, marks={"highlight": MARKED, "segments": segments},
        together={"emphasise + instaboost": ["emphasise, all heads", "instaboost"]},
        others={"untouched, eager attention": EAGER},
    )  # fmt: skip


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
        "shapes-llava (6 layers of width 128), 36 image tokens", model, processor, inputs, question, folder,
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
    before, behind = (tokenizer(t).input_ids for t in ("<|im_start|>user\n", question + "<|im_end|>\n<|im_start|>assistant\n"))
    ids = torch.tensor([before + [image] * patches**2 + behind])
    pixels = torch.randn(1, 3, 8 * patches, 8 * patches)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    # sinks on the first token and on three image tokens, as a trained LLaVA has them
    model.model.language_model.layers[1].register_forward_pre_hook(plant, with_kwargs=True)
    return vision(
        f"LLaVA around SmolLM2 (30 layers of width 576), {patches**2} image tokens", model, tokenizer, inputs, question, folder,
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
    title: str,
    model: Any,
    processor: Any,
    inputs: dict[str, torch.Tensor],
    question: str,
    folder: Path,
    var: dict[str, Any],
    layers: int,
) -> Subject:
    """The vision-language recipes on a model of so many layers, with their published strengths."""
    from eager_var import EagerVAR

    ids = inputs["input_ids"]
    return Subject(
        title, "lvlm", model, processor, inputs, layers, folder, question=question, var=var, together={"vhr + var": ["vhr", "var"]},
        others={"untouched, eager attention": EAGER, "var, written eagerly": Variant(lambda model: EagerVAR(model, ids, var))},
    )  # fmt: skip


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
