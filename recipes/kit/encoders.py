"""What recipes for encoders of images share: their layers, and which tokens come before the patches."""

from __future__ import annotations

from typing import Any

from ...hooks import SiteTable
from ...hooks.sites.encoders import ENCODERS, prefix_of


def encoder_layers(table: SiteTable) -> SiteTable:
    """The self-attention layers of a model's image encoder."""
    return table.stack("vision").kind("self")


def encoder_misfit(table: SiteTable, slug: str) -> str:
    """Why a recipe finds no layers of an image encoder that it can work at; "" where it does."""
    layers = encoder_layers(table)
    return layers.refusal if len(layers) else f"{slug} needs an encoder of images; {table.model_name} has none"


def class_token_misfit(table: SiteTable, slug: str) -> str:
    """Why a recipe that goes by a class token does not fit a model's image encoder; "" where it does."""
    config: Any = getattr(table.config, "vision_config", None) or table.config
    known = getattr(config, "model_type", "") in ENCODERS
    if known and "cls" in prefix_of(config):
        return ""
    none = "none" if known else "none that is known"
    return f"{slug} goes by the attention of a class token, and the encoder of {table.model_name} has {none}"


def layers_misfit(table: SiteTable, layers: Any) -> str:
    """Why one of these layers, by number, is no layer of a model's image encoder; "" where all are."""
    own = {site.layer for site in encoder_layers(table)}
    missing = sorted(set(layers) - own)
    return f"layers: there is no layer {missing[0]}; the encoder of {table.model_name} has 0 to {max(own)}" if missing else ""
