"""Which models have no gradient to give, by what their parameters are."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def without_gradient(modules: Iterable[nn.Module]) -> str:
    """Why a gradient cannot pass through these modules, or "": parameters that are quantised."""
    for module in modules:
        for part in module.modules():
            if getattr(part, "is_quantized", False) or getattr(part, "hf_quantizer", None) is not None:
                return f"a gradient cannot pass through {type(part).__name__}, whose parameters are quantised: load it without"
        for name, parameter in module.named_parameters():
            if not parameter.is_floating_point() or parameter.element_size() < 2:
                return (
                    f"a gradient cannot pass through {name} of {type(module).__name__}, which is quantised to {parameter.dtype}"
                )
    return ""
