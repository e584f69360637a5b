"""Profiles: what a profiling step learned about a model. Safetensors with JSON metadata; data only, shareable as a file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..hooks import sites
from ..hooks.discovery import pretrained_root, unwrapped_model
from ..interventions import ReattendError

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

    def save(self, path: str | os.PathLike) -> Path:
        """Writes one .safetensors file."""
        path = Path(path)
        metadata = {"format": FORMAT, "recipe": self.recipe, "model": json.dumps(self.model), "facts": json.dumps(self.facts)}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous().cpu() for k, v in self.tensors.items()}, path, metadata=metadata)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> Profile:
        """Reads a profile file. Raises ReattendError when it is not one."""
        if not Path(path).is_file():
            raise ReattendError(f"no profile file at {str(path)!r}")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ReattendError(f"{str(path)!r} is not a safetensors file: {error}") from None
        if metadata.get("format") != FORMAT:
            raise ReattendError(
                f"{str(path)!r} is not a reattend profile (format {metadata.get('format')!r}, expected {FORMAT!r})"
            )
        return cls(metadata["recipe"], json.loads(metadata["model"]), tensors, json.loads(metadata["facts"]))

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
    """What identifies the shape of a model's decoder: class, layers, heads, width, vocabulary; and its name for people."""
    return table_fingerprint(sites(model), getattr(pretrained_root(unwrapped_model(model)), "config", None))


def table_fingerprint(table: Any, config: Any = None) -> dict[str, Any]:
    config = table.config if config is None else config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    decoder = table.stack("decoder").kind("self")
    return {
        "class": table.model_name,
        "layers": decoder.num_layers,
        "heads": max((s.num_heads or 0 for s in decoder), default=0),
        "width": getattr(text, "hidden_size", None),
        "vocabulary": getattr(text, "vocab_size", None),
        "name": getattr(config, "_name_or_path", "") or "",
    }


def cache_folder() -> Path:
    """Where profiles are kept: `reattend/` in the user's Hugging Face cache."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "reattend"


def cached_path(recipe: str, table: Any) -> Path:
    """Where the profile of a recipe for a model is kept: one file per recipe, shape and weights of the decoder's attention."""
    held = table_fingerprint(table)
    name = re.sub(r"[^A-Za-z0-9.]+", "-", Path(held["name"]).name or held["class"]).strip("-")
    key = hashlib.sha256(json.dumps([held, _weights(table)], sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / "profiles" / recipe / f"{name}-{key}.safetensors"


def _weights(table: Any) -> str:
    """A sample of the first and last attention's own weights, the same in float32 and bfloat16; "" where they are not in memory."""
    decoder = list(table.stack("decoder").kind("self"))
    parts = []
    for site in decoder[:: max(1, len(decoder) - 1)]:
        for name, weight in table.module(site).named_parameters():
            if weight.is_floating_point() and weight.device.type != "meta" and weight.numel():
                parts += [name, weight.detach().flatten()[:16].bfloat16().float().tolist()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest() if parts else ""


def find_profile(recipe: str, path: str | None, table: Any) -> Profile:
    """A recipe's profile for this model: of a file, or with path None or "cached" the one kept in the cache.

    Raises ReattendError where there is none, or where it belongs to another recipe or model.
    """
    if path in (None, CACHED):
        place = cached_path(recipe, table)
        if not place.is_file():
            raise ReattendError(
                f"no profile of {recipe!r} is kept for this {table.model_name}: run `reattend profile {recipe} MODEL`, or "
                f"reattend.recipes.cached_profile({recipe!r}, model, tokenizer), or name a file with profile_path"
            )
        profile = Profile.load(place)
    else:
        assert path is not None
        profile = Profile.load(path)
    profile.check(recipe, table_fingerprint(table))
    return profile


def cached_profile(recipe: Any, model: Any, tokenizer: Any = None, *, refresh: bool = False, **options: Any) -> Profile:
    """The kept profile of a recipe for this model, made (and kept) if there is none for these options yet.

    recipe: its name or class. model: a transformers model or pipeline; a pipeline brings its tokenizer. options: those of the
    recipe's profiling step. Profiles made with other options are replaced. Recipes find it with profile_path="cached".
    """
    from .registry import recipe_class

    cls = recipe_class(recipe) if isinstance(recipe, str) else recipe
    inner = unwrapped_model(model)
    place = cached_path(cls.slug, sites(inner))
    asked = hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:16]
    if place.is_file() and not refresh:
        kept = Profile.load(place)
        if kept.facts.get("asked") == asked:
            return kept
    if tokenizer is None:
        tokenizer = getattr(model, "processor", None) or getattr(model, "tokenizer", None)
    profile = cls.profile(inner, tokenizer, **options)
    profile.facts["asked"] = asked
    profile.save(place)
    return profile
