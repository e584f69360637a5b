"""What recipes for denoisers share: the layers in which image tokens see each other, and guidance by a perturbed branch."""

from __future__ import annotations

from functools import partial
from math import ceil, log2

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...hooks import Edits, Guide, SiteTable
from ...hooks.plan import Step
from ...interventions import Call, Edit, ReattendError, Site, TokenGrid, TokenMap
from .base import Recipe
from .heads import at_layers

# SD 1.5's mid block sees 8 x 8 places of its pictures, SDXL's 32 x 32
LEAST_SIDE = 8


class PerturbedGuidance(Recipe):
    """Base of recipes that push an image away from a branch of the denoiser whose attention is perturbed.

    prediction' = prediction + scale (conditional - branch). A subclass fills in `perturbed`: the edit of the branch's rows at the
    chosen layers and heads. The conditional and unconditional rows are computed as without the recipe.
    """

    scale: float = Field(3.0, ge=0, le=100, description="how far the image is pushed away from the perturbed branch; 0 = not")
    layers: list[int] | None = Field(
        None,
        description="layers that are perturbed in all heads, numbered over all self-attention of the denoiser (UNet: down, mid, up; "
        "Flux: double, then single blocks); default: a UNet's mid block (for small pictures, where that sees fewer than 8 x 8 places, the "
        "last layer of the first block after it that sees as many), layer 9 of SD3-medium, the middle layer of other models",
    )
    heads: list[tuple[int, int]] | None = Field(
        None, description="single heads as [layer, head] pairs, instead of whole layers; for example found by a head search"
    )
    start: float = Field(0.0, ge=0, lt=1, description="first part of the schedule with guidance, as a fraction of the steps")
    stop: float = Field(1.0, gt=0, le=1, description="the fraction of the steps from which on there is none")

    @model_validator(mode="after")
    def _places_named(self) -> PerturbedGuidance:
        if self.layers is not None and self.heads is not None:
            raise ValueError("give layers or heads, not both")
        if self.layers == [] or self.heads == []:
            raise ValueError("layers and heads must not be empty; leave them out for the default layer")
        if self.start >= self.stop:
            raise ValueError(f"start {self.start} must lie below stop {self.stop}")
        return self

    @property
    def neutral(self) -> bool:
        """Whether the parameters perturb nothing: a branch that nothing perturbs would only cost."""
        raise NotImplementedError

    def perturbed(self, call: Call, heads: list[int] | None, rows: Tensor) -> Edit | None:
        """The edit of a call at these heads (None = all) and rows [B, Tq or 1]: the branch's, of image tokens where text joins them."""
        raise NotImplementedError

    @property
    def image_only(self) -> bool:
        """Whether text that shares a stream with the image is left as it is."""
        return True

    def misfit(self, sites: SiteTable) -> str:
        layers, name = image_layers(sites), sites.model_name
        if not layers:
            stacks = ", ".join(sorted({s.stack for s in sites})) or "none"
            return f"{self.slug} needs a diffusion model with self-attention; {name} has attention in: {stacks}"
        for layer, head in self.selection(sites):
            if not 0 <= layer < len(layers):
                return f"layer {layer} does not exist: {name} has layers 0 to {len(layers) - 1}"
            if layers[layer].refusal:
                return layers[layer].refusal
            for site in layers[layer]:
                if head is not None and site.num_heads and not 0 <= head < site.num_heads:
                    return f"head {head} does not exist: layer {layer} has heads 0 to {site.num_heads - 1}"
        return ""

    def plan(self, sites: SiteTable) -> list[Step]:
        layers = image_layers(sites)
        steps = [
            step for layer, heads in at_layers(self.selection(sites)).items() for step in self.acting(layers[layer], heads)
        ]
        return [*steps, Guide(self.slug, 0.0 if self.neutral else self.scale, self.start, self.stop)]

    def acting(self, layer: SiteTable, heads: list[int] | None) -> list[Step]:
        """What perturbs one layer's sites in these heads (None = all)."""
        return [Edits(layer, partial(self.weaken, heads), self.slug)]

    def selection(self, sites: SiteTable) -> list[tuple[int, int | None]]:
        """(layer, head) pairs in order; head None = all of the layer."""
        if self.heads is not None:
            return sorted(self.heads)
        return [(layer, None) for layer in sorted(self.layers or default_layers(sites))]

    def weaken(self, heads: list[int] | None, call: Call) -> Edit | None:
        """`perturbed` on the branch's rows. Attention to other tokens (an image prompt's) is left alone."""
        branch = call.clock.rows(self.slug, call.batch)
        if branch is None or (call.query_tokens is not None and not _sees_itself(call)):
            return None
        joint = call.site is not None and call.site.kind == "joint"
        rows = branch[:, None]
        if (joint and self.image_only) or (call.tokens is not None and call.tokens.unknown):
            rows = rows & call.query_rows("image")  # where the tokens cannot be told apart, this says so
        return self.perturbed(call, heads, rows)


def _sees_itself(call: Call) -> bool:
    """Whether the queries of a call are its last keys too, after those of a text (Kandinsky 2.2). Raises ReattendError where they are
    keys, but not the last ones: edits take a query's own key to be as far from the end as the query."""
    own = None if call.tokens is None else call.tokens.own
    if own is not None and own != call.num_keys - call.num_queries:
        where = "this call" if call.site is None else call.site.name
        raise ReattendError(f"{where}: the image's own keys come before the others, and this is not served")
    return own is not None


def image_layers(sites: SiteTable) -> dict[int, SiteTable]:
    """{number: sites} of the self and joint attention over image tokens.

    Numbers run through the stacks in order: down, mid, up in UNets; double, then single blocks in Flux and its kin; the second
    attention of SD3.5's dual layers comes last. Refiners and motion modules have none. Two denoisers of one pipeline share numbers.
    """
    chosen = sites.stack("denoiser").kind("self", "joint")
    chosen = chosen.where(lambda s: not s.stack.endswith(("_refiner", ".pool")))
    places = list(dict.fromkeys((s.stack, s.layer) for s in chosen))
    return {n: chosen.where(lambda s, place=place: (s.stack, s.layer) == place) for n, place in enumerate(places)}


def text_sites(sites: SiteTable) -> SiteTable:
    """Cross and joint attention of a denoiser, where image tokens read the text."""
    chosen = sites.stack("denoiser").kind("cross", "joint")
    return chosen.where(lambda s: not s.stack.endswith(("_refiner", ".pool")))


def text_layers(sites: SiteTable) -> dict[int, SiteTable]:
    """{number: sites} of these, numbered as `image_layers` numbers its own."""
    chosen = text_sites(sites)
    places = list(dict.fromkeys((s.stack, s.layer) for s in chosen))
    return {n: chosen.where(lambda s, place=place: (s.stack, s.layer) == place) for n, place in enumerate(places)}


def default_layers(sites: SiteTable) -> list[int]:
    """A whole-layer default: a UNet's mid block, as published; layer 9 of SD3-medium's 24 (its paper found 7 to 10 good); else the middle.

    Ours: the mid block of a UNet for small pictures sees too few places to hold their structure (4 x 4 on the zoo's shapes-sd, where
    weakening it does nothing). There it is the last layer of the first block after it that sees LEAST_SIDE places a side.
    """
    layers = image_layers(sites)
    mid = [n for n, table in layers.items() if table[0].stack == "denoiser.mid"]
    if mid:
        side = middle_side(sites)
        if side is None or side >= LEAST_SIDE:
            return mid
        # the first block after the mid block works at its size, each further one at twice that
        block = ceil(log2(LEAST_SIDE / side)) - 1
        return [n for n, table in layers.items() if f"up_blocks.{block + 1}." in table[0].name][-1:] or mid
    return [9] if sites.model_name.startswith(("SD3", "StableDiffusion3")) and len(layers) == 24 else [len(layers) // 2]


def image_grid(call: Call, slug: str) -> Tensor:
    """Long [height, width]: the query rows of the image's places. Raises ReattendError where the raster is not known."""
    grids = grids_of(call.tokens if call.query_tokens is None else call.query_tokens, call.site, slug)
    if any(grid.index is not grids[0].index and not torch.equal(grid.index, grids[0].index) for grid in grids):
        where = "this call" if call.site is None else call.site.name
        raise ReattendError(
            f"{slug}: the rows of the batch have their image tokens at different places at {where}: draw them one by one"
        )
    return grids[0].image


def grids_of(tokens: TokenMap | None, site: Site | None, slug: str) -> list[TokenGrid]:
    """Where the image's or the video's tokens lie in each row of the batch. Raises ReattendError where that is not known."""
    grids = [] if tokens is None else [grid for grid in tokens.grids if grid.role == "image"]
    where = "this call" if site is None else site.name
    if tokens is None or not grids:
        why = "its tokens are no raster of the latents" if tokens is None or not tokens.gridless else tokens.gridless
        raise ReattendError(f"{slug}: which image token lies where is not known at {where}: {why}")
    return grids


def middle_side(sites: SiteTable) -> int | None:
    """How many places a UNet's mid block sees along one side of a picture of the model's own size; None where no configuration tells."""
    size, blocks = (getattr(sites.config, name, None) for name in ("sample_size", "block_out_channels"))
    return size // 2 ** (len(blocks) - 1) if isinstance(size, int) and blocks else None
