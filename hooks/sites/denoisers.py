"""What must be known, not read, about diffusers' denoisers: stacks, kinds, token order at joint attention, layout of guidance.

Everything that follows from module names and attributes is inferred, so a new class mostly works without an entry here; what cannot be
inferred (which tokens come first in a joint stream) is an entry of `FAMILIES`, and unknown for classes without one.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, replace

from torch import nn

from ...interventions import Site


@dataclass(frozen=True)
class Family:
    """Facts of one denoiser class.

    order: which tokens come first in its joint streams ("image" | "text"), None where it has none or it is not known. joint: modules
    whose name matches are joint although nothing on them says so. registers: parameter [1, n, width] put before the text.
    ragged: every sample has its own text length, and image tokens follow the sample's last text token. per_sample: one attention
    call per sample, with that sample's text only. separate_calls: its pipelines run the conditional and the unconditional half in
    two calls, conditional first.
    """

    order: str | None = None
    joint: str | None = None
    registers: str | None = None
    ragged: bool = False
    per_sample: bool = False
    separate_calls: bool = False


FAMILIES: dict[str, Family] = {
    "SD3Transformer2DModel": Family("image"),
    "FluxTransformer2DModel": Family("text", separate_calls=True),
    "AuraFlowTransformer2DModel": Family("text", registers="register_tokens"),
    "CogVideoXTransformer3DModel": Family("text", joint=r"attn1$"),
    "HunyuanVideoTransformer3DModel": Family("image", separate_calls=True),
    "MochiTransformer3DModel": Family("image", per_sample=True),
    "QwenImageTransformer2DModel": Family("text", separate_calls=True),
    "Lumina2Transformer2DModel": Family("text", joint=r"(^|\.)layers\.", ragged=True, separate_calls=True),
    "WanTransformer3DModel": Family(separate_calls=True),
    "ChromaTransformer2DModel": Family("text", separate_calls=True),
    "ZImageTransformer2DModel": Family(separate_calls=True),
}

# stacks in the order in which they run; refiners prepare the tokens, motion modules sit between the layers of their block
STACKS = (
    "denoiser.pool", "denoiser.text_refiner", "denoiser.image_refiner", "denoiser.down", "denoiser.down.motion", "denoiser.mid",
    "denoiser.mid.motion", "denoiser.up", "denoiser.up.motion", "denoiser", "denoiser.double", "denoiser.single", "denoiser.dual",
)  # fmt: skip


def denoiser_in(root: nn.Module) -> nn.Module | None:
    """The denoiser that `root` is, or that torch.compile's or DataParallel's wrapper `root` holds; None for any other model."""
    for name in ("_orig_mod", "module"):
        inner = getattr(root, name, None)
        root = inner if isinstance(inner, nn.Module) else root
    home = type(root).__module__
    return root if home.startswith(("diffusers.models.transformers.", "diffusers.models.unets.")) else None


def family_of(denoiser: nn.Module) -> Family:
    return FAMILIES.get(type(denoiser).__name__, Family())


def stack_of(denoiser: nn.Module, path: str) -> str:
    """The stack of an attention module of a denoiser; `path` may lead through wrappers."""
    parts = f".{path}"
    if not re.search(r"blocks?\.|layers\.|refiner", parts):
        return "denoiser.pool"
    if "refiner" in parts:
        return "denoiser.image_refiner" if ".noise_refiner" in parts else "denoiser.text_refiner"
    for part in ("down", "mid", "up"):
        if f".{part}_block" in parts:
            return f"denoiser.{part}.motion" if ".motion_modules." in parts else f"denoiser.{part}"
    if ".single_" in parts:
        return "denoiser.single"
    if type(denoiser).__name__ == "SD3Transformer2DModel" and parts.endswith(".attn2"):
        return "denoiser.dual"
    return "denoiser.double" if len(getattr(denoiser, "single_transformer_blocks", ())) else "denoiser"


def turned_by_position(module: nn.Module) -> bool:
    """Whether a denoiser's attention turns queries and keys by their positions (RoPE), by the parameters of its processor."""
    given = inspect.signature(type(getattr(module, "processor", module)).__call__).parameters
    return any("rotary" in name for name in given)


def describe(root: nn.Module, module: nn.Module, site: Site) -> Site:
    """A diffusers site with its kind and head counts filled in; its stack and layer are those of `stack_of`."""
    heads = getattr(module, "heads", None) or getattr(module, "num_heads", None)
    heads = heads if isinstance(heads, int) else site.num_heads
    width, key_width = _width(module, "to_q"), _width(module, "to_k")
    dim = width // heads if width and heads else site.head_dim
    kv = key_width // dim if key_width and dim else heads
    denoiser = denoiser_in(root) if site.stack.startswith("denoiser") else None
    kind = site.kind if denoiser is None else _kind(denoiser, module, site)
    if denoiser is None and getattr(module, "is_cross_attention", False):
        kind = "cross"
    return replace(site, kind=kind, num_heads=heads, num_kv_heads=kv, head_dim=dim)


def _width(module: nn.Module, name: str) -> int | None:
    return getattr(getattr(module, name, None), "out_features", None)


def _kind(denoiser: nn.Module, module: nn.Module, site: Site) -> str:
    if site.stack.endswith(".motion") or "temporal" in site.name:
        return "temporal"
    if site.stack.endswith("_refiner") or site.stack == "denoiser.dual":
        return "self"
    pattern = family_of(denoiser).joint
    if pattern and re.search(pattern, site.name):
        return "joint"
    if getattr(module, "is_cross_attention", False):
        return "cross"
    if site.stack == "denoiser.single" or getattr(module, "add_q_proj", None) is not None:
        return "joint"
    last = site.name.rsplit(".", 1)[-1]
    return "cross" if last == "attn2" or "cross" in last else "self"
