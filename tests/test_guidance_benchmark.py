"""The benchmark of methods for image generation compares like with like: its floor draws the untouched picture, its processor pag's."""

from __future__ import annotations

from typing import Any

import guidance
import pytest
import reattend
from reattend.recipes.kit.denoisers import default_layers, image_layers
from tiny_runs import draw, stable_diffusion, stable_diffusion_3

CASES = {"SD": stable_diffusion, "SD3": stable_diffusion_3}


def distance(one: Any, other: Any) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("case", CASES)
def test_rows_of_the_floor_are_dropped(case: str) -> None:
    pipe, call, _, _ = CASES[case](guidance=guidance.GUIDANCE)
    plain = draw(pipe, call)
    with guidance.more_rows(guidance.denoiser(pipe), 1):
        assert distance(draw(pipe, call), plain) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_the_eager_processor_draws_what_pag_draws(case: str) -> None:
    pipe, call, _, _ = CASES[case](guidance=guidance.GUIDANCE)
    sites = reattend.sites(pipe)
    (site,) = image_layers(sites)[default_layers(sites)[0]]
    plain = draw(pipe, call)
    recipe = reattend.recipe("pag", scale=guidance.SCALE)
    assert guidance.branches(pipe, recipe) == 1 and guidance.branches(pipe, reattend.recipe("entropy-scaling")) == 0
    with reattend.apply(pipe, recipe):
        expected = draw(pipe, call)
    own = guidance.copied(pipe)
    with guidance.eager(own, guidance.denoiser(own).get_submodule(site.name.partition(".")[2]))():
        assert distance(draw(own, call), expected) < 1e-5 < 1e-4 < distance(expected, plain)
