"""What must be known, not read, about diffusers' denoisers: token order at joint attention, and the layout of guidance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..interventions import Call, Site, TokenMap


def describe(root: nn.Module, module: nn.Module, site: Site) -> Site:
    """A diffusers site with its stack and kind filled in."""
    return replace(site, kind="cross" if getattr(module, "is_cross_attention", False) else site.kind)


def token_roles(call: Call, forward: Any) -> TokenMap | None:
    """The "image" and "text" tokens of a denoiser's call."""
    return forward.tokens
