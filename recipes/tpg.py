"""Token perturbation guidance (TPG; NeurIPS 2025, arXiv 2506.10036).

Fixes: weak structure and detail in generated images, without another model or prompt; it also works with no prompt at all. A further branch
of the denoiser runs with its image tokens shuffled, and the prediction is pushed away from that branch. Every token keeps what it is and
loses where it is, so no norm and no attention map is changed.
Acts on: what enters whole transformer blocks (with the residual stream) in the branch alone: at each chosen block one fresh permutation for
all of its rows, h' = h[pi], never undone. The conditional and unconditional rows are computed as without the recipe. Text tokens stay.
Conventions: blocks are numbered as layers are elsewhere (UNet: down, mid, up; the paper's d6 is 6). SDXL's default is the published d6 to
d23. The official code draws pi from torch's global generator, which `official_rng` does too; here the draws belong to the recipe's own
seed, the step, the evaluation within it and the block, and are the same on every device and whatever the pipeline's generator is.
In a UNet nothing inside a block knows places, so the shuffles of one stack of blocks make one permutation of its update (checked against the
official code): convolutions and later stacks see the disorder, and which blocks of a stack are listed does not matter, only whether any is.
Ours: other models than SDXL. Other UNets shuffle the last down block with attention, where SDXL's d6 to d23 lie too; where that sees fewer than
8 x 8 places, the layer that softpag takes (on shapes-sd it did best of those tried). Models whose blocks know places (RoPE, Sana's
convolutions) shuffle the middle block: every block counts there, and since no residual leads around the stack, the branch's prediction
stands at other places from there on; no trained model of this kind was tried. Models that are told places at the input alone (SD3, PixArt,
AuraFlow, DiT) are refused unless forced: their blocks commute with the shuffle, so that for any choice of blocks the branch is the
conditional prediction with its patches shuffled, and the push knows nothing of the model.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable
from functools import partial

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..hooks import Entering, Inject, SiteTable, Step
from ..hooks.sites.denoisers import turned_by_position
from ..interventions import ReattendError, ReattendWarning
from .kit.base import Info
from .kit.denoisers import LEAST_SIDE, default_layers, image_layers
from .kit.guidance import BranchGuidance

UNET = ("denoiser.down", "denoiser.mid", "denoiser.up")
# how many blocks SDXL's way down has, and the published ones of them
SDXL_DOWN, PUBLISHED = 24, list(range(6, 24))


class TPG(BranchGuidance):
    slug = "tpg"
    info = Info(
        does="Pushes an image away from a copy whose tokens were shuffled: better structure, with a prompt or without.",
        paper="Token Perturbation Guidance for Diffusion Models",
        year=2025,
        arxiv="2506.10036",
        families=("guidance",),
        kinds=("diffusion",),
        cost="forward",
        problems=("the picture ignores a word", "the picture lacks structure and detail"),
        sweep={"scale": (1.0, 3.0, 5.0)},
        code="TaatiTeam/Token-Perturbation-Guidance",
        licence="MIT",
    )

    blocks: list[int] | None = Field(
        None,
        description="transformer blocks before which the branch's image tokens are shuffled, numbered over all of the denoiser (UNet: down, "
        "mid, up; Flux: double, then single blocks); default: 6 to 23 of SDXL; of other UNets the last down block with attention "
        "(where that sees fewer than 8 x 8 places, the block after the middle that sees as many); the middle block of other models",
    )
    seed: int = Field(0, description="another seed shuffles otherwise; the pipeline's generator plays no part in it")
    official_rng: bool = Field(
        False, description="draws from torch's global generator, as the official code does: no two runs are then the same"
    )
    force: bool = Field(
        False,
        description="also where places are known at the model's input alone (SD3, PixArt, AuraFlow), where the branch is but the prediction "
        "with its patches shuffled",
    )

    @model_validator(mode="after")
    def _blocks_named(self) -> TPG:
        if self.blocks is not None and not self.blocks:
            raise ValueError("blocks must not be empty; leave it out for the default")
        if self.blocks is not None and len(set(self.blocks)) < len(self.blocks):
            raise ValueError("blocks must not name a block twice")
        return self

    @property
    def neutral(self) -> bool:
        return False

    def misfit(self, sites: SiteTable) -> str:
        blocks, name = blocks_of(sites), sites.model_name
        if not blocks:
            stacks = ", ".join(sorted({s.stack for s in sites})) or "none"
            return f"{self.slug} needs a diffusion model whose self-attention lies in blocks; {name} has attention in: {stacks}"
        for number in self.chosen(sites):
            if not 0 <= number < len(blocks):
                return f"block {number} does not exist: {name} has blocks 0 to {len(blocks) - 1}"
        if not self.force and not knows_places(blocks):
            return (
                f"{name} is told where its image tokens lie at its input alone, so for any choice of blocks the branch would be the "
                f"conditional prediction with its patches shuffled, and {self.slug} would push away from nothing of the model's; force=True "
                "does it all the same"
            )
        return ""

    def plan(self, sites: SiteTable) -> list[Step]:
        blocks = blocks_of(sites)
        steps = [Inject(blocks[n], partial(self.shuffled, n), rows=self.slug, label=self.slug) for n in self.chosen(sites)]
        return [*steps, self.guide()]

    def chosen(self, sites: SiteTable) -> list[int]:
        """Numbers of the blocks, in order."""
        return sorted(default_blocks(sites) if self.blocks is None else self.blocks)

    def shuffled(self, number: int, seen: Entering) -> Tensor | None:
        """h' = h[pi] over the image's places, of the whole batch; None where there are not two places to change."""
        hidden, draw = seen.hidden, self.draws(number, seen)
        if hidden.dim() == 4 and seen.site.stack in UNET:  # channels first
            order = draw(hidden.shape[2] * hidden.shape[3])
            return None if order is None else hidden.flatten(2)[:, :, order].view_as(hidden)
        if hidden.dim() != 3:
            raise ReattendError(
                f"{self.slug}: what enters the block of {seen.site.name} has the shape {tuple(hidden.shape)}, of which no axis is known to "
                "be the tokens'"
            )
        places = image_places(seen)
        if places is None:
            order = draw(hidden.shape[1])
            return None if order is None else hidden[:, order]
        # rows with as many places share their order, wherever these lie
        orders = {n: draw(n) for n in sorted({int(row.sum()) for row in places})}
        index = torch.arange(hidden.shape[1]).repeat(len(places), 1)
        for row, there in zip(index, places, strict=True):
            order = orders[int(there.sum())]
            if order is not None:
                row[there] = row[there][order.cpu()]
        return hidden.gather(1, index.to(hidden.device)[..., None].expand_as(hidden))

    def draws(self, number: int, seen: Entering) -> Callable[[int], Tensor | None]:
        """What gives pi [n] of a block at this evaluation; None, with a warning once a run, where n is no number of places to change.

        Its seed is of (seed, step, evaluation, block): schedulers of order 2 evaluate a step twice. Nobody tells the runs of a bare denoiser
        apart, so the same step is the same draw there.
        """
        site, device, step = seen.site.name, seen.hidden.device, seen.clock.step
        last, count = seen.memory.get(("evaluation", site), (-1, 0))
        count = count + 1 if last == step and seen.clock.steps is not None else 0
        seen.memory[("evaluation", site)] = (step, count)
        digest = hashlib.blake2b(repr((self.seed, step, count, number)).encode(), digest_size=7).digest()

        def draw(n: int) -> Tensor | None:
            if n < 2:
                if not seen.memory.get(("warned", site)):
                    seen.memory[("warned", site)] = True
                    said = f"{self.slug}: {n} image token enters the block of {site}, so nothing is shuffled there"
                    warnings.warn(said, ReattendWarning, stacklevel=2)
                return None
            if self.official_rng:
                return torch.randperm(n, device=device)
            # on the CPU, so that every device shuffles alike
            return torch.randperm(n, generator=torch.Generator().manual_seed(int.from_bytes(digest))).to(device)

        return draw


def image_places(seen: Entering) -> Tensor | None:
    """Bool [B, T] on the CPU: where the image lies in what enters; None where that is all of it."""
    if seen.site.stack in UNET:
        return None
    tokens, width = seen.tokens, seen.hidden.shape[1]
    if tokens is None:
        raise ReattendError(f"which tokens enter the block of {seen.site.name} is not known, so the image's cannot be shuffled")
    places = tokens.positions("image", tokens.length - width, tokens.length).cpu()
    return None if bool(places.all()) else places


def blocks_of(sites: SiteTable) -> dict[int, SiteTable]:
    """{number: sites} of the transformer blocks over image tokens, numbered as `image_layers` are; the second attention of a dual block
    has no block of its own, and attention that is itself an item of its list lies in none."""
    layers = {n: table for n, table in image_layers(sites).items() if table[0].stack != "denoiser.dual"}
    return {} if any(s.name.rsplit(".", 1)[-1].isdigit() for table in layers.values() for s in table) else layers


def default_blocks(sites: SiteTable) -> list[int]:
    """Which blocks are shuffled where none are named: see the module's docstring."""
    blocks = blocks_of(sites)
    down = [n for n, table in blocks.items() if table[0].stack == "denoiser.down"]
    if not down:
        return default_layers(sites) if blocks[0][0].stack in UNET else [len(blocks) // 2]
    if len(down) == SDXL_DOWN:
        return PUBLISHED
    part = {n: int(re.split(r"down_blocks\.(\d+)", blocks[n][0].name)[1]) for n in down}
    size, last = getattr(sites.config, "sample_size", None), part[down[-1]]
    # each down block works at half the size of the one before it
    if isinstance(size, int) and size // 2**last < LEAST_SIDE:
        return default_layers(sites)
    return [n for n in down if part[n] == last]


def knows_places(blocks: dict[int, SiteTable]) -> bool:
    """Whether anything in a denoiser's blocks, or between them, tells image tokens by their places: a UNet's convolutions, Sana's, RoPE."""
    tables = list(blocks.values())
    config = tables[0].config
    # CogVideoX and CogView 3 Plus share a processor that takes RoPE's angles, and may get none
    embedded = hasattr(config, "pos_embed_max_size") and not hasattr(config, "rope_axes_dim")
    unturned = embedded or getattr(config, "use_rotary_positional_embeddings", None) is False
    for table in tables:
        module = table.module(table[0])
        convolved = any("Sana" in type(part).__name__ for part in (module, getattr(module, "processor", None)))
        if table[0].stack in UNET or convolved or (turned_by_position(module) and not unturned):
            return True
    return False
