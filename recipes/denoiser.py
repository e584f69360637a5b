"""What recipes for denoisers share: the layers in which image tokens see each other, numbered once over all stacks."""

from __future__ import annotations

from ..hooks import SiteTable, Support


def image_layers(sites: SiteTable) -> dict[int, SiteTable]:
    """{number: sites} of the self and joint attention over image tokens.

    Numbers run through the stacks in order: down, mid, up in UNets; double, then single blocks in Flux and its kin; the second
    attention of SD3.5's dual layers comes last. Refiners and motion modules have none. Two denoisers of one pipeline share numbers.
    """
    chosen = sites.stack("denoiser").kind("self", "joint")
    chosen = chosen.where(lambda s: not s.stack.endswith(("_refiner", ".pool")))
    places = list(dict.fromkeys((s.stack, s.layer) for s in chosen))
    return {n: chosen.where(lambda s, place=place: (s.stack, s.layer) == place) for n, place in enumerate(places)}


def needs_denoiser(sites: SiteTable, slug: str) -> Support:
    """Whether there is a denoiser whose image tokens attend to each other."""
    if image_layers(sites):
        return Support(True)
    stacks = ", ".join(sorted({s.stack for s in sites})) or "none"
    return Support(False, f"{slug} needs a diffusion model with self-attention; {sites.model_name} has attention in: {stacks}")


def default_layers(sites: SiteTable) -> list[int]:
    """A whole-layer default: a UNet's mid block; layer 9 of SD3-medium's 24 (its paper found 7 to 10 good); else the middle layer."""
    layers = image_layers(sites)
    mid = [n for n, table in layers.items() if table[0].stack == "denoiser.mid"]
    if mid:
        return mid
    return [9] if sites.model_name.startswith(("SD3", "StableDiffusion3")) and len(layers) == 24 else [len(layers) // 2]
