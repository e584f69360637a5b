"""The layers of GIFT: where attention on the image shifts most while questions are read, and where image and question move together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...hooks import Capture, Plan, Question, attach, running, sites
from ...hooks.sites.discovery import unwrapped_model
from ...interventions import Call, ReattendError
from ...interventions.families.gaze import focused_rows, image_columns, positive_shift, row_shares
from ..kit.base import Recipe
from ..kit.images import image_misfit
from ..kit.profile import Profile, table_fingerprint
from ..kit.profiling import checked, track
from ..kit.words import chooser
from .material.image_questions import inputs_of, read_samples

ROLE = "profiled-question"


@dataclass
class Watcher:
    """What the prompts showed: {layer: [value per prompt]}."""

    shift: dict[int, list[float]] = field(default_factory=dict)
    image: dict[int, list[float]] = field(default_factory=dict)
    question: dict[int, list[float]] = field(default_factory=dict)

    def read(self, call: Call, edits: Sequence[Any]) -> None:
        tokens = call.tokens
        assert tokens is not None and call.site is not None
        if "image" not in tokens:
            raise ReattendError("every sample needs an image: one of them has no image tokens")
        layer = call.site.layer
        words = tokens.positions(f"{ROLE}-words", 0, call.total)
        total = positive_shift(call, words, image_columns(tokens)).total
        self.shift.setdefault(layer, []).extend(total.sum(dim=1).tolist())
        rows = focused_rows(call)
        columns = torch.stack([call.columns("image"), call.columns(ROLE)], dim=1)
        shares = row_shares(call, rows, columns)
        self.image.setdefault(layer, []).extend(shares[:, 0].tolist())
        self.question.setdefault(layer, []).extend(shares[:, 1].tolist())


@checked
def gaze_layers(
    recipe: type[Recipe],
    model: Any,
    processor: Any,
    *,
    samples: Iterable[Any] | str | None = None,
    words: str = "auto",
    enhance_layers: Sequence[int] | None = None,
    **options: Any,
) -> Profile:
    """Chooses the layers from image-question pairs; 50 to 100 of them are the paper's advice. Cost: one forward pass for each.

    samples: (image, question) pairs, ready inputs of the model (mappings of tensors), or a JSON-lines file of {"image": path,
    "question": text}. enhance_layers: the layers to change, where they are known. Tensors of the profile: saliency_layers [1], the
    layer whose weights on the image rise most in sum while the question is read; enhance_layers [n], those given or those of
    `moving_together`; shift, image_share and question_share [layers], the means that they come from.
    Raises ReattendError for a model that takes no images, samples that cannot be read, or shares that never move together.
    """
    if options:
        raise ReattendError(f"profile of {recipe.slug!r} takes samples, words and enhance_layers, not {', '.join(options)}")
    table = sites(model)
    reason = image_misfit(table, recipe.slug)
    if reason:
        raise ReattendError(f"cannot profile this model: {reason}")
    there = {s.layer for s in table.stack("decoder").kind("self")}
    if enhance_layers is not None and not (enhance_layers and there.issuperset(enhance_layers)):
        raise ReattendError(
            f"enhance_layers must name layers of the decoder, {min(there)} to {max(there)}, got {enhance_layers}"
        )
    if running(model):
        raise ReattendError("a profile must show the plain model: end the session that is active on it first")
    prompts = read_samples(samples)
    chosen, watcher, inner = table.stack("decoder").kind("self"), Watcher(), unwrapped_model(model)
    plan = Plan(recipe.slug, [Question(ROLE, words=chooser(words)), Capture(chosen, watcher.read)])
    with torch.no_grad(), attach(model, [plan], tokenizer=processor):
        for sample in track(prompts, "image-question pairs", len(prompts)):
            inner(**inputs_of(sample, processor, inner.device))
    layers = sorted(watcher.shift)
    shift, image, question = (
        torch.tensor([seen[n] for n in layers]) for seen in (watcher.shift, watcher.image, watcher.question)
    )
    best = layers[int(shift.mean(dim=1).argmax())]
    if enhance_layers is None:
        first, last = moving_together(image, question)
        change = layers[first : last + 1]
    else:
        change = sorted(set(enhance_layers))
    facts = {
        "samples": len(prompts),
        "words": words,
        "saliency_layers": [best],
        "enhance_layers": change,
        "profile": {str(n): round(float(s), 4) for n, s in zip(layers, shift.mean(dim=1), strict=True)},
    }
    tensors = {
        "saliency_layers": torch.tensor([best]),
        "enhance_layers": torch.tensor(change),
        "shift": shift.mean(dim=1),
        "image_share": image.mean(dim=1),
        "question_share": question.mean(dim=1),
    }
    return Profile(recipe.slug, table_fingerprint(table), tensors, facts)


def moving_together(image: Tensor, question: Tensor) -> tuple[int, int]:
    """(first, last): the range of layers in which the shares [layers, samples] of image and question rise and fall together.

    Our rule for the paper's wish: each step from a layer to the next counts by how much more often both shares move the same way
    than opposite ways (-1 to 1, mean over samples), and the range is the one with the largest sum. Raises ReattendError where no
    step counts more than 0.
    """
    agree = (image.diff(dim=0).sign() * question.diff(dim=0).sign()).mean(dim=1).tolist()
    best, start, total, found = 0.0, 0, 0.0, None
    for step, value in enumerate(agree):
        if total <= 0:
            start, total = step, 0.0
        total += value
        if total > best:
            best, found = total, (start, step + 1)
    if found is None:
        raise ReattendError("attention on image and question never moves together here: pass enhance_layers=[...]")
    return found
