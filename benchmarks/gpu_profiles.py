"""Profiles that nothing was learned for: what is in them does not matter for how right or how fast a device is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from reattend.recipes import Profile
from reattend.recipes.kit.profile import fingerprint


def made(slug: str, model: Any, folder: Path) -> str:
    """The file of a profile for `seka` or `soft-injection` on a language model, or on the decoder of one that sees."""
    text = model.config.get_text_config()
    layers, heads, kv = text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    torch.manual_seed(2)
    if slug == "seka":
        tensors = {}
        vectors, values = torch.linalg.qr(torch.randn(kv, dim, dim)).Q, torch.rand(kv, dim).sort(descending=True).values
        for layer in range(layers):
            for kind in ("relevant", "irrelevant"):
                tensors |= {f"{layer}.{kind}.vectors": vectors, f"{layer}.{kind}.values": values}
            tensors |= dict.fromkeys((f"{layer}.distance", f"{layer}.mean_distance"), torch.ones(kv))
        profile = Profile(slug, fingerprint(model), tensors, {"kinds": []})
    else:
        tensors = {"task_embedding": torch.randn(1, layers, heads, dim), "alpha": torch.full((layers, heads), 0.5)}
        profile = Profile(slug, fingerprint(model), tensors, {"tasks": ["made up"]})
    return str(profile.save(folder / f"{slug}.safetensors"))
