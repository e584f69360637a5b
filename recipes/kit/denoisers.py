"""What recipes for denoisers share: the layers in which image tokens see each other or read the text, and where the places of the image lie."""

from __future__ import annotations

from math import ceil, log2
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator
from torch import Tensor

from ...hooks import SiteTable
from ...interventions import Call, KeyBias, ReattendError, Site, TokenGrid, TokenMap
from ...interventions.edits.scores import LARGEST_BIAS

# SD 1.5's mid block sees 8 x 8 places of its pictures, SDXL's 32 x 32
LEAST_SIDE = 8


def _one_word(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# the words of every prompt, or a list of them per prompt; a text is one word
NamedWords = Annotated[list[str] | list[list[str]] | None, BeforeValidator(_one_word)]


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


def hidden(columns: Tensor, **who: Any) -> KeyBias:
    """Columns [B, K] of which no weight is left, in every row that sees another one. `Keep` says it of any pairs, and has no kernel for it."""
    return KeyBias(bias=columns[:, None] * -LARGEST_BIAS, **who)


def text_layers(sites: SiteTable) -> dict[int, SiteTable]:
    """{number: sites} of these, numbered as `image_layers` numbers its own."""
    chosen = text_sites(sites)
    places = list(dict.fromkeys((s.stack, s.layer) for s in chosen))
    return {n: chosen.where(lambda s, place=place: (s.stack, s.layer) == place) for n, place in enumerate(places)}


def reads_prompt(call: Call) -> bool:
    """Whether a call of a site that reads text is to the prompt: the further ones of an IP-Adapter, to its pictures, are not."""
    return call.tokens is None or call.query_tokens is None or "reference" not in call.tokens


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
    return max(size // 2 ** (len(blocks) - 1), 1) if isinstance(size, int) and blocks else None
