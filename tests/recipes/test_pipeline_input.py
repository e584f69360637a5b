"""Bad input of methods for image generation: one clear error before the first denoising step, for every method that takes it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import reattend
import tiny_pipelines
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from example import examples
from reattend.interventions import ReattendError
from reattend.recipes import recipe_class
from tiny_conditions import CALL
from tiny_runs import draw

METHODS = {name: found for name, found in examples("diffusion").items() if not found[1].refusal("SD")}


def having(*fields: str) -> list[str]:
    return [name for name, (slug, _) in METHODS.items() if set(fields) <= set(recipe_class(slug).model_fields)]


def steered(name: str, pipe: Any, **more: Any) -> Any:
    slug, example = METHODS[name]
    with tempfile.TemporaryDirectory() as folder:
        return reattend.wrap(pipe).use(slug, **{**example.on(pipe, Path(folder)), **more})


def passes(pipe: Any) -> list[int]:
    """Grows by one entry with each pass of the denoiser that ends."""
    ended: list[int] = []
    pipe.unet.register_forward_hook(lambda *_: ended.append(1))
    return ended


@pytest.mark.parametrize(("start", "stop", "steps"), [(0.55, 0.7, 4), (0.5, 1.0, 1)])
@pytest.mark.parametrize("name", having("start", "stop"))
def test_a_part_of_the_schedule_without_a_step(name: str, start: float, stop: float, steps: int) -> None:
    pipe = tiny_pipelines.stable_diffusion()
    base, ended = draw(pipe, CALL), passes(pipe)
    if name == "prompt-reweight" and steps == 4:
        start, stop = 0.41, 0.55  # it counts to one more, as its authors do
    said = pytest.raises(ReattendError, match=f"none of the {steps} steps of this run lies")
    with said, steered(name, pipe, start=start, stop=stop):
        draw(pipe, CALL, num_inference_steps=steps)
    assert not ended and torch.equal(draw(pipe, CALL), base)


@pytest.mark.parametrize("more", [{"layers": [99]}, {"layers": [-1]}])
@pytest.mark.parametrize("name", having("layers"))
def test_layers_that_do_not_exist(name: str, more: dict[str, Any]) -> None:
    with pytest.raises(
        ReattendError, match="layer -?[0-9]+ does not exist: .* has layers 0 to 3|no head that was found lies in layers"
    ):
        steered(name, tiny_pipelines.stable_diffusion(), **more)


@pytest.mark.parametrize("processor", [None, AttnProcessor, AttnProcessor2_0])
@pytest.mark.parametrize("name", ["nag", "softpag"])
def test_attention_that_is_switched_inside_a_session(name: str, processor: Any) -> None:
    pipe = tiny_pipelines.stable_diffusion()
    ended = passes(pipe)
    with steered(name, pipe, start=0.5):
        got = draw(pipe, CALL)
        ended.clear()
        pipe.enable_attention_slicing(1) if processor is None else pipe.unet.set_attn_processor(processor())
        if processor is AttnProcessor2_0:
            assert torch.equal(draw(pipe, CALL), got)
            return
        with pytest.raises(ReattendError, match="was its processor or its implementation switched inside the session"):
            draw(pipe, CALL)
        assert not ended, "also where the method acts in later steps alone"
        pipe.unet.set_attn_processor(AttnProcessor2_0())
        assert torch.equal(draw(pipe, CALL), got)


def test_a_size_that_the_pipeline_cannot_draw() -> None:
    """The pipeline says so, and the session goes on."""
    pipe = tiny_pipelines.stable_diffusion()
    with steered("softpag", pipe):
        wanted = draw(pipe, CALL)
        with pytest.raises(ValueError, match="divisible by 8"):
            draw(pipe, CALL, height=17, width=16)
        assert torch.equal(draw(pipe, CALL), wanted)
