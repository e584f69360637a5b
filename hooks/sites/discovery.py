"""Finds every attention computation of a model and says how it can be intercepted, without running it.

A module is a site when its forward (or, in diffusers, its processor) is where softmax(Q K^T) V is dispatched: transformers'
attention interface, `F.scaled_dot_product_attention` or diffusers' `dispatch_attention_fn`. That is read from the functions'
own code objects, so new model classes need no table.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from ...interventions import ReattendError, Site, UnsupportedError
from .backends import problem_of
from .canvas import canvas_of
from .denoisers import STACKS, controlnet_in, denoiser_in, stack_of
from .denoisers import describe as describe_denoiser_site
from .encoders import ENCODERS, is_causal, model_type, reads_texts, towers
from .source import source_of
from .table import SiteTable

SDPA_NAMES = {"scaled_dot_product_attention", "dispatch_attention_fn"}


Hook = TypeVar("Hook", bound=Callable[..., Any])


def uncompiled(hook: Hook) -> Hook:
    """The hook, kept out of torch.compile's graphs."""
    return torch.compiler.disable(hook)  # type: ignore


def sites(model: Any) -> SiteTable:
    """Lists the attention sites of a transformers model or pipeline, a diffusers pipeline or denoiser, or any nn.Module.

    Sites that cannot be intercepted are listed with their reason in `problem`. Raises ReattendError if there is no module in `model`.
    """
    found: list[Site] = []
    modules: dict[str, nn.Module] = {}
    for component, root in components(model).items():
        prefix = f"{component}." if component else ""
        part = _module_sites(root, prefix, component)
        for site, module in part:
            found.append(site)
            modules[site.name] = module
    inner = unwrapped_model(model)
    root = pretrained_root(inner) if isinstance(inner, nn.Module) else inner
    # of a diffusers pipeline the denoiser's configuration says how large its pictures are; the pipeline's own names its parts
    drawing = next((part for part in components(model).values() if denoiser_in(part) is not None), None)
    config = getattr(root if drawing is None or isinstance(root, nn.Module) else drawing, "config", None)
    denoiser = None if drawing is None else denoiser_in(drawing)
    canvas = None if denoiser is None else canvas_of(denoiser if isinstance(inner, nn.Module) else inner, denoiser)
    return SiteTable(found, modules, type(root).__name__, config, canvas=canvas)


def original_of(model: Any) -> Any:
    """What `reattend.wrap` was given, so that a wrapped object and its original count as one; anything else as it is."""
    return getattr(type(model), "_reattend_original", model)


def unwrapped_model(model: Any) -> Any:
    """The model inside a transformers pipeline; anything else as it is."""
    model = original_of(model)
    inner = getattr(model, "model", None)
    return inner if not isinstance(model, nn.Module) and isinstance(inner, nn.Module) else model


def pretrained_root(model: nn.Module) -> nn.Module:
    """The outermost transformers model in a module (inside torch.compile's or PEFT's wrapper), or the module itself."""
    return next((m for m in model.modules() if hasattr(type(m), "set_attn_implementation")), model)


def components(model: Any) -> dict[str, nn.Module]:
    """{name: module} of the parts of a model or pipeline that may hold attention; a bare model has the one name ""."""
    model = original_of(model)
    if isinstance(model, nn.Module):
        return {"": model}
    inner = unwrapped_model(model)
    if isinstance(inner, nn.Module):
        return {"": inner}
    parts = getattr(model, "components", None)
    if isinstance(parts, dict):
        modules = {k: v for k, v in parts.items() if isinstance(v, nn.Module)}
        if modules:
            return modules
    raise ReattendError(
        f"expected a transformers model or pipeline, a diffusers pipeline or denoiser, or an nn.Module, got {type(model).__name__}"
    )


def _module_sites(root: nn.Module, prefix: str, component: str) -> list[tuple[Site, nn.Module]]:
    counters: dict[str, dict[str, int]] = {}
    result: list[tuple[Site, nn.Module]] = []
    inside_site: str | None = None
    denoiser = denoiser_in(root)
    for path, module in root.named_modules():
        # what lies inside a module comes right after it
        if inside_site is not None and path.startswith(inside_site):
            continue
        how = dispatch(module)
        if how is None:
            continue
        inside_site = path + "."
        route, problem = how
        if denoiser is not None:
            stack = stack_of(denoiser, path)
        else:
            stack = _stack(root, path, component, module) if controlnet_in(root) is None else "controlnet"
        if stack == "decoder" and route != "none" and _from_transformers(module) and not _knows_masks(type(module).forward):
            stack, problem = "depth", f"{type(module).__name__} attends over the states of earlier layers, not over tokens"
        layer = _layer(module, path, counters.setdefault(stack, {}))
        heads, kv, dim = _heads(module)
        kind = "cross" if stack == "vision.pool" else _kind(path, module)
        causal = bool(getattr(module, "is_causal", False)) and stack == "decoder" and kind == "self"
        causal = causal or (stack == "text_encoder" and is_causal(root, path))
        site = Site(prefix + path, layer, stack, kind, heads, kv, dim, causal, route, problem)
        result.append((describe_denoiser_site(root, module, site) if hasattr(module, "processor") else site, module))
    if denoiser is not None:
        result.sort(key=lambda item: STACKS.index(item[0].stack))
    return result


def dispatch(module: nn.Module) -> tuple[str, str | None] | None:
    """(route, problem) if attention happens in this very module, else None."""
    if isinstance(module, nn.MultiheadAttention):
        return "sdpa", "nn.MultiheadAttention: its fast path calls a kernel that cannot be intercepted"
    processor = getattr(module, "processor", None)
    # an IP-Adapter's processor is a module, with weights of its own, that is called like any other
    if callable(processor) and type(processor).__call__ is not nn.Module.__call__:
        names = source_of(type(processor).__call__).names
        if names & SDPA_NAMES:
            return "sdpa", problem_of(processor, names)
        if hasattr(module, "to_q") or hasattr(module, "to_qkv"):
            name = type(processor).__name__
            if "Linear" not in name:
                return "sdpa", f"processor {name}: it never calls torch's SDPA"
            seen = {"to_v", "to_out"} <= names and hasattr(module, "to_v") and hasattr(module, "to_out")
            return "linear" if seen else "sdpa", f"processor {name}: linear attention has no softmax"
        return None
    names = source_of(type(module).forward).names
    if "ALL_ATTENTION_FUNCTIONS" in names:
        return "attention_interface", None
    if names & SDPA_NAMES:
        return "sdpa", problem_of(module, names)
    named = type(module).__name__
    own = frozenset().union(
        *(source_of(f).names for f in vars(type(module)).values() if callable(f) and hasattr(f, "__code__"))
    )
    if "Attention" in named and "softmax" in own and not any(dispatch(child) for child in module.children()):
        return "none", f"{named} computes its softmax itself: neither the attention interface nor torch's SDPA is called"
    return None


def _from_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.models.")


@functools.lru_cache(maxsize=4096)
def _knows_masks(function: Callable) -> bool:
    """Attention over tokens takes a mask; attention over what earlier layers gave (Inkling 2's residuals) has nothing to hide."""
    parameters = inspect.signature(function).parameters.values()
    return any("mask" in p.name or p.kind is p.VAR_KEYWORD for p in parameters)


def _stack(root: nn.Module, path: str, component: str, module: nn.Module) -> str:
    lowered = f"{component}.{path}".lower()
    if component == "vae":
        return "vae"
    if component == "controlnet":
        return "controlnet"
    if "mask_decoder" in lowered:
        return "mask_decoder"
    if any(word in lowered for word in ("vision", "visual", "image_encoder", "vit.", "image_tower")):
        return _vision(path, module)
    config = getattr(root, "config", None)
    if "audio" in lowered:
        return "audio"
    if any(word in lowered for word in ("resampler", "perceiver", "qformer", "abstractor", "projector")):
        return "connector"
    if component.startswith("text_encoder") or (reads_texts(getattr(module, "config", config)) and not _writes_text(root)):
        return "text_encoder"
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    if encoder_decoder and ".encoder." in f".{lowered}":
        return "encoder"
    own = getattr(module, "config", config)
    if not encoder_decoder and (hasattr(own, "patch_size") or hasattr(own, "image_size")) and not hasattr(own, "vocab_size"):
        return _vision(path, module)
    if not encoder_decoder and not getattr(module, "is_causal", False) and getattr(own, "is_decoder", False) is False:
        if hasattr(own, "vocab_size") and _writes_text(root):
            return "decoder"  # PaliGemma: the image and the question see each other, the answer is still causal
        return "encoder" if "cross" not in lowered else "decoder"
    return "decoder"


def _vision(path: str, module: nn.Module) -> str:
    """A pooling head, in which learned rows read the patches, stands apart from the layers that make these."""
    in_a_list = any(part.isdigit() for part in path.split("."))
    return "vision.pool" if isinstance(module, nn.MultiheadAttention) and not in_a_list else "vision"


def _writes_text(root: nn.Module) -> bool:
    can = getattr(root, "can_generate", None)
    return bool(can()) if callable(can) else False


def _layer(module: nn.Module, path: str, seen: dict[str, int]) -> int:
    index = getattr(module, "layer_idx", None)
    if isinstance(index, int):
        return index
    parts = path.split(".")
    numbered = [at for at, part in enumerate(parts[:-1]) if part.isdigit()]
    # all of a block is one layer, also what lies in parts of it (`blocks.0.audio.attn`); the members of a list share theirs
    if parts[-1].isdigit():
        block = ".".join(parts[:-1])
    else:
        block = ".".join(parts[: numbered[-1] + 1]) if numbered else path
    return seen.setdefault(block, len(seen))


def _kind(path: str, module: nn.Module) -> str:
    last = f"{path.rsplit('.', 1)[-1]} {type(module).__name__}".lower()
    if any(word in last for word in ("cross", "encoder_attn", "encdec", "token_to_image")):
        return "cross"
    return "self"


def _heads(module: nn.Module) -> tuple[int | None, int | None, int | None]:
    config = getattr(module, "config", None)

    def first(owner: Any, *names: str) -> int | None:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return None

    names = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
    heads = first(module, *names) or first(config, *names, "encoder_attention_heads")
    dim = first(module, "head_dim", "attention_head_size", "dim_head") or first(config, "head_dim")
    if dim is None and heads:
        # `internal_dim`: SAM's mask decoder attends in fewer dimensions than its tokens have
        width = first(module, "embed_dim", "internal_dim", "hidden_size", "inner_dim") or first(config, "hidden_size")
        width = width or first(getattr(module, "proj", None), "in_features")
        dim = width // heads if width else None
    groups = first(module, "num_key_value_groups")
    kv = first(module, "num_key_value_heads") or (heads // groups if heads and groups else heads)
    return heads, kv, dim


def tower_of(model: Any, site_name: str) -> nn.Module | None:
    """The encoder that holds a site of a model or pipeline; None where its passes are not followed."""
    parts = components(model)
    component, _, path = ("", "", site_name) if "" in parts else site_name.partition(".")
    followed = {id(module) for _, module in towers(parts[component])}
    found, module = None, parts[component]
    for part in ["", *path.split(".")]:
        module = getattr(module, part) if part else module
        found = module if id(module) in followed else found
    return found


def second_half(model: Any, site_name: str) -> tuple[nn.Module, nn.Module] | None:
    """The norm with which the second half of an encoder's layer begins, and the module whose output ends it; None where not known."""
    tower = tower_of(model, site_name)
    known = None if tower is None else ENCODERS.get(model_type(tower))
    if known is None or known.second_half is None:
        return None
    norm, last = (getattr(layer_module(model, site_name), name, None) for name in known.second_half)
    return (norm, last) if isinstance(norm, nn.Module) and isinstance(last, nn.Module) else None


def layer_module(model: Any, site_name: str) -> nn.Module:
    """The layer (item of a ModuleList) that holds a site of a model or pipeline. Raises UnsupportedError where there is none."""
    parts = components(model)
    component, _, path = ("", "", site_name) if "" in parts else site_name.partition(".")
    best: nn.Module | None = None
    module = parts[component]
    for part in path.split("."):
        parent, module = module, getattr(module, part)
        if isinstance(parent, nn.ModuleList):
            best = module
    if best is None:
        raise UnsupportedError(f"{site_name} does not lie in a list of layers, so the input of its layer cannot be observed")
    return best
