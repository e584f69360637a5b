"""Profiles: what a profiling step learned about a model. Safetensors with JSON metadata; data only, shareable as a file."""

from __future__ import annotations

import json
import os
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
