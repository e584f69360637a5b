"""Where an attention module projects its queries, keys and values: the modules whose outputs these are just before RoPE.

diffusers' joint blocks project their text by modules of its own (`add_q_proj` and the like), which are found beside the image's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ...interventions import ReattendError, Site
from .source import source_of
from .table import SiteTable

WHICH = ("query", "key", "value")
# names of the projections, and of the norms that act on their outputs per head (or on all heads at once)
PROJECTIONS = {
    "query": ("q_proj", "to_q", "query"),
    "key": ("k_proj", "to_k", "key"),
    "value": ("v_proj", "to_v", "value"),
}
NORMS = {
    "query": ("q_norm", "q_layernorm", "query_layernorm", "norm_q", "q_rms_norm"),
    "key": ("k_norm", "k_layernorm", "key_layernorm", "norm_k", "k_rms_norm"),
    "value": ("v_norm", "norm_v"),
}
# the same for a text stream beside the image's
ADDED = {
    "query": ("add_q_proj", "to_q_t"),
    "key": ("add_k_proj", "to_k_t"),
    "value": ("add_v_proj", "to_v_t"),
}
ADDED_NORMS = {"query": ("norm_added_q", "q_rms_norm_t"), "key": ("norm_added_k", "k_rms_norm_t"), "value": ()}
# norms of what enters a denoiser's attention, or leaves it
OTHER_NORMS = {"group_norm", "spatial_norm", "norm_cross", "norm_out"}
KNOWN_NORMS = OTHER_NORMS.union(*NORMS.values(), *ADDED_NORMS.values())


def projection_misfit(table: SiteTable, of: Sequence[str] = ("key",)) -> str:
    """Why one of these projections cannot be reached before RoPE at one of these sites, or ""."""
    for site in table:
        module = table.module(site)
        for which in of:
            if getattr(module, "fused_projections", False):
                return f"{site.name} has its projections fused: call unfuse_qkv_projections() on the model"
            if projection_of(module, which) is None or not site.head_dim:
                return (
                    f"{site.name} has no {PROJECTIONS[which][0]} of its own (it may be fused with others), so its {which}s cannot be "
                    f"reached before RoPE"
                )
            try:
                last_module(module, which)
                last_module(module, which, added=True)
            except ReattendError as error:
                return f"{site.name} {error}"
    return ""


def projection_of(attention: nn.Module, which: str, *, added: bool = False) -> nn.Module | None:
    """The projection itself; added: the text stream's own, where there is one."""
    for name in (ADDED if added else PROJECTIONS)[which]:
        found = getattr(attention, name, None)
        if isinstance(found, nn.Module):
            return found
    return None


def last_module(attention: nn.Module, which: str, *, added: bool = False) -> nn.Module | None:
    """The module whose output is the site's queries, keys or values just before RoPE: the norm, where one comes before it, or the
    projection. Raises ReattendError where there is a norm and it does not show whether it comes before."""
    projection = projection_of(attention, which, added=added)
    if projection is None:
        return None
    processor = getattr(attention, "processor", None)
    other = next((name for name, _ in attention.named_children() if "norm" in name and name not in KNOWN_NORMS), "")
    if processor is not None and other in source_of(type(processor).__call__).names:
        raise ReattendError(f"has a {other} of which it is not known whether it acts on queries or keys")
    for name in (ADDED_NORMS if added else NORMS)[which]:
        norm = getattr(attention, name, None)
        if not isinstance(norm, nn.Module):
            continue
        before = _before_rotary(type(getattr(attention, "processor", attention)), name)
        if before is None:
            raise ReattendError(f"has a {name} of which its own code does not show where it acts")
        # a text stream of its own joins the image's when that may have been turned already
        if before or added:
            return norm
    return projection


@dataclass(frozen=True)
class Hooked:
    """A module after which a step has put its hook: a site's projection, or the norm after it."""

    site: Site
    attention: nn.Module
    which: str
    added: bool
    normed: bool
    module: nn.Module

    @classmethod
    def all_of(cls, table: SiteTable, of: Sequence[str], *, normed: bool = True) -> list[Hooked]:
        found = []
        for site in table:
            attention = table.module(site)
            for added in (False, True):
                for which in of:
                    module = (last_module if normed else projection_of)(attention, which, added=added)
                    if module is not None:
                        found.append(cls(site, attention, which, added, normed, module))
        return found

    @property
    def misfit(self) -> str:
        """Why the hook does not see any more what attention does, or ""."""
        now = (last_module if self.normed else projection_of)(self.attention, self.which, added=self.added)
        if now is self.module and not getattr(self.attention, "fused_projections", False):
            return ""
        return (
            f"{self.site.name} has another module that projects its {self.which} than when the session began (an adapter was loaded or "
            "unloaded, or projections were fused): begin the session after that"
        )


@functools.lru_cache(maxsize=1024)
def _before_rotary(cls: type, norm: str) -> bool | None:
    """Whether a class uses the norm before its last rotary embedding (some models rotate first and norm then); None: it does not show."""
    forward = cls.forward if issubclass(cls, nn.Module) else cls.__call__  # type: ignore[attr-defined]
    used = source_of(forward).order
    if norm not in used:
        return None
    rotary = [place for place, name in enumerate(used) if "apply_" in name and "rotary" in name]
    return not rotary or used.index(norm) < rotary[-1]


def heads_of(site: Site, which: str) -> int | None:
    return site.num_heads if which == "query" else site.num_kv_heads


class Split:
    """How the output of a projection [B, T, heads * D], or of a norm per head, becomes [B, heads, T, D] and back.

    args: what the module was given. Raises ReattendError for an output that cannot be split.
    """

    def __init__(self, output: Tensor, args: tuple, site: Site, heads: int | None) -> None:
        self.flat = output.dim() == 3
        if self.flat:
            wide = output.unflatten(2, (-1, site.head_dim or 1))
            fits, self.swapped = heads is None or wide.shape[2] == heads, True
        else:
            wide = output
            fits = output.dim() == 4 and heads in output.shape[1:3]
            self.swapped = fits and _tokens_first(output, args, heads)
        if not fits:
            raise ReattendError(
                f"{site.name}: an output of shape {tuple(output.shape)} cannot be split into {heads} heads of {site.head_dim}"
            )
        self.states = wide.transpose(1, 2) if self.swapped else wide

    def back(self, states: Tensor) -> Tensor:
        states = states.transpose(1, 2) if self.swapped else states
        return states.flatten(2) if self.flat else states


def _tokens_first(output: Tensor, args: tuple, heads: int | None) -> bool:
    if output.shape[2] == heads and output.shape[1] == heads and args and isinstance(args[0], Tensor):
        # as many tokens as heads: in a view of the projection's output the step from token to token is the longer one
        return args[0].stride(1) > args[0].stride(2)
    return output.shape[2] == heads
