"""What recipes share that move the latents of a picture down the gradient of a loss on a UNet's attention maps, before each early step.

The maps are read in further passes of the prompt's own rows, which end at the last layer that is read: what comes after it is neither
computed nor differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ...hooks import AtStep, SiteTable
from ...interventions import Call, Clock, ReattendError
from .base import Recipe
from .denoisers import LEAST_SIDE, grids_of, image_grid

# the first step goes by the whole scale, the last by its root of a half
SCALES = (1.0, 0.5)
UNET = ("denoiser.down", "denoiser.mid", "denoiser.up")


@dataclass
class Looked:
    """What a further pass has shown. maps: {kind of attention: one [pictures, ...] per layer}; sites: the layers; text: what the recipe
    found out about the prompt."""

    maps: dict[str, list[Tensor]] = field(default_factory=dict)
    sites: set[str] = field(default_factory=set)
    text: Any = None

    def keep(self, call: Call, maps: Tensor) -> None:
        assert call.site is not None
        self.maps.setdefault(call.site.kind, []).append(maps)
        self.sites.add(call.site.name)

    def mean(self, kind: str) -> Tensor:
        """The maps of one kind of attention, mean over layers."""
        return torch.stack(self.maps[kind]).mean(dim=0)


class Descent(Recipe):
    """Base of these recipes. A subclass says which sites it reads (`read_at`), keeps their maps in `call.memory["looked"]`, a `Looked`, while a
    pass lasts, and makes a loss of them."""

    scale: float = Field(20.0, ge=0, le=50, description="how far the latents go down the gradient at the first step; 0 = not")
    steps: int = Field(25, ge=0, description="how many of the first steps are changed; the default is half of the authors' 50")
    resolution: int | None = Field(
        None,
        ge=2,
        description="places along the shorter side of the maps that are read; default: a quarter of the latents (16 for 512 pixels), for "
        "small pictures, where that is fewer than 8, half of them or all",
    )

    def misfit(self, sites: SiteTable) -> str:
        chosen = self.read_at(sites)
        if not len(chosen):
            stacks = ", ".join(sorted({s.stack for s in sites})) or "none"
            return f"{self.slug} reads a UNet's cross-attention to its prompt; {sites.model_name} has attention in: {stacks}"
        if any(s.stack.endswith(".motion") for s in sites):
            return f"{self.slug} moves pictures; {sites.model_name} denoises videos, of which nothing is published"
        return chosen.refusal

    def read_at(self, sites: SiteTable) -> SiteTable:
        return sites.kind("cross").where(lambda s: s.stack in UNET)

    def size(self, clock: Clock) -> float:
        """The length of a move, in gradients: scale sqrt(linspace(1, 0.5, steps)[step])."""
        if clock.steps is None:
            raise ReattendError(f"{self.slug}: the number of steps is not known; run the pipeline, or its schedule, as a whole")
        return self.scale * float(torch.linspace(*SCALES, clock.steps, dtype=torch.float64)[clock.step]) ** 0.5

    def evaluate(self, table: SiteTable, at: AtStep, x: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        """(L [B], dL/dx): every picture's own loss, and where it leads."""
        losses: dict[str, Tensor] = {}

        def total(latents: Tensor) -> Tensor:
            looked = at.memory["looked"] = Looked()
            at.look(latents, text="conditional", grad=True, until=at.memory.get("looked at"))
            del at.memory["looked"]
            if "cross" not in looked.maps:
                height, width = read_sides(*latents.shape[-2:])
                wanted = f"{self.resolution} places along the shorter side" if self.resolution else f"{height} x {width} places"
                raise ReattendError(f"{self.slug}: no cross-attention sees {wanted}: choose another resolution")
            at.memory["looked at"] = [site for site in table if site.name in looked.sites]
            losses["each"] = self.loss(looked, *more)
            return losses["each"].sum()

        slope = at.gradient(total, x)[1]
        return losses["each"].detach(), slope

    def loss(self, looked: Looked, *more: Any) -> Tensor:
        """L [B] of what a pass has shown."""
        raise NotImplementedError

    def grid(self, call: Call) -> Tensor | None:
        """Long [height, width]: the places of a call's image, if it has the resolution that is read."""
        grid = image_grid(call, self.slug)
        if self.resolution:
            fits = min(grid.shape) == self.resolution
        else:
            whole = grids_of(call.tokens if call.query_tokens is None else call.query_tokens, call.site, self.slug)[0].whole
            fits = list(grid.shape) == read_sides(*(whole or grid.shape))
        return grid.to(call.query.device) if fits else None


def read_sides(height: int, width: int) -> list[int]:
    """The maps of latents of this size that are read: a quarter of its sides, or half or all of them, the first with LEAST_SIDE places."""
    found = ([-(-side // part) for side in (height, width)] for part in (4, 2, 1))
    return next((sides for sides in found if min(sides) >= LEAST_SIDE), [height, width])
