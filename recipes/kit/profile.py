"""What is known about a model: profiles that a profiling step learned, and models whose constants are published.

A profile is a safetensors file with JSON metadata; data only, shareable.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...hooks import SiteTable, sites
from ...hooks.sites.discovery import pretrained_root, unwrapped_model
from ...interventions import ReattendError
from .checks import check_output, existing_file, read_json, writing
from .contents import numbered_sites
from .denoisers import image_layers

FORMAT = "reattend-profile-1"
# what users write for profile_path to name the profile kept for their model
CACHED = "cached"


@dataclass
class Profile:
    """tensors: what was learned, by name. facts: recipe, model fingerprint, options, measurements - JSON values."""

    recipe: str
    model: dict[str, Any]
    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike, *, overwrite: bool = True) -> Path:
        """Writes one .safetensors file, over one that is there unless overwrite=False, and makes missing folders."""
        path = check_output(path, "path", overwrite=overwrite)
        try:
            told = {"model": json.dumps(self.model), "facts": json.dumps(self.facts)}
        except (TypeError, ValueError, RecursionError) as error:
            raise ReattendError(f"model and facts of a profile must be JSON values: {error}") from None
        with writing(path, "path"):
            # copies, since tensors that share memory cannot be written
            held = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in self.tensors.items()}
            save_file(held, path, metadata={"format": FORMAT, "recipe": self.recipe, **told})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> Profile:
        """Reads a profile file. Raises ReattendError when it is not one."""
        path = existing_file(path, "profile file")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ReattendError(f"{str(path)!r} is not a safetensors file: {error}") from None
        if metadata.get("format") != FORMAT:
            raise ReattendError(
                f"{str(path)!r} is not a reattend profile (format {metadata.get('format')!r}, expected {FORMAT!r})"
            )
        missing = [name for name in ("recipe", "model", "facts") if name not in metadata]
        if missing:
            raise ReattendError(
                f"the profile {str(path)!r} is broken: its metadata tells no {' and no '.join(missing)}; make it anew"
            )
        told = {name: read_json(metadata[name], f"{name} of the profile {str(path)!r}") for name in ("model", "facts")}
        for name, value in told.items():
            if not isinstance(value, dict):
                raise ReattendError(f"the profile {str(path)!r} is broken: its {name} is no JSON object; make it anew")
        return cls(metadata["recipe"], told["model"], tensors, told["facts"])

    def check(self, recipe: str, model: dict[str, Any]) -> None:
        """Raises ReattendError unless the profile was made by this recipe for a model of this shape."""
        if self.recipe != recipe:
            raise ReattendError(f"this profile was made by recipe {self.recipe!r}, not by {recipe!r}")
        wrong = [
            f"{k} {self.model.get(k)} instead of {model[k]}" for k in model if k != "name" and self.model.get(k) != model[k]
        ]
        if wrong:
            raise ReattendError(
                f"this profile was made for another model ({self.model.get('name') or 'unnamed'}): it has {', '.join(wrong)}; "
                f"run `reattend profile {recipe} MODEL` for this one"
            )


def fingerprint(model: Any) -> dict[str, Any]:
    """What identifies the shape of a model's decoder or denoiser: class, layers, heads, width, vocabulary; and its name for people."""
    inner = unwrapped_model(model)
    root = pretrained_root(inner) if isinstance(inner, nn.Module) else None
    return table_fingerprint(sites(model), getattr(root, "config", None))


def table_fingerprint(table: Any, config: Any = None) -> dict[str, Any]:
    config = table.config if config is None else config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    numbered = numbered_sites(table)
    drawing = bool(image_layers(table))
    widest = max(((s.num_heads or 0) * (s.head_dim or 0) for _, s in numbered), default=0)
    return {
        # a denoiser is the same alone and in whatever pipeline
        "class": "diffusion model" if drawing else table.model_name,
        "layers": len({layer for layer, _ in numbered}),
        "heads": max((s.num_heads or 0 for _, s in numbered), default=0),
        "width": widest if drawing else getattr(text, "hidden_size", None),
        "vocabulary": getattr(text, "vocab_size", None),
        "name": getattr(config, "_name_or_path", "") or "",
    }


def cache_folder() -> Path:
    """Where profiles are kept: `reattend/` in the user's Hugging Face cache."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "reattend"


def cached_path(recipe: str, table: Any) -> Path:
    """Where the profile of a recipe for a model is kept: one file per recipe, shape and weights of the model's attention."""
    held = table_fingerprint(table)
    name = re.sub(r"[^A-Za-z0-9.]+", "-", Path(held["name"]).name or held["class"]).strip("-")
    key = hashlib.sha256(json.dumps([held, _weights(table)], sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / "profiles" / recipe / f"{name}-{key}.safetensors"


def _weights(table: Any) -> str:
    """A sample of the first and last attention's own weights, the same in float32 and bfloat16; "" where they are not in memory."""
    found = [site for _, site in numbered_sites(table)]
    parts = []
    for site in found[:: max(1, len(found) - 1)]:
        for name, weight in table.module(site).named_parameters():
            if weight.is_floating_point() and weight.device.type != "meta" and weight.numel():
                parts += [name, weight.detach().flatten()[:16].bfloat16().float().tolist()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest() if parts else ""


def find_profile(recipe: Any, path: str | None, table: Any, *, of_any: bool = False) -> Profile:
    """The profile of a recipe (with its parameters) for this model: of a file, or with path None or "cached" the one in the cache.

    of_any: a file made by another recipe will do, if it holds what this one needs. Raises ReattendError where there is none, where it
    belongs to another recipe or model, or where it does not hold what the recipe's `contents` tell.
    """
    slug = recipe.slug
    if path in (None, CACHED):
        place = cached_path(slug, table)
        if not place.is_file():
            raise ReattendError(
                f"no profile of {slug!r} is kept for this {table.model_name}: run `reattend profile {slug} MODEL`, or "
                f"reattend.recipes.cached_profile({slug!r}, model, processor), or name a file with profile_path"
            )
        profile = Profile.load(place)
        profile.check(slug, table_fingerprint(table))
    else:
        assert path is not None
        profile = Profile.load(path)
        profile.check(profile.recipe if of_any else slug, table_fingerprint(table))
    recipe.contents.check(recipe, profile.tensors, profile.facts, table)
    return profile


@dataclass(frozen=True)
class KnownModel:
    """A published model, whose constants a recipe knows, by the shape of its language model: fine-tuned and renamed ones count too.

    text_types: model types of the text config. vocabulary: sizes of the vocabulary that occur (None: any). kind: model type of the
    whole model (None: any).
    """

    name: str
    text_types: tuple[str, ...]
    hidden: int
    layers: int
    intermediate: int
    vocabulary: range | None = None
    kind: str | None = None

    def matches(self, table: SiteTable) -> bool:
        text = table.config.get_text_config()
        shape = (text.hidden_size, text.num_hidden_layers, getattr(text, "intermediate_size", None))
        return (
            shape == (self.hidden, self.layers, self.intermediate)
            and text.model_type in self.text_types
            and (self.vocabulary is None or text.vocab_size in self.vocabulary)
            and (self.kind is None or table.config.model_type == self.kind)
        )
