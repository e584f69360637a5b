"""Recipes as guiders of diffusers' modular pipelines, set, saved and loaded as its own are.

>>> from reattend.guiders import PAGGuidance
>>> pipe.update_components(guider=PAGGuidance(scale=3.0, guidance_scale=5.0))
>>> pipe.update_components(guider=pipe.guider.new(scale=1.5))

Each takes the parameters of its recipe, by the same names, and those of classifier-free guidance: guidance_scale (1 = without),
guidance_rescale, use_original_formulation, and guidance_start and guidance_stop, the part of the schedule that it acts in. enabled: False
leaves the prompt's prediction alone, until `guider.new(enabled=True)`: neither `enable()` nor SDXL's blocks, which call that in every run
(and so undo a `disable()`), switch it on. Parameters out of range raise ReattendError. Needs diffusers 0.42 or newer: older modular
pipelines prepare the passes of a step otherwise; there `wrap(pipe).use("pag")` does the same.
"""

from __future__ import annotations

from typing import Literal

from .interventions import ReattendError

try:
    import diffusers
    from diffusers.configuration_utils import register_to_config
except ImportError:
    raise ReattendError('reattend.guiders needs diffusers: pip install "diffusers>=0.36,<0.43"') from None
if tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 42):
    raise ReattendError(
        f"reattend.guiders needs diffusers 0.42 or newer, and this is {diffusers.__version__}: upgrade it, or use the recipe through "
        "reattend.wrap(pipe).use(...)"
    )

from .recipes.kit.guiders import PerturbedPass, SecondTextPass
from .recipes.nag import NAG
from .recipes.pag import PAG
from .recipes.seg import SEG
from .recipes.softpag import SoftPAG

__all__ = ["NAGGuidance", "PAGGuidance", "SEGGuidance", "SoftPAGGuidance"]


class PAGGuidance(PerturbedPass):
    """Perturbed-attention guidance: the recipe `pag`, and what its parameters mean."""

    @register_to_config
    def __init__(
        self,
        scale: float = 3.0,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        guidance_start: float = 0.0,
        guidance_stop: float = 1.0,
        enabled: bool = True,
        adaptive: float = 0.0,
        scope: Literal["image", "all", "masked"] = "masked",
        layers: list[int] | None = None,
        heads: list[tuple[int, int]] | None = None,
        rescale: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        recipe = PAG(
            scale=scale, adaptive=adaptive, scope=scope, layers=layers, heads=heads, rescale=rescale, start=start, stop=stop
        )
        self._set_up(recipe, guidance_scale, guidance_rescale, use_original_formulation, guidance_start, guidance_stop, enabled)


class SoftPAGGuidance(PerturbedPass):
    """Soft perturbed-attention guidance: the recipe `softpag`, and what its parameters mean."""

    @register_to_config
    def __init__(
        self,
        scale: float = 5.0,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        guidance_start: float = 0.0,
        guidance_stop: float = 1.0,
        enabled: bool = True,
        strength: float = 0.5,
        perturbation: Literal["identity", "uniform", "mean_query", "argmax", "temperature"] = "identity",
        temperature: float = 2.0,
        scope: Literal["image", "all", "masked"] = "image",
        layers: list[int] | None = None,
        heads: list[tuple[int, int]] | None = None,
        rescale: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        recipe = SoftPAG(
            scale=scale,
            strength=strength,
            perturbation=perturbation,
            temperature=temperature,
            scope=scope,
            layers=layers,
            heads=heads,
            rescale=rescale,
            start=start,
            stop=stop,
        )
        self._set_up(recipe, guidance_scale, guidance_rescale, use_original_formulation, guidance_start, guidance_stop, enabled)


class SEGGuidance(PerturbedPass):
    """Smoothed energy guidance: the recipe `seg`, and what its parameters mean."""

    @register_to_config
    def __init__(
        self,
        scale: float = 3.0,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        guidance_start: float = 0.0,
        guidance_stop: float = 1.0,
        enabled: bool = True,
        sigma: float = 1e7,
        layers: list[int] | None = None,
        heads: list[tuple[int, int]] | None = None,
        rescale: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        recipe = SEG(scale=scale, sigma=sigma, layers=layers, heads=heads, rescale=rescale, start=start, stop=stop)
        self._set_up(recipe, guidance_scale, guidance_rescale, use_original_formulation, guidance_start, guidance_stop, enabled)


class NAGGuidance(SecondTextPass):
    """Normalised attention guidance: the recipe `nag`, and what its parameters mean; its negative text is the pipeline's negative prompt.

    Without classifier-free guidance (guidance_scale 1, the default: few-step models) no pass over the negative prompt is made.
    """

    @register_to_config
    def __init__(
        self,
        scale: float | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        guidance_start: float = 0.0,
        guidance_stop: float = 1.0,
        enabled: bool = True,
        limit: float = 2.5,
        strength: float | None = None,
        norm: Literal["l1", "l2"] = "l1",
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        recipe = NAG(negative="", tensors=None, scale=scale, limit=limit, strength=strength, norm=norm, start=start, stop=stop)
        self._set_up(recipe, guidance_scale, guidance_rescale, use_original_formulation, guidance_start, guidance_stop, enabled)

    @property
    def acts(self) -> bool:
        return self.recipe.scale != 1 and self.recipe.strength != 0  # type: ignore[attr-defined]
