"""What recipes with texts of their own inside attention share: the text, where it is read, and its part of the schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file

from ...hooks import SiteTable
from ...interventions import ReattendError
from .base import Recipe
from .unnamed import Unnamed

T = TypeVar("T")


class TextsAside(Recipe):
    """Base of recipes that bring further texts to where the denoiser reads its prompt, as words or as tensors, for a part of the schedule."""

    tensors: str | None = Field(
        None,
        description="the same texts as tensors, for models without text encoders: a safetensors file with prompt_embeds [texts, tokens, "
        "width] in the order of the texts, and pooled_prompt_embeds and prompt_attention_mask where the model has them",
    )
    start: float = Field(0.0, ge=0, lt=1, description="first part of the schedule it acts in, as a fraction of the steps")
    stop: float | None = Field(1.0, gt=0, le=1, description="the fraction of the steps from which on it does not act")

    @model_validator(mode="after")
    def _in_order(self) -> TextsAside:
        if self.stop is not None and self.start >= self.stop:
            raise ValueError(f"start {self.start} must lie below stop {self.stop}")
        if self.tensors is not None and not Path(self.tensors).is_file():
            raise ValueError(f"tensors must be a safetensors file, and there is none at {self.tensors!r:.80}")
        return self

    def misfit(self, sites: SiteTable) -> str:
        chosen = text_sites(sites)
        if not len(chosen):
            return f"{self.slug} needs a diffusion model that reads a text by attention; {sites.model_name} has no such site"
        return chosen.refusal

    def given(self, texts: str | list[str], stop: float) -> dict[str, Any]:
        """What a `Context` is given of the texts and their part of the schedule. Raises ReattendError for a file that holds no tensors."""
        if self.start >= stop:
            raise ReattendError(f"{self.slug}: start {self.start} must lie below stop, which is {stop} for this model")
        given: dict[str, Any] = {"start": self.start, "stop": stop}
        if self.tensors is None:
            return {"texts": texts, **given}
        try:
            return {"tensors": load_file(self.tensors), **given}
        except SafetensorError as error:
            said = f"{self.slug}: tensors must be a safetensors file, and {self.tensors!r:.80} is none: {error}"
            raise ReattendError(said) from None


class NegativeText(TextsAside):
    """Base of recipes that keep a negative text out of an image where the denoiser reads its prompt."""

    beside = {"negative": "negative"}

    negative: str | list[str] = Field("", description="what is kept out of the image: one text, or one per prompt")
    tensors: str | None = Field(
        None,
        description="the negative text as tensors instead, for models without text encoders: a safetensors file with prompt_embeds "
        "[texts, tokens, width], with pooled_prompt_embeds where the model has them, and prompt_attention_mask [texts, tokens], 1 = a word, "
        "0 = padding. Without that mask padding acts as words do (nag reads it as the model reads its prompt's)",
    )
    start: float = Field(0.0, ge=0, lt=1, description="first part of the schedule with guidance, as a fraction of the steps")
    stop: float = Field(
        1.0, gt=0, le=1, description="the fraction of the steps from which on there is none; the effect lies in the first ones"
    )

    @model_validator(mode="after")
    def _one_text(self) -> NegativeText:
        if self.negative == []:
            raise ValueError("negative must be a text or one per prompt, got an empty list")
        if self.tensors is not None and self.negative:
            raise ValueError("give the negative text as negative or as tensors, not both")
        return self

    def unnamed(self, acts: bool) -> list[Unnamed]:
        """What a plan says where nobody has given a text. acts: whether the recipe does something without."""
        given = self.tensors is not None or "negative" in self.model_fields_set
        return [] if given else [Unnamed("negative", acts)]

    def text(self) -> dict[str, Any]:
        """What a `Context` is given of the negative text."""
        return self.given(self.negative, self.stop)


def text_sites(sites: SiteTable) -> SiteTable:
    """Cross-attention to the text, or joint attention where image and text see each other."""
    denoiser = sites.stack("denoiser")
    cross = denoiser.kind("cross")
    return cross if len(cross) else denoiser.kind("joint")


def by_model(sites: SiteTable, *, sd3: T, flux: T, wan: T, unet: T, cross: T) -> T:
    """What is published for a model, or for its next of kin: joint models that nobody names get `flux`, those with cross-attention `cross`."""
    if sites.model_name.startswith("Wan"):
        return wan
    if sites.model_name.startswith(("SD3", "StableDiffusion3")):
        return sd3
    if any(site.stack == "denoiser.mid" for site in sites):
        return unet
    return cross if len(sites.stack("denoiser").kind("cross")) else flux
