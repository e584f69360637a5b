"""What recipes for vision-language models share: which models, those whose decoder reads image tokens in its own sequence, and which layers."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field

from ...hooks import Probe, Prompt, SiteTable
from ...hooks.tokens.images import CROSS_ATTENTION, RESAMPLED
from .base import Recipe
from .language import prompt_told

# What happens to a prompt in pieces under methods that change its last row.
EACH_LAST_ROW = "the last row of each piece was changed like that of the whole"


def image_misfit(table: SiteTable, slug: str) -> str:
    """Why a recipe that reads or changes the weights between text and image tokens does not fit a model; "" where it does."""
    config, name = table.config, table.model_name
    family = getattr(config, "model_type", "")
    if family in CROSS_ATTENTION:
        return (
            f"{name} reads images through cross-attention layers: the rows of its text hold no image weights, and a row there holds "
            "image weights alone, so that what strengthens all of them is nothing"
        )
    if getattr(config, "image_token_id", None) is None:
        return f"{slug} acts on attention to image tokens, and {name} takes none (its config has no image_token_id)"
    if family in RESAMPLED or getattr(config, "is_encoder_decoder", False):
        return f"the image tokens of {name} are no places of the image in the decoder's own sequence"
    if not len(table.stack("decoder").kind("self")):
        return f"{name} has no decoder self-attention"
    return ""


class ImageRecipe(Recipe):
    """Base of recipes that change how a range of decoder layers looks at images."""

    weighs = frozenset({"image"})

    first_layer: int = Field(2, ge=0, description="first decoder layer that is changed")
    last_layer: int | None = Field(
        None, description="last decoder layer that is changed; None = the model's last, -2 = the one before"
    )

    def misfit(self, sites: SiteTable) -> str:
        return image_misfit(sites, self.slug) or layers_misfit(sites, self.first_layer, self.last_layer)

    def chosen(self, sites: SiteTable) -> SiteTable:
        """The layers that are changed."""
        return decoder_layers(sites, self.first_layer, self.last_layer)


def decoder_layers(table: SiteTable, first: int, last: int | None) -> SiteTable:
    """Decoder self-attention in layers first..last (None = to the end, negative numbers count from it)."""
    return table.stack("decoder").kind("self").layers(first, last)


def layers_misfit(table: SiteTable, first: int, last: int | None) -> str:
    """Why nothing can be changed in these decoder layers; "" where it can."""
    decoder, name = table.stack("decoder").kind("self"), table.model_name
    low, top = min(s.layer for s in decoder), max(s.layer for s in decoder)
    if last is not None and not -top - 1 <= last <= top:
        return f"last_layer: there is no layer {last}; {name} has {low} to {top}"
    chosen = decoder_layers(table, first, last)
    if not len(chosen):
        where = "last" if last is None else last
        return f"{name} has no decoder self-attention in layers {first} to {where}; it has layers {low} to {top}"
    return chosen.refusal


def images_told(table: SiteTable, in_pieces: Callable[[Prompt], None] | None = None) -> Probe:
    """A step for plans that read the role "image": a prompt whose images cannot be told is refused before any layer runs.

    It looks at the prompt alone and never asks for a pass. in_pieces: see `Probe` and `language.pieces_told`.
    """
    return prompt_told(table, _check_images, in_pieces)


def image_before(prompt: Prompt) -> bool:
    """Whether an earlier part of the prompt holds image tokens."""
    image = prompt.tokens.roles.get("image")
    return image is not None and bool(image[:, : prompt.past].any())


def image_now(prompt: Prompt) -> bool:
    """Whether this part of the prompt brings image tokens."""
    image = prompt.tokens.roles.get("image")
    return image is not None and bool(image[:, prompt.past :].any())


def rows_between_images(prompt: Prompt) -> bool:
    """Whether an earlier part of the prompt holds tokens after an image, and this part brings a further image in the same row."""
    image = prompt.tokens.roles.get("image")
    if image is None:
        return False
    before = image[:, : prompt.past]
    after = (before.cumsum(dim=1) > 0) & ~before
    return bool((after.any(dim=1) & image[:, prompt.past :].any(dim=1)).any())


def _check_images(prompt: Prompt) -> None:
    tokens = prompt.tokens
    if "image" not in tokens and (tokens.blind or tokens.unknown):
        tokens.positions("image", 0, tokens.prompt_length)  # says why
