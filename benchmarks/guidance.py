"""What methods for image generation cost: whole pictures, as ratios to the untouched pipeline in the same run. `costs.py` runs and writes it.

Floor: the untouched pipeline with as many rows more in the denoiser's batch as the method has branches, copied and dropped again by two
hooks of torch's. Beside them: diffusers' own pipeline for the same edit, and the edit by an attention processor that writes the weights out.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import diffusers
import methods
import numpy as np
import reattend
import torch
from diffusers.models.attention_processor import Attention
from reattend.evaluation.suites.given_pictures import side_of
from reattend.hooks import Guide
from reattend.recipes.kit.denoisers import default_layers, image_layers
from reattend.zoo.worlds.drawing import picture
from reattend.zoo.worlds.shapes import CLEAR, sample_scene
from timing import Pace
from torch import Tensor, nn

STEPS = 4
GUIDANCE = 2.0
SCALE = 3.0
PROMPT = "a red circle and a blue square"
BOX = (0.1, 0.3, 0.4, 0.7)
# what methods are told of, once for the picture
TOLD: dict[str, Any] = {
    "negative": "a blue square",
    "words": [["circle", "square"]],
    "boxes": [{"red circle": BOX, "blue square": (0.55, 0.3, 0.95, 0.7)}],
    "cells": [{"a red circle": (0.0, 0.0, 0.5, 1.0), "a blue square": (0.5, 0.0, 1.0, 1.0)}],
    "removed": [[BOX]],
    "mask": [["0" * 8, *["0" + "1" * 6 + "0"] * 6, "0" * 8]],
    "box": [BOX],
}
WHY = {0: "no pass more", 1: "a branch of the conditional rows"}
OWN = {"shapes-sd": diffusers.StableDiffusionPAGPipeline, "shapes-sd3": diffusers.StableDiffusion3PAGPipeline}


@dataclass
class Drawing:
    """A pipeline that draws one picture. enter: what holds meanwhile."""

    pipe: Any
    enter: Callable[[], AbstractContextManager] = nullcontext
    more: dict[str, Any] | None = None

    def __call__(self) -> None:
        self.pipe(
            PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(0),
            output_type="latent", **(self.more or {}),
        )  # fmt: skip


def denoiser(pipe: Any) -> nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def copied(pipe: Any, cls: Any = None, **more: Any) -> Any:
    """A pipeline of the same parts but for a denoiser of its own, which sessions and processors may change."""
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    parts = {**pipe.components, name: copy.deepcopy(denoiser(pipe))}
    if name == "unet":
        more |= {"requires_safety_checker": False}
    taken = inspect.signature((cls or type(pipe)).__init__).parameters  # diffusers' PAG pipeline for SD3 has fewer parts
    made = (cls or type(pipe))(**{part: value for part, value in parts.items() if part in taken}, **more)
    made.set_progress_bar_config(disable=True)
    return made


@contextmanager
def more_rows(model: nn.Module, branches: int, shift: Callable[[Tensor, int], Tensor] | None = None) -> Any:
    """The conditional rows (the second half of the batch) are computed `branches` times more; their output is dropped, or shift(output,
    batch) is what comes of it."""
    batch = [0]

    def add(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        count = batch[0] = len(hidden)

        def grown(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.dim() or len(value) != count:
                return value
            return torch.cat([value, *[value[count // 2 :]] * branches])

        return tuple(map(grown, args)), {name: grown(value) for name, value in kwargs.items()}

    def take(module: Any, args: Any, output: Any) -> Any:
        kept = output[0][: batch[0]] if shift is None else shift(output[0], batch[0])
        return (kept, *output[1:])

    hooks = [model.register_forward_pre_hook(add, with_kwargs=True), model.register_forward_hook(take)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def guided(output: Tensor, batch: int) -> Tensor:
    """The shift of perturbed-attention guidance, on the unconditional half."""
    unconditional, conditional = output[:batch].chunk(2)
    away = SCALE * (conditional - output[batch:])
    return torch.cat([unconditional - away / (GUIDANCE - 1), conditional])


class Eager:
    """An attention processor as one would write it: the weights are written out, and in the last third of the rows
    each place sees itself and the text, if that is here, alone."""

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any
    ) -> Any:
        shape, joint = hidden_states.shape, encoder_hidden_states is not None
        places = hidden_states.shape[1]
        query, key, value = (self.parts(attn, hidden_states, encoder_hidden_states, part) for part in ("q", "k", "v"))
        scores = query @ key.transpose(2, 3) * attn.scale
        others = ~torch.eye(places, dtype=torch.bool)
        scores[-(len(scores) // 3) :, :, :places, :places].masked_fill_(others, float("-inf"))
        out = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        image = attn.to_out[1](attn.to_out[0](out[:, :places])).view(shape)
        if not joint:
            return image
        return image, out[:, places:] if attn.context_pre_only else attn.to_add_out(out[:, places:])

    @staticmethod
    def parts(attn: Attention, image: Tensor, text: Tensor | None, part: str) -> Tensor:
        def heads(x: Tensor, norm: Any) -> Tensor:
            x = x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        made = [heads(getattr(attn, f"to_{part}")(image), getattr(attn, f"norm_{part}", None))]
        if text is not None:
            made.append(heads(getattr(attn, f"add_{part}_proj")(text), getattr(attn, f"norm_added_{part}", None)))
        return torch.cat(made, dim=2)


def eager(pipe: Any, layer: nn.Module) -> Callable[[], AbstractContextManager]:
    layer.set_processor(Eager())  # type: ignore[operator]
    return lambda: more_rows(denoiser(pipe), 1, guided)


def chosen(side: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """{label: (slug, parameters)} of the methods for image generation. side: of the pictures that some of them are given, in pixels."""
    scene = picture(sample_scene(np.random.default_rng(0), CLEAR), side, CLEAR)
    return methods.timed("diffusion", {**TOLD, **dict.fromkeys(("background", "reference"), scene)})


def branches(pipe: Any, recipe: Any) -> int:
    """How many rows a method adds for each conditional one."""
    table = reattend.sites(pipe)
    held = [step for step in recipe.plan(table) for step in (step, *step.held)]
    return sum(isinstance(step, Guide) and bool(step.acts) for step in held)


def drawings(name: str) -> tuple[Drawing, dict[str, tuple[Drawing, int]]]:
    """The untouched pipeline, and {row: (drawing, rows that its floor adds)}."""
    pipe = reattend.zoo.load(name)
    pipe.set_progress_bar_config(disable=True)
    plain, table = Drawing(pipe), reattend.sites(pipe)
    (layer,) = default_layers(table)
    (site,) = image_layers(table)[layer]
    found: dict[str, tuple[Drawing, int]] = {"untouched": (Drawing(copied(pipe)), 0)}
    for label, (slug, given) in chosen(side_of(pipe)).items():
        parameters = given(table) if callable(given) else given
        recipe = reattend.recipe(slug, **parameters)
        if not recipe.supports(table).ok:
            continue
        own = copied(pipe)

        def enter(own: Any = own, recipe: Any = recipe) -> AbstractContextManager:
            return reattend.apply(own, recipe)

        found[label] = Drawing(own, enter), branches(pipe, recipe)
    module = site.name.partition(".")[2]  # without the pipeline's name of the denoiser
    official = copied(
        pipe, OWN[name], pag_applied_layers=[module.removesuffix(".attn").removesuffix(".transformer_blocks.0.attn1")]
    )
    found["diffusers' PAG pipeline, as pag"] = Drawing(official, more={"pag_scale": SCALE}), 1
    by_hand = copied(pipe)
    entered = eager(by_hand, denoiser(by_hand).get_submodule(module))
    found["eager attention processor, as pag"] = Drawing(by_hand, entered), 1
    return plain, found


@torch.no_grad()
def measure(name: str, rounds: int) -> dict[str, Any]:
    """The section of docs/costs.json: {row: {"picture", "floor", "above": [ratio, low, high]}}, and why a floor is what it is."""
    plain, found = drawings(name)
    floors = {added: Drawing(copied(plain.pipe)) for added in sorted({added for _, added in found.values()}) if added}
    rows, why, said = {}, {}, methods.floors("diffusion")
    for label, (drawing, added) in found.items():
        times = []
        with ExitStack() as open_now:
            open_now.enter_context(drawing.enter())
            if added:
                open_now.enter_context(more_rows(denoiser(floors[added].pipe), added))
            for _ in range(rounds + 1):
                times.append([seconds(plain), seconds(drawing), seconds(floors[added]) if added else None])
        times = times[1:]
        paces = {"picture": [own / base for base, own, _ in times]}
        if added:
            paces |= {"floor": [f / base for base, _, f in times], "above": [own / f for _, own, f in times]}
        rows[label] = {
            key: [round(part, 3) for part in (pace.value, pace.low, pace.high)]
            for key, pace in ((key, Pace.of(values)) for key, values in paces.items())
        }
        why[label] = "" if label == "untouched" else said.get(label, (WHY[added],))[0]
    title = f"{name}: a picture of {STEPS} steps, guidance {GUIDANCE:g}"
    return {"title": title, "new": STEPS, "rows": rows, "why": why}


def seconds(function: Callable[[], None]) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


def section(found: dict[str, Any]) -> str:
    """Its table in docs/costs.md."""
    lines = [f"## {found['title']}", "", "| | picture | floor | above its floor | why |", "|---|---|---|---|---|"]
    for label, row in found["rows"].items():
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*row[key]) if key in row else "" for key in ("picture", "floor", "above")]
        lines.append(f"| {label} | {' | '.join(cells)} | {found['why'][label]} |")
    return "\n".join(lines)
