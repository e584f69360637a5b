"""What an example of a method says: with which parameters it shows on a tiny model, and what it owes there.

Every method has one file `examples/<slug with underscores>.py` with `EXAMPLES = {variant: Example(...)}`, the variant "" being the usual one;
the matrix (`test_matrix*.py`) runs each of them through every condition, `make matrix ARGS="-k <slug>"` those of one method. A file may
also say `BAD = [({parameters}, "what the error says"), ...]` (`test_recipe_arguments.py`), what official code gave, as `GOLDEN` and `golden`
(`test_golden.py`), and what the benchmarks need (`benchmarks/methods.py`).
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "examples"

# What rows of a batch say and what is marked there: the prompts of language models, and those of `asked_images` for models with images.
TEXTS = [
    "Please: Answer in French. The capital of Italy is Rome. What is the capital?",
    "Anna has a red house. Answer in one word.",
]
PASSAGES = [["Answer in French."], ["red house", "one word"]]
SEGMENTS = [["Answer in French.", " The capital of Italy is Rome."], [" a red", " house."]]
WORDS_BESIDE_IMAGES = [["red dog"], ["cats"], ["red dog"]]
# methods that weigh an image's tokens need them in the sequence
IN_THE_SEQUENCE = {"mllama": "cross-attention.*a row there holds image weights alone", "idefics2": "are no places of the image"}
# PaliGemma's prompt sees all of itself
NOT_CAUSAL = {"paligemma": "needs a language model with a causal decoder"}
# heads of several layers, among them two of one that share a key head
HEADS = [[0, 1], [1, 0], [1, 3], [2, 2], [3, 1]]


@dataclass(frozen=True)
class Example:
    """One way to run a method.

    kind: "llm", "lvlm", "diffusion" or "vision", as in `Info.kinds`: which tiny models, prompts and conditions.
    parameters: of the recipe; strong enough that random weights show it. Models have 4 layers with 4 heads on 2 key heads.
    rows: parameters with one item per prompt: of two for language models (`TEXTS`), of three with one image, two and none.
    off: what added to the parameters makes the method change nothing, not a bit; None where it has no such strength.
    layers: how many sites (and "logits") `session.stats` counts, or what tells it for a table of a model's sites; acts: in
    which passes of a generation each of them is counted.
    reads: whether it only reads, so that no picture changes. further: whether its own further passes are counted too.
    text_too: with images, whether it also changes a prompt without any.
    unconditional: whether it also acts in calls of a denoiser that see the unconditional half alone.
    profile: (model, tokenizer) -> the profile that it needs.
    operations: how many tensor operations it may add to a decode step, (per layer, once); None where it is not measured.
    skips: {condition: why it does not apply}; refused: {"model", "condition" or "model, condition": words of the error that says so}.
    """

    kind: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    off: Mapping[str, Any] | None = None
    layers: int | Callable[[Any], int] = 4
    acts: Sequence[str] = ("prefill", "decode")
    reads: bool = False
    further: bool = False
    text_too: bool = False
    unconditional: bool = False
    profile: Callable[[Any, Any], Any] | None = None
    operations: tuple[int, int] | None = None
    skips: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def given(self, rows: Sequence[int], **more: Any) -> dict[str, Any]:
        """The parameters for these prompts of the batch."""
        return {**self.parameters, **{name: [items[row] for row in rows] for name, items in self.rows.items()}, **more}

    def on(self, model: Any, folder: Path) -> dict[str, Any]:
        """The parameters for this model, with the profile that the method needs written into a folder."""
        if self.profile is None:
            return dict(self.parameters)
        handle, path = tempfile.mkstemp(".safetensors", dir=folder)
        os.close(handle)
        return {**self.parameters, "profile_path": str(self.profile(model, None).save(path))}

    def counted(self, sites: Any) -> int:
        """How many sites it acts at on a model with these."""
        return self.layers(sites) if callable(self.layers) else self.layers

    def refusal(self, *place: str) -> str:
        """The words with which it refuses a (model, condition); "" where it must run."""
        return next((self.refused[key] for key in (", ".join(place), *place) if key in self.refused), "")


@functools.cache
def modules() -> dict[str, Any]:
    """{slug: its example file}."""
    names = sorted(item.name for item in pkgutil.iter_modules([str(FOLDER)]))
    return {name.replace("_", "-"): importlib.import_module(f"examples.{name}") for name in names}


def examples(kind: str) -> dict[str, tuple[str, Example]]:
    """{"slug" or "slug, variant": (slug, example)} of one kind of model."""
    found = {}
    for slug, module in modules().items():
        for variant, example in module.EXAMPLES.items():
            if example.kind == kind:
                found[", ".join(filter(None, (slug, variant)))] = (slug, example)
    return found
