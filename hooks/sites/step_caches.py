"""diffusers' caches of a denoiser's blocks (`enable_cache`), which give at one step what was computed at another."""

from __future__ import annotations

from torch import nn

# files of diffusers.hooks that hold hooks of this kind; others offload, cast or skip
CACHES = ("_cache", "pyramid_attention_broadcast")


def step_cache(denoiser: nn.Module, *, deep: bool = True) -> str:
    """The name of the cache that is enabled on a denoiser, "" where there is none.

    deep: also one whose hooks were put on its blocks by hand (`apply_first_block_cache` and its like), which looks at every module.
    """
    config = getattr(denoiser, "_cache_config", None)
    if config is not None:
        return type(config).__name__.removesuffix("Config")
    for module in denoiser.modules() if deep else ():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in getattr(registry, "hooks", {}).values():
            if type(hook).__module__.endswith(CACHES):
                return type(hook).__name__
    return ""
