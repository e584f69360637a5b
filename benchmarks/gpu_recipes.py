"""Right or wrong on a device: every recipe beside the same model under the same recipe on the CPU."""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import gpu_profiles
import reattend
import torch
from gpu_parts import Part, Table, said
from torch import Tensor


class Compared(NamedTuple):
    """error: the largest difference of logits or pictures between device and CPU, of the largest one on the CPU. effect: that between
    the recipe and the untouched model on the CPU."""

    error: float
    effect: float

    @property
    def right(self) -> bool:
        return self.error < 1e-3 and self.effect > self.error


def measure(part: Part) -> None:
    found: list[bool] = []
    for title, of in (
        ("Language recipes on a random Llama of four layers", language),
        ("Vision-language recipes on shapes-llava", vision),
        ("Recipes for image generation on shapes-sd", pictures),
    ):
        table = part.table(title, ["right", "largest difference", "effect"])
        try:
            every = of(part.device.device)
        except Exception as error:  # tests or diffusers that are not there
            part.say(f"{title}: not tried, {said(error)}")
            continue
        if part.dry:
            every = dict(list(every.items())[:: 6 if of is not pictures else 2])
        for name, compare in every.items():
            if not part.reached(name):
                continue

            def ask(name: str = name, compare: Callable[[], Compared] = compare, table: Table = table) -> None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    one = compare()
                cells = {
                    "right": "yes" if one.right else "NO",
                    "largest difference": f"{one.error:.1e}",
                    "effect": f"{one.effect:.1e}",
                }
                part.set(table, name, cells)
                found.append(one.right)

            if not part.attempt(table, name, ask):
                found.append(False)
    part.say(f"{sum(found)} of {len(found)} recipes are right.")
    part.figure("recipes right", sum(found))
    part.figure("recipes tried", len(found))


def forced(model: Any, inputs: dict[str, Tensor], new: int = 3) -> Tensor:
    """Logits [B, new, V] of a generation whose tokens are the same whatever the logits, on the CPU."""
    from transformers import LogitsProcessorList

    how = {
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "max_new_tokens": new,
        "min_new_tokens": new,
    }
    out = model.generate(**inputs, **how, logits_processor=LogitsProcessorList([seven]))
    return torch.stack(out.logits, dim=1).float().cpu()


def seven(ids: Tensor, scores: Tensor) -> Tensor:
    return torch.zeros_like(scores).index_fill(1, torch.tensor([7], device=scores.device), 1.0)


def compared(cpu: Tensor, device: Tensor, plain: Tensor) -> Compared:
    # what a recipe rules out (-1000) is no logit
    possible = (cpu > -900) & (device > -900) & (plain > -900)
    scale = float(torch.where(possible, cpu, 0.0).abs().max())
    error, effect = (float(torch.where(possible, cpu - other, 0.0).abs().max()) / scale for other in (device, plain))
    return Compared(error, effect)


def beside(
    model: Any, inputs: dict[str, Tensor], slug: str, given: dict[str, Any], tokenizer: Any, device: torch.device
) -> Compared:
    """The same generation under a recipe on the CPU and on the device."""
    plain = forced(model, inputs)
    with reattend.apply(model, slug, **given, tokenizer=tokenizer):
        cpu = forced(model, inputs)
    moved = copy.deepcopy(model).to(device)
    on = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    with reattend.apply(moved, slug, **given, tokenizer=tokenizer):
        return compared(cpu, forced(moved, on), plain)


def language(device: torch.device) -> dict[str, Callable[[], Compared]]:
    """Two prompts of other lengths, padded on the left."""
    import methods  # noqa: F401
    import tiny_language
    from example import TEXTS, examples

    model, tokenizer = tiny_language.language_model("Llama"), tiny_language.tokenizer()
    inputs = dict(tokenizer(TEXTS, return_tensors="pt", padding=True))
    folder = tempfile.TemporaryDirectory(prefix="reattend-gpu-profiles-")

    def one(label: str, slug: str, example: Any) -> Compared:
        given = example.given((0, 1))
        if example.profile is not None:
            given["profile_path"] = str(example.profile(model, tokenizer).save(Path(folder.name) / f"{label}.safetensors"))
        return beside(model, inputs, slug, given, tokenizer, device)

    return {label: functools.partial(one, label, slug, example) for label, (slug, example) in examples("llm").items()}


def vision(device: torch.device) -> dict[str, Callable[[], Compared]]:
    """One scene and a question about it."""
    import methods  # noqa: F401
    import numpy as np
    from example import examples
    from reattend.zoo.worlds.drawing import picture
    from reattend.zoo.worlds.shapes import World, sample_scene

    model, processor = reattend.zoo.load("shapes-llava")
    scene, question = picture(sample_scene(np.random.default_rng(0), World()), 48, World()), "describe the image ."
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    inputs = dict(processor(text=text, images=[scene], return_tensors="pt"))
    folder = tempfile.TemporaryDirectory(prefix="reattend-gpu-profiles-")

    def one(label: str, slug: str, example: Any) -> Compared:
        given = example.given((0,))
        if "text" in given:
            given["text"] = ["describe the image"]
        if example.profile is not None:
            given["profile_path"] = gpu_profiles.made(slug, model, Path(folder.name))
        return beside(model, inputs, slug, given, processor, device)

    return {label: functools.partial(one, label, slug, example) for label, (slug, example) in examples("lvlm").items()}


def pictures(device: torch.device) -> dict[str, Callable[[], Compared]]:
    """A picture after four steps, from the same noise."""
    pipe = reattend.zoo.load("shapes-sd")
    pipe.set_progress_bar_config(disable=True)

    def draw(pipe: Any, slug: str, given: dict[str, Any]) -> Tensor:
        noise = torch.randn(
            1, pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2, generator=torch.Generator().manual_seed(0)
        )
        on = next(pipe.unet.parameters()).device
        session = reattend.apply(pipe, slug, **given) if slug else nullcontext()
        with session:
            out = pipe(
                "a red circle and a blue square",
                num_inference_steps=4,
                guidance_scale=2.0,
                latents=noise.to(on),
                output_type="latent",
            )
        return out.images.float().cpu()

    def one(slug: str, given: dict[str, Any]) -> Compared:
        plain, cpu = draw(pipe, "", {}), draw(pipe, slug, given)
        parts = {
            name: copy.deepcopy(part).to(device) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)
        }
        moved = type(pipe)(**{**pipe.components, **parts})
        moved.set_progress_bar_config(disable=True)
        return compared(cpu, draw(moved, slug, given), plain)

    given = {
        "softpag": {"scale": 3.0},
        "seg": {"sigma": 2.0},
        "nag": {"negative": "a green triangle", "scale": 8.0, "limit": 10.0},
    }
    return {slug: functools.partial(one, slug, chosen) for slug, chosen in given.items()}
