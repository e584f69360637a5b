"""What the modules of diffusers' denoisers say about their attention: stacks, kinds, heads.

Everything here follows from module names and attributes, so a new class mostly works as it is. What cannot be read from a model (which
tokens come first in a joint stream) stands in `families`.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from typing import Any

from torch import nn

from ...interventions import Site
from .families import family_of

# stacks in the order in which they run; refiners prepare the tokens, motion modules sit between the layers of their block
STACKS = (
    "denoiser.pool", "denoiser.text_refiner", "denoiser.image_refiner", "denoiser.motion", "denoiser.down", "denoiser.down.motion",
    "denoiser.mid", "denoiser.mid.motion", "denoiser.up", "denoiser.up.motion", "denoiser", "denoiser.double", "denoiser.single",
    "denoiser.dual",
)  # fmt: skip
# modules whose tokens are frames: AnimateDiff, text-to-video UNets, Stable Video Diffusion, Latte
OVER_FRAMES = re.compile(r"(^|\.)(motion_modules|temp_attentions|transformer_in|temporal_transformer_blocks)\.")


def denoiser_in(root: nn.Module) -> nn.Module | None:
    """The denoiser that `root` is, or that torch.compile's or DataParallel's wrapper `root` holds; None for any other model."""
    root = unwrapped(root)
    home = type(root).__module__
    # a ControlNet-XS lives among the ControlNets, but is a UNet that has one inside
    known = home.startswith(("diffusers.models.transformers.", "diffusers.models.unets."))
    return root if known or type(root).__name__ == "UNetControlNetXSModel" else None


def controlnet_in(root: nn.Module) -> nn.Module | None:
    """The ControlNet that `root` is or that such a wrapper holds, of several the first; None for any other model."""
    root = unwrapped(root)
    if denoiser_in(root) is not None or not re.match(r"diffusers\.(models|pipelines)\.controlnet", type(root).__module__):
        return None
    nets = getattr(root, "nets", None)
    return nets[0] if isinstance(nets, nn.ModuleList) and len(nets) else root


def unwrapped(root: nn.Module) -> nn.Module:
    """The module inside torch.compile's or DataParallel's wrapper, or the module itself."""
    for name in ("_orig_mod", "module"):
        inner = getattr(root, name, None)
        root = inner if isinstance(inner, nn.Module) else root
    return root


def learned_variance(denoiser: nn.Module, scheduler: Any) -> bool:
    """Whether the second half of a denoiser's output channels is the variance that it has learned (DiT, HunyuanDiT, DeepFloyd IF).

    scheduler: the running pipeline's, None in a loop of the user's own; it tells of models whose input has further channels.
    """
    config = getattr(denoiser, "config", None)
    channels, latents = getattr(config, "out_channels", None), getattr(config, "in_channels", None)
    doubled = isinstance(channels, int) and isinstance(latents, int) and channels == 2 * latents
    learned = getattr(getattr(scheduler, "config", None), "variance_type", None) in ("learned", "learned_range")
    return doubled or learned or bool(getattr(config, "learn_sigma", False))


def stack_of(denoiser: nn.Module, path: str) -> str:
    """The stack of an attention module of a denoiser; `path` may lead through wrappers."""
    parts = f".{path}"
    if not re.search(r"blocks?\.|layers\.|refiner", parts):
        return "denoiser.pool"
    if re.search(r"[._](text_transformer|txt_mode)_blocks\.|\.(text_fusion|perceiver)\.", parts):
        return "denoiser.text_refiner"
    if "refiner" in parts:
        images = any(f".{name}_refiner" in parts for name in ("noise", "siglip", "ref_image"))
        return "denoiser.image_refiner" if images else "denoiser.text_refiner"
    over_frames = OVER_FRAMES.search(path) is not None
    for part in ("down", "mid", "up"):
        if f".{part}_block" in parts:
            return f"denoiser.{part}.motion" if over_frames else f"denoiser.{part}"
    if over_frames:
        return "denoiser.motion"
    if ".single_" in parts:
        return "denoiser.single"
    if type(denoiser).__name__ == "SD3Transformer2DModel" and parts.endswith(".attn2"):
        return "denoiser.dual"
    single = any(name.startswith("single_") and len(list(part.children())) for name, part in denoiser.named_children())
    return "denoiser.double" if single else "denoiser"


def turned_by_position(module: nn.Module) -> bool:
    """Whether a denoiser's attention turns queries and keys by their positions (RoPE), by the parameters of its processor."""
    given = inspect.signature(type(getattr(module, "processor", module)).__call__).parameters
    return any(word in name for name in given for word in ("rotary", "rope", "freqs"))


def describe(root: nn.Module, module: nn.Module, site: Site) -> Site:
    """A diffusers site with its kind and head counts filled in; its stack and layer are those of `stack_of`."""
    heads = getattr(module, "heads", None) or getattr(module, "num_heads", None)
    heads = heads if isinstance(heads, int) else site.num_heads
    width, key_width = _width(module, "to_q"), _width(module, "to_k")
    dim = width // heads if width and heads else site.head_dim
    kv = key_width // dim if key_width and dim else heads
    denoiser = denoiser_in(root) or controlnet_in(root)
    denoiser = denoiser if site.stack.startswith(("denoiser", "controlnet")) else None
    kind = site.kind if denoiser is None else _kind(denoiser, module, site)
    if denoiser is None and getattr(module, "is_cross_attention", False):
        kind = "cross"
    return replace(site, kind=kind, num_heads=heads, num_kv_heads=kv, head_dim=dim)


def _width(module: nn.Module, name: str) -> int | None:
    return getattr(getattr(module, name, None), "out_features", None)


def _decoders(denoiser: nn.Module) -> float:
    """The number of the first single block that sees the latents twice (as they came and as the blocks before it left them) and no text:
    Motif-Video's decoder."""
    count = getattr(getattr(denoiser, "config", None), "num_decoder_layers", 0)
    return len(denoiser.single_transformer_blocks) - count if count else float("inf")  # type: ignore[arg-type]


def _kind(denoiser: nn.Module, module: nn.Module, site: Site) -> str:
    alone = type(denoiser).__name__ == "TransformerTemporalModel"
    if site.stack.endswith(".motion") or "temporal" in site.name or OVER_FRAMES.search(site.name) or alone:
        return "cross" if getattr(module, "is_cross_attention", False) else "temporal"
    last = site.name.rsplit(".", 1)[-1]
    if site.stack.endswith("_refiner") or site.stack == "denoiser.dual":
        return "cross" if "cross" in last else "self"
    family = family_of(denoiser)
    for pattern, kind in ((family.joint, "joint"), (family.own, "self")):
        if pattern and re.search(pattern, site.name):
            return kind
    block, decoders = re.search(r"(^|\.)single_transformer_blocks\.(\d+)\.attn$", site.name), _decoders(denoiser)
    if block and int(block[2]) >= decoders:
        return "self"
    if getattr(module, "add_k_proj", None) is not None and "AddedKV" in type(getattr(module, "processor", None)).__name__:
        return "cross" if getattr(module, "only_cross_attention", False) else "joint"
    if getattr(module, "is_cross_attention", False):
        return "cross"
    joint = ".single_" in f".{site.name}" or getattr(module, "add_q_proj", None) is not None
    if joint and "cross" not in last:
        return "joint"
    # LTX-2: video and sound look at texts of their own (attn2, audio_attn2) and at each other (audio_to_video_attn)
    return "cross" if last.endswith("attn2") or "cross" in last or "_to_" in last else "self"
