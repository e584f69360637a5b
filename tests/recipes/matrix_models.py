"""The tiny models of the matrix that read and write text, by kind, each with prompts whose rows differ in length and passages."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import asked_images
import pytest
import reattend
import tiny_language
import tiny_models
import torch
from example import TEXTS, Example, examples
from reattend.interventions import ReattendError
from torch import Tensor

GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
PROFILES = tempfile.TemporaryDirectory(prefix="reattend-matrix-")


class Language:
    """Random language models: full attention, windows that the prompt fills, a window that the answer fills, and both kinds of layers."""

    kind, rows = "llm", (0, 1)
    configs = {
        "Llama": {},
        "Mistral": {"sliding_window": 12},
        "Mistral, filling": {"sliding_window": 26},
        "Gemma3": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2},
    }
    tokenizer = staticmethod(tiny_language.tokenizer)

    def model(self, name: str) -> Any:
        return language_model(name)

    def inputs(self, name: str, rows: Sequence[int], side: str = "left") -> dict[str, Any]:
        return dict(tiny_language.tokenizer(side=side)([TEXTS[row] for row in rows], return_tensors="pt", padding=True))

    def moves(self, example: Example) -> list[int]:
        """The rows that the method changes."""
        return [0, 1]


class WithImages:
    """Vision-language models of every family: a prompt with one image, with two, and with none."""

    kind, rows = "lvlm", (0, 1, 2)
    families = asked_images.FAMILIES
    first_image = (0, 1, 3)  # of each prompt, among all images of the batch
    tokenizer = staticmethod(asked_images.tokenizer)

    def model(self, name: str) -> Any:
        return with_images(name).model

    def inputs(self, name: str, rows: Sequence[int], side: str = "left") -> dict[str, Any]:
        """As the processor makes them; pictures are those that the prompts have in the whole batch."""
        tiny, first = with_images(name), self.first_image[rows[0]]
        prompts = [asked_images.PROMPTS[row] for row in rows]
        return asked_images.inputs_of(replace(tiny, expand=lambda n: tiny.expand(n + first)), prompts, side)

    def moves(self, example: Example) -> list[int]:
        return [0, 1, 2] if example.text_too else [0, 1]


@functools.cache
def language_model(name: str) -> Any:
    return tiny_language.language_model(name.split(",")[0], **Language.configs[name])


@functools.cache
def with_images(name: str) -> tiny_models.Tiny:
    family = name.removeprefix("windowed ")
    tiny = asked_images.build(family)
    if family in (
        "pixtral",
        "mistral3",
    ):  # published models have no window, the class has one; or so short that images leave it
        tiny.model.config.text_config.sliding_window = None if name == family else 24
    return tiny


KINDS = {"llm": Language(), "lvlm": WithImages()}


class Case:
    """One method on one model."""

    def __init__(self, name: str, model: str, kind: str) -> None:
        self.label, self.name, self.models = name, model, KINDS[kind]
        self.slug, self.example = examples(kind)[name]
        self.model = self.models.model(model)
        self.moves = self.models.moves(self.example)

    def choice(self, rows: Sequence[int] | None = None, **more: Any) -> tuple[str, dict[str, Any]]:
        """(name, parameters) of the recipe for these prompts."""
        given = self.example.given(self.models.rows if rows is None else rows, **more)
        if self.example.profile is not None:
            given["profile_path"] = str(profile(self.models.kind, self.name, self.label))
        return self.slug, given

    def apply(self, rows: Sequence[int] | None = None, **more: Any) -> Any:
        return reattend.apply(self.model, self.choice(rows, **more), tokenizer=self.models.tokenizer())

    def inputs(self, rows: Sequence[int] | None = None, side: str = "left") -> dict[str, Any]:
        return self.models.inputs(self.name, self.models.rows if rows is None else rows, side)

    def generate(self, rows: Sequence[int] | None = None, new: int = 3, **options: Any) -> tuple[Tensor, Tensor]:
        """(token ids, logits [B, new, V])"""
        how = {**GREEDY, "max_new_tokens": new, "min_new_tokens": new, "suppress_tokens": [tiny_models.IMAGE]}
        if self.models.kind == "llm":
            del how[
                "suppress_tokens"
            ]  # with images: without a cache the model would take a placeholder that it wrote for a further one
        inputs = self.inputs(rows)
        torch.manual_seed(5)
        out = self.model.generate(**inputs, **{**how, **options})
        return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)

    @torch.no_grad()
    def logits(self, rows: Sequence[int] | None = None, side: str = "left") -> Tensor:
        """[B, T, V] of one pass over the prompts."""
        return self.model(**self.inputs(rows, side)).logits

    def plain(self) -> Tensor:
        """Logits [B, 3, V] of a generation without the recipe."""
        return plain(self.models.kind, self.name)

    def refused(self, condition: str, run: Callable[[], Any] | None = None) -> bool:
        """Whether the method says that it cannot do this (by default: generate); it must do so then, with the words of its example."""
        said = self.example.refusal(self.name, condition)
        if said:
            with pytest.raises(ReattendError, match=said), self.apply():
                run() if run else self.generate(new=5)
        return bool(said)

    def beside(self, apply: Callable[[], Any]) -> None:
        """A generation beside another session, which refuses or is refused."""
        with apply():
            self.generate(new=5)

    @property
    def counts(self) -> list[int]:
        """How often each layer is counted in one pass over the prompt and two steps after it."""
        return [("prefill" in self.example.acts) + 2 * ("decode" in self.example.acts)] * self.example.layers


def cases(condition: str, **models: Sequence[str]) -> list[Any]:
    """Parameters for a test of one condition. models: the models that it runs on, by kind."""
    found = []
    for kind, names in models.items():
        for name, (_, example) in examples(kind).items():
            reason = example.skips.get(condition)
            marks = [pytest.mark.skip(reason=f"{name}: {reason}")] if reason else []
            found += [pytest.param(name, model, kind, marks=marks, id=f"{name}-{model}") for model in names]
    return found


@functools.cache
def plain(kind: str, model: str) -> Tensor:
    (name, *_) = examples(kind)
    return Case(name, model, kind).generate()[1]


@functools.cache
def profile(kind: str, model: str, label: str) -> Path:
    example, models = examples(kind)[label][1], KINDS[kind]
    assert example.profile is not None
    path = Path(PROFILES.name) / f"{kind}-{model}-{label}.safetensors"
    return example.profile(models.model(model), models.tokenizer()).save(path)


def differs(one: Tensor, other: Tensor) -> Tensor:
    """[B]: the largest difference among tokens that neither of them rules out."""
    possible = (one > -900) & (other > -900)
    return torch.where(possible, (one - other).abs(), 0.0).flatten(1).amax(dim=1)
