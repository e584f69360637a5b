"""SEG against two calls on denoisers, and on whole pipelines."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import pytest
import reattend
import tiny_pipelines
import torch
from examples.seg import EXAMPLES
from reattend.hooks import Capture, Edits, Plan, SiteTable, attach
from reattend.hooks.sites.denoisers import turned_by_position
from reattend.interventions import Call, ReattendError, UnsupportedError
from reattend.interventions.families.guidance import BlurQuery, blurred
from reattend.recipes.kit.denoisers import default_layers, image_layers
from tiny_denoisers import DENOISERS, build
from torch import Tensor

REFUSED = EXAMPLES[""].refused


def predict(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def weak(model: Any, inputs: dict[str, Any], layers: list[SiteTable], sigma: float) -> Tensor:
    """By hand: queries of the image's places blurred at attention, or, where RoPE turns them, as they leave their projection."""
    sigma = math.inf if sigma > 9999 else sigma
    grids: dict[str, Any] = {}
    calls: dict[str, int] = {}

    def look(call: Call, _: Any) -> None:
        assert call.site is not None and call.tokens is not None
        grids.setdefault(call.site.name, []).extend(call.tokens.grids)
        calls[call.site.name] = call.num_queries

    def at_call(call: Call) -> BlurQuery | None:
        assert call.site is not None
        if call.site.name in hooked:
            return None
        rows = call.query_rows("image") if call.site.kind == "joint" else None
        return BlurQuery(grid=grids[call.site.name][0].image, sigma=sigma, rows=rows)

    hooked = {s.name: layer.module(s) for layer in layers for s in layer if turned_by_position(layer.module(s))}
    with attach(model, [Plan("look", [Capture(layer, look) for layer in layers])]):
        predict(model, inputs)

    def leave(name: str, _: Any, args: Any, output: Tensor) -> Tensor:
        rows = []
        for row, grid in enumerate(grids[name]):
            # a projection of the image's own begins with the image
            index = grid.index - (0 if output.shape[1] == calls[name] else int(grid.index.min()))
            rows.append(blurred(output[row][None, None], index, sigma)[0, 0])
        return torch.stack(rows)

    handles = [module.to_q.register_forward_hook(functools.partial(leave, name)) for name, module in hooked.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where all layers are turned nothing acts at attention
        with attach(model, [Plan("by hand", [Edits(layer, at_call) for layer in layers])]):
            found = predict(model, inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("sigma", [1.0, 1e7])
@pytest.mark.parametrize("name", [name for name in DENOISERS if name not in REFUSED])
def test_equal_to_two_calls(name: str, sigma: float) -> None:
    model, inputs = build(name)
    before, table = predict(model, inputs), reattend.sites(model)
    chosen = [layer for number, layer in image_layers(table).items() if number in default_layers(table)]
    by_hand = weak(model, inputs, chosen, sigma)
    with reattend.apply(model, "seg", sigma=sigma) as session:
        guided = predict(model, inputs)
    assert session.stats == {"seg": {site.name: 1 for layer in chosen for site in layer}}
    # learned variances, twice the channels, are not guided
    cut = model.config.in_channels if before.shape[1] == 2 * model.config.in_channels else None
    guided_part, plain, other = (x[:, :cut] for x in (guided, before, by_hand))
    scale = before.abs().max()
    torch.testing.assert_close(guided_part / scale, (plain + 3.0 * (plain - other)) / scale, atol=1e-4, rtol=1e-4)
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
