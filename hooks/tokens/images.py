"""Image tokens in a prompt: which positions hold an image's features, found in the processed ids.

Processors put one placeholder per image feature, and models scatter the features in order. Which grid they form: `image_grids`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...interventions import TokenGrid, TokenMap
from .image_grids import find_grids

# Pixels enter these through cross-attention: their placeholders are ordinary text positions, so there is no image role.
CROSS_ATTENTION = {"mllama", "idefics", "flamingo"}
# Their image tokens are latents of a resampler: a role, but no spatial grid even where the number happens to be a square.
RESAMPLED = {"idefics2", "blip-2", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5", "aria", "minicpmv4_6"}


def add_images(tokens: TokenMap, model: Any, ids: Tensor, given: dict[str, Any]) -> None:
    """Fills the roles "image" and "video" and `tokens.grids` from ids [B, T] on the CPU and the arguments of the forward pass.

    "image" holds all visual tokens, those of videos among them; "video" tells these apart. Roles are absent where no row of the batch has
    such tokens. Grids are those of images alone; of tiled images they come per tile, in the order of the prompt.
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", "")
    if config is None or family in CROSS_ATTENTION:
        return
    token = getattr(config, "image_token_id", None)
    image = ids == token if isinstance(token, int) else ids.new_zeros(ids.shape, dtype=torch.bool)
    if family not in RESAMPLED and bool(image.any()):
        tokens.grids = find_grids(model, config, family, image, ids, given)
    tokens.roles.update(image_roles(model, ids))


def image_roles(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Bool [B, T] for those of the roles "image" and "video" that any of the ids has.

    Frames are images to every method (some families write them as such), only without grids.
    """
    config = getattr(model, "config", None)
    if config is None or getattr(config, "model_type", "") in CROSS_ATTENTION:
        return {}
    tokens = {role: getattr(config, f"{role}_token_id", None) for role in ("image", "video")}
    found = {role: ids == token for role, token in tokens.items() if isinstance(token, int)}
    found = {role: marked for role, marked in found.items() if bool(marked.any())}
    if "video" in found:
        found["image"] = found["video"] | found["image"] if "image" in found else found["video"]
    return found


def join_images(known: list[TokenGrid], found: list[TokenGrid], past: int, image: Tensor | None = None) -> list[TokenGrid]:
    """Grids after a further chunk or turn: the known ones, and those found that reach beyond the `past` tokens of before.

    image: bool [B, T], the image tokens of the whole prompt. Where an image was cut there, what looked like a grid in one part of it is none.
    """
    cut = set() if image is None or not past else set((image[:, past - 1] & image[:, past]).nonzero()[:, 0].tolist())
    new = [g for g in found if int(g.index.max()) >= past and not (g.row in cut and int(g.index.min()) == past)]
    # an image that a chunk had cut in two is known better now
    better = {(g.row, int(p)) for g in new for p in g.index.flatten() if p < past}
    old = [g for g in known if not (g.row in cut and int(g.index.max()) == past - 1)]
    return [g for g in old if not any((g.row, int(p)) in better for p in g.index.flatten())] + new
