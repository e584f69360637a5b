"""AttenCraft (Shentu et al., 2024): where the things of a prompt are in a picture, read from attention in one pass of the denoiser.

Fixes: cross-attention says where each word is, but only coarsely and with gaps. What self-attention takes to belong together fills these, and
gives a mask for every thing and one for the background, without a model for segmentation.
Acts on: nothing: it reads. In one further pass of the prompt's rows, on a picture with little noise, C [places, columns] are a UNet's
cross-attention weights at a quarter of the latents' size and P its self-attention weights at half of it, each the mean over layers and heads.
For every thing c = the largest of C over its tokens, and for the background C of the start token: made larger (bicubic), squared and brought
to 0..1. With P brought to 0..1 too, r = P^4 c, brought to 0..1 again. A place belongs to a thing if its r leads that of all others by more
than `threshold`, and to nothing if none does.
Conventions: P is brought to 0..1 as a whole, so its rows sum to no 1. P^4 is applied as four products with a vector: what the official code
does to P^4 before that has no effect on r.
Ours: any number of things, where the official code takes two; a fixed noise level (the official one is drawn from 0 to 299 of 1000), pictures
that are not square, and larger maps for small pictures: 8 x 8 places of cross-attention and 16 x 16 of self-attention at least where the
latents have them. A map that is the same everywhere counts as 0. Left out: the paper's training (new tokens and projections for a thing, with
a loss that keeps their attention in these masks); nothing here is trained. Models that are no UNets are refused: nothing is published for them.

    recipe = reattend.recipe("attencraft", words=["circle", "square"], image="scene.png")
    with reattend.apply(pipe, recipe):
        pipe("a circle and a square", num_inference_steps=20)
    masks = recipe.found[0].masks()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import interpolate

from ..hooks import AtStep, Capture, Latents, SiteTable, Words
from ..hooks.plan import Step
from ..interventions import Call, Edit, ReattendError, column_weights, row_weights
from ..interventions.engine.kernels import rows_per_chunk
from .kit import checks
from .kit.base import Info, Recipe
from .kit.checks import check_output, shown, whole_number, writing
from .kit.denoisers import NamedWords, grids_of, image_grid, reads_prompt
from .kit.descent import UNET, Looked, read_sides
from .kit.layout import of_picture
from .kit.pictures import Pictures, listed, opened
from .kit.samplers import encoded, levels, place

# places along the shorter side that maps of what belongs together have at least, where the latents have them
LEAST_KIN = 16
# of a picture that masks are made as large as
MOST_PIXELS = 2**28
# how far from the timestep that it is to be read at a picture is still read, in shares of all timesteps
NEAR = 0.15
NOT_TOLD = "choose a lower threshold, less spread, a finer cross_resolution, or another timestep"


@dataclass(frozen=True)
class Found:
    """What was found in one picture. names: its things; maps [things + 1, height, width]: r of each, 0 to 1, that of the background last."""

    names: tuple[str, ...]
    maps: Tensor
    threshold: float = 0.1

    def masks(
        self, size: tuple[int, int] | None = None, threshold: float | None = None, *, may_be_empty: bool = False
    ) -> Tensor:
        """Bool [things + 1, height, width], disjoint, the background last. size: (height, width) that maps are brought to first (bilinear;
        ours); threshold: from 0 to 1, by default the recipe's.

        Raises ReattendError for another size or threshold, and where a thing, or the background, has no place at all, unless that may be.
        """
        least = self.threshold if threshold is None else checks.number(threshold, "threshold")
        if not 0 <= least <= 1:
            raise ReattendError(f"threshold must lie from 0 to 1, got {least}")
        found = leading(self.maps if size is None else self._resized(size), least)
        empty = [name for name, mask in zip((*self.names, "the background"), found, strict=True) if not bool(mask.any())]
        if empty and not may_be_empty:
            raise ReattendError(f"attencraft: no place is told to be {empty[0]!r}, apart from the others: {NOT_TOLD}")
        return found

    def _resized(self, size: Any) -> Tensor:
        if not isinstance(size, (list, tuple)) or len(size) != 2:
            raise ReattendError(f"size must be (height, width), got {shown(size)}")
        height, width = (whole_number(side, "height and width of size", least=1) for side in size)
        if height * width > MOST_PIXELS:
            raise ReattendError(f"size must hold at most {MOST_PIXELS} pixels, got {height} x {width}")
        return interpolate(self.maps[None], size=(height, width), mode="bilinear")[0]

    def save(self, path: str | Path) -> Path:
        """Writes masks (uint8) and maps as safetensors, with the names. Raises ReattendError as `masks`, or where it cannot be written."""
        from safetensors.torch import save

        where, tensors = check_output(path, "the file of masks"), {"masks": self.masks().to(torch.uint8), "maps": self.maps}
        held = save({name: one.contiguous() for name, one in tensors.items()}, {"names": "\n".join(self.names)})
        with writing(where, "the file of masks"):
            where.write_bytes(held)
        return where


def leading(maps: Tensor, threshold: float) -> Tensor:
    """Bool [n, h, w]: where each of the maps [n, h, w] leads all others by more than the threshold."""
    others = [torch.cat([maps[:number], maps[number + 1 :]]).amax(dim=0) for number in range(len(maps))]
    return maps - torch.stack(others) > threshold


def refined(maps: Tensor, affinity: Tensor, sides: tuple[int, int], sharpen: int, spread: int) -> Tensor:
    """r [n, height, width] of maps [n, h, w]: enlarged, sharpened, and spread by an affinity [height * width, height * width]."""
    large = interpolate(maps[None], size=sides, mode="bicubic", align_corners=False)[0]
    # enlarging makes values below 0, which an even power turns round
    found = spanned(large.pow(sharpen).flatten(1), 1)
    kin = spanned(affinity.flatten(), 0).view_as(affinity)
    for _ in range(spread):
        found = found @ kin.T
    return spanned(found, 1).unflatten(1, sides)


def spanned(values: Tensor, axis: int) -> Tensor:
    """Values brought to 0..1 along an axis; 0 where all are the same."""
    least, most = values.aminmax(dim=axis, keepdim=True)
    return torch.where(most > least, (values - least) / (most - least), 0.0)


class AttenCraft(Recipe):
    slug = "attencraft"
    info = Info(
        does="Reads from one pass of the denoiser where each thing of the prompt is in a picture, as masks.",
        paper="AttenCraft: Attention-guided Disentanglement of Multiple Concepts for Text-to-Image Customization",
        year=2024,
        arxiv="2405.17965",
        families=("reading",),
        kinds=("diffusion",),
        cost="forward",
        problems=("where the things in a picture are",),
        try_first={},
        sweep={"threshold": (0.05, 0.1, 0.2)},
        code="junjie-shentu/AttenCraft",
    )

    marks = {"words": "words"}
    beside = {"picture": "image"}

    words: NamedWords = Field(
        None,
        description="the things, as words or passages of every prompt, or a list of them per prompt; of a passage the token that shows most "
        "at a place counts there",
    )
    columns: list[list[int]] | None = Field(
        None,
        description="instead of words: for every thing its columns in the text that the denoiser gets (0 is the start token), the same for all "
        "prompts; for prompts that were encoded elsewhere",
    )
    occurrence: int | Literal["all"] = Field(
        "all", description="which occurrence of a word that occurs more than once, from 0, -1 = the last"
    )
    image: Pictures | None = Field(
        None,
        description="the picture that is looked at, a path or a PIL picture (or a list of one for each prompt); the prompt says what it shows. "
        "Default: the picture that the run draws, at its first step with as little noise as `timestep` says, or its last one",
    )
    timestep: int = Field(
        150,
        ge=0,
        lt=1000,
        description="how much noise the picture has, from 0 (none) to 999 (noise alone); with `image` a step of the run must be near it: let "
        "the run have twenty steps",
    )
    seed: int = Field(0, ge=0, description="of the noise that is put on `image`")
    threshold: float = Field(
        0.1, ge=0, le=1, description="by how much a place's map must lead all others, for the place to be in the mask"
    )
    sharpen: int = Field(2, ge=1, le=4, description="the power that maps of words are raised to")
    spread: int = Field(4, ge=0, le=16, description="how often maps are spread over what belongs together; 0 = not")
    cross_resolution: int | None = Field(
        None, ge=1, description="places along the shorter side of the maps of words; default: a quarter of the latents"
    )
    self_resolution: int | None = Field(
        None, ge=1, description="the same of the maps of what belongs together, and of the masks; default: half of the latents"
    )

    @model_validator(mode="after")
    def _consistent(self) -> AttenCraft:
        if (self.words is None) == (self.columns is None):
            raise ValueError("give words of the things to find, or columns")
        if not (self.words or self.columns) or not all(self.words or self.columns or ()):
            raise ValueError("words and columns must hold at least one thing")
        return self

    @cached_property
    def found(self) -> list[Found]:
        """What the last run found, for each of its pictures; empty before it."""
        return []

    @property
    def named(self) -> list[list[str]]:
        """The names of the things, for every prompt or once for all."""
        if self.columns is not None:
            return [[", ".join(map(str, columns)) for columns in self.columns]]
        assert self.words is not None
        return [self.words] if isinstance(self.words[0], str) else self.words  # type: ignore[list-item, return-value]

    def misfit(self, sites: SiteTable) -> str:
        if not len(self.sites_of(sites, "cross")):
            stacks = ", ".join(sorted({s.stack for s in sites})) or "none"
            return f"{self.slug} reads a UNet's attention to itself and to its prompt; {sites.model_name} has attention in: {stacks}"
        if any(s.stack.endswith(".motion") for s in sites):
            return f"{self.slug} reads pictures; {sites.model_name} denoises videos, of which nothing is published"
        return self.sites_of(sites, "cross", "self").refusal

    def sites_of(self, sites: SiteTable, *kinds: str) -> SiteTable:
        return sites.kind(*kinds).where(lambda s: s.stack in UNET)

    def plan(self, sites: SiteTable) -> list[Step]:
        for one in [] if self.image is None else listed(self.image):
            opened(one, "image")
        columns = None if self.columns is None else [[list(own) for own in self.columns]]
        words: Any = None if self.words is None else self.named
        found = Words("craft", words, columns, self.occurrence)
        readers = [
            Capture(self.sites_of(sites, "cross"), partial(self.read_words, found.roles)),
            Capture(self.sites_of(sites, "self"), self.read_places),
        ]
        # words that are not there are an error at the first step, whenever they are read
        return [Latents(self.before, steps=[found, *readers]), found]

    # -- the pass ------------------------------------------------------------------------------------------------------

    def before(self, at: AtStep) -> None:
        """Before a step: the pass that is read, once a run."""
        if at.clock.step == 0:
            self.found.clear()
        if "read" in at.memory:
            return
        known, here = at.scheduler.timesteps.tolist(), place(at.scheduler, at.clock)
        trained = getattr(at.scheduler.config, "num_train_timesteps", 1000)
        wanted = self.timestep * trained / 1000
        x, time = at.latents, None
        if self.image is not None:
            index = min(range(here, len(known)), key=lambda one: abs(known[one] - wanted))
            if abs(known[index] - wanted) > NEAR * trained:
                raise ReattendError(
                    f"{self.slug}: timestep {self.timestep} is what image is read at, and no step of this run is near it: the nearest of "
                    f"{len(known) - here} has {1000 * known[index] / trained:.0f}; draw with more steps, or name another timestep"
                )
            count = len(x)
            pictures = [opened(of_picture(listed(self.image), number, count, "image"), "image") for number in range(count)]
            clean = encoded(at.pipeline, pictures, x, "image")
            # every picture has the same noise, so that it is read as it is alone
            noise = torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(self.seed)).to(clean)
            x, time = levels(at.scheduler)[index].mixed(clean, noise), known[index]
        elif known[here] > wanted and here < len(known) - 1 and at.clock.step + 1 != at.clock.steps:
            return
        looked = at.memory["looked"] = Looked()
        at.look(x, timestep=time, text="conditional")
        del at.memory["looked"]
        at.memory["read"] = True
        height, width = x.shape[-2:]
        self.found[:] = self.composed(looked, len(x), (height, width))

    def composed(self, looked: Looked, pictures: int, latents: tuple[int, int]) -> list[Found]:
        """The maps of every picture, from what the pass has shown."""
        for kind, asked in (("cross", self.cross_resolution), ("self", self.self_resolution)):
            if kind not in looked.maps:
                size = f"{asked} places along the shorter side" if asked else " x ".join(map(str, reduced(kind, *latents)))
                raise ReattendError(f"{self.slug}: no {kind}-attention sees {size}: choose another {kind}_resolution")
        words, affinity = looked.mean("cross"), looked.mean("self")
        start, things, sides = (looked.text[name] for name in ("start", "things", "sides"))
        found = []
        for number in range(pictures):
            names = of_picture(self.named, number, pictures, "words")
            marked = [*(columns[number] for columns in things[: len(names)]), start[number]]
            maps = torch.stack([words[number][:, :, columns].amax(dim=-1) for columns in marked])
            both = refined(maps.float(), affinity[number].float(), sides, self.sharpen, self.spread)
            found.append(Found(tuple(names), both.cpu(), self.threshold))
        return found

    def grid(self, call: Call, kind: str) -> Tensor | None:
        """Long [height, width]: the places of a call's image, if it has the resolution that is read of this kind of attention."""
        grid = image_grid(call, self.slug)
        asked = self.cross_resolution if kind == "cross" else self.self_resolution
        whole = grids_of(call.tokens if call.query_tokens is None else call.query_tokens, call.site, self.slug)[0].whole
        fits = min(grid.shape) == asked if asked else tuple(grid.shape) == reduced(kind, *(whole or grid.shape))
        return grid.to(call.query.device) if fits else None

    def read_words(self, roles: list[str], call: Call, edits: Sequence[Edit]) -> None:
        """Keeps the weights of all text columns, mean over heads [B, h, w, K], and which of them belong to what."""
        looked: Looked | None = call.memory.get("looked")
        grid = self.grid(call, "cross") if looked is not None and reads_prompt(call) else None
        if looked is None or grid is None:
            return
        weights = column_weights(call, edits, torch.arange(call.num_keys)).mean(dim=1)
        looked.keep(call, weights[:, grid])
        if self.columns is None:
            start = call.columns("start")
        else:
            start = (torch.arange(call.num_keys, device=grid.device) == 0).expand(call.batch, -1)
        things = [call.columns(role) for role in roles if role.startswith("craft.")]
        looked.text = {**(looked.text or {}), "start": start, "things": things}

    def read_places(self, call: Call, edits: Sequence[Edit]) -> None:
        """Keeps the weights between all places, mean over heads: [B, n, n]."""
        looked: Looked | None = call.memory.get("looked")
        grid = self.grid(call, "self") if looked is not None else None
        if looked is None or grid is None:
            return
        flat, chunk = grid.flatten(), rows_per_chunk(call.batch, call.num_heads, call.num_keys, call.query.device)
        parts = [row_weights(call, edits, index).mean(dim=1) for index in flat.split(chunk)]
        looked.keep(call, torch.cat(parts, dim=1)[:, :, flat])
        looked.text = {**(looked.text or {}), "sides": tuple(grid.shape)}


def reduced(kind: str, height: int, width: int) -> tuple[int, int]:
    """Height and width of the maps that are read of a kind of attention, for latents of this size."""
    if kind == "self":
        halved = -(-height // 2), -(-width // 2)
        return halved if min(halved) >= LEAST_KIN else (height, width)
    down, across = read_sides(height, width)
    return down, across
