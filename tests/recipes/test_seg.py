"""SEG against two calls on denoisers, and on whole pipelines."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import reattend
import tiny_pipelines
import torch
from examples.seg import EXAMPLES
from reattend.hooks import Edits, Plan, attach
from reattend.interventions import Call, ReattendError, UnsupportedError
from reattend.interventions.families.guidance import BlurQuery
from reattend.recipes.kit.denoisers import default_layers, image_layers
from tiny_denoisers import DENOISERS, build
from torch import Tensor

REFUSED = EXAMPLES[""].refused


def predict(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("sigma", [1.0, 1e7])
@pytest.mark.parametrize("name", [name for name in DENOISERS if name not in REFUSED])
def test_equal_to_two_calls(name: str, sigma: float) -> None:
    model, inputs = build(name)
    before, table = predict(model, inputs), reattend.sites(model)

    def blurred(call: Call) -> BlurQuery:
        assert call.tokens is not None
        rows = call.query_rows("image") if call.site is not None and call.site.kind == "joint" else None
        return BlurQuery(grid=call.tokens.grids[0].image, sigma=math.inf if sigma > 9999 else sigma, rows=rows)

    chosen = [layer for number, layer in image_layers(table).items() if number in default_layers(table)]
    with attach(model, [Plan("by hand", [Edits(layer, blurred) for layer in chosen])]):
        weak = predict(model, inputs)
    with reattend.apply(model, "seg", sigma=sigma) as session:
        guided = predict(model, inputs)
    assert session.stats == {"seg": {site.name: 1 for layer in chosen for site in layer}}
    scale = before.abs().max()
    torch.testing.assert_close(guided / scale, (before + 3.0 * (before - weak)) / scale, atol=1e-4, rtol=1e-4)
    assert not torch.equal(guided, before)
    assert torch.equal(predict(model, inputs), before)


@pytest.mark.parametrize("name", REFUSED)
def test_denoisers_whose_queries_cannot_be_put_together_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=REFUSED[name]):
        reattend.apply(build(name)[0], "seg")


def pixart() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

    pipe = PixArtAlphaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny_pipelines.vae(4),
        transformer=build("PixArtTransformer2DModel")[0],
        scheduler=DPMSolverMultistepScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any) -> Tensor:
    given: dict[str, Any] = {"prompt": "a red square"}
    if type(pipe).__name__.startswith("PixArt"):
        width = pipe.transformer.config.caption_channels
        text, mask = torch.randn(1, 5, width, generator=torch.manual_seed(1)), torch.ones(1, 5, dtype=torch.long)
        given = {"prompt_embeds": text, "negative_prompt_embeds": 0 * text, "use_resolution_binning": False}
        given |= {
            "prompt": None,
            "negative_prompt": None,
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
        }
    return pipe(**given, num_inference_steps=3, guidance_scale=3.0, output_type="latent", generator=torch.manual_seed(0)).images


PIPELINES = {
    "UNet": tiny_pipelines.stable_diffusion,
    "SD3": tiny_pipelines.stable_diffusion_3,
    "PixArt": pixart,
    "shapes-sd": functools.partial(reattend.zoo.load, "shapes-sd"),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_on_pipelines(name: str) -> None:
    pipe = reattend.wrap(PIPELINES[name]())
    plain = drawn(pipe)
    far = []
    for sigma in (0.5, 2.0, 1e7):
        with pipe.use("seg", sigma=sigma) as session:
            far.append(float((drawn(pipe) - plain).norm()))
        assert session.applied == 3 * len(session.stats["seg"])
    assert 0 < far[0] < far[2] and far[1] > 0
    assert torch.equal(drawn(pipe), plain)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sigma": -1.0}, "sigma"),
        ({"sigma": math.inf}, "sigma"),
        ({"scale": -1.0}, "scale"),
        ({"layers": [], "sigma": 1.0}, "must not be empty"),
        ({"layers": [1], "heads": [(0, 1)]}, "layers or heads, not both"),
    ],
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ReattendError, match=message):
        reattend.recipe("seg", **parameters)
