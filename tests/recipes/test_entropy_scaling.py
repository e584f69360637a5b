"""Entropy scaling: how many tokens a model sees at its own size, the factor's invariants, and canvases that are not square."""

from __future__ import annotations

import math
from typing import Any

import pytest
import reattend
import tiny_pipelines
import torch
from reattend.evaluation import suite
from reattend.evaluation.cells import Cell, Measured
from reattend.hooks import Edits, Plan, attach
from reattend.hooks.sites.canvas import Canvas, canvas_of
from reattend.interventions import (
    Call,
    Clock,
    ReattendError,
    ReattendWarning,
    ScaleQuery,
    Site,
    TokenGrid,
    TokenMap,
    UnsupportedError,
    fused,
    reference,
)
from reattend.recipes.entropy_scaling import base_places
from reattend.recipes.kit.denoisers import image_layers
from test_matrix_denoisers import predict
from tiny_denoisers import build, unet
from tiny_runs import pixart_alpha, seeded
from torch import Tensor

SELF = Site("mid_block.attn1", 0, "denoiser.mid", "self", 2, 2, 4, False, "sdpa")
JOINT = Site("transformer_blocks.0.attn", 0, "denoiser", "joint", 2, 2, 8, False, "sdpa")


def a_call(height: int, width: int, text: int = 0, mask: Tensor | None = None, site: Site = SELF) -> Call:
    """A call of an image, then text."""
    n = height * width + text
    q, k, v = torch.randn(3, 2, 2, n, 8, generator=torch.Generator().manual_seed(0)).mul(3)
    roles = {"image": (torch.arange(n) < n - text).expand(2, n), "text": (torch.arange(n) >= n - text).expand(2, n)}
    grids = [TokenGrid.of_image(row, torch.arange(height * width).view(height, width)) for row in range(2)]
    return Call(q, k, v, mask, site=site, clock=Clock("denoise"), tokens=TokenMap(2, n, n, roles, grids))


def scaled(call: Call, base: tuple[int, int], **parameters: Any) -> Tensor:
    edit = reattend.recipe("entropy-scaling", **parameters).scaled(base, call)
    return fused(call, [edit] if edit else [])


def entropy(call: Call, factor: float) -> Tensor:
    weights = (factor * call.scaling * call.query @ call.key.transpose(2, 3)).softmax(dim=-1)
    return -(weights * weights.log()).sum(dim=-1)


@pytest.mark.parametrize(("now", "factor"), [(32, 0.913), (64, 1.0), (96, 1.048), (128, 1.080)])
def test_the_factors_of_the_paper_s_sizes(now: int, factor: float) -> None:
    recipe = reattend.recipe("entropy-scaling")
    assert recipe.factor(now * now, 64 * 64) == pytest.approx(factor, abs=5e-4)
    assert reattend.recipe("entropy-scaling", strength=2).factor(now * now, 64 * 64) == pytest.approx(factor**2, abs=1e-3)
    assert recipe.factor(1, 16) == recipe.factor(16, 1) == 1


@pytest.mark.parametrize(("height", "width"), [(3, 3), (4, 4), (2, 8), (5, 4), (3, 9)])
def test_a_call_against_the_formula(height: int, width: int) -> None:
    call = a_call(height, width)
    n, plain = height * width, fused(call, [])
    found = scaled(call, (4, 4))
    if n == 16:
        assert torch.equal(found, plain), "only the number of tokens counts"
        return
    factor = math.sqrt(math.log(n) / math.log(16))
    weights = (factor * call.scaling * call.query @ call.key.transpose(2, 3)).softmax(dim=-1)
    torch.testing.assert_close(found, weights @ call.value, atol=1e-5, rtol=1e-5)
    less, more = (entropy(call, 1.0), entropy(call, factor)) if n > 16 else (entropy(call, factor), entropy(call, 1.0))
    assert bool((less > more).all()), "sharper on a larger canvas, flatter on a smaller one"
    assert torch.equal(scaled(call, (4, 4), strength=0), plain)


def test_equal_scores_change_nothing_and_so_does_a_single_token() -> None:
    call = a_call(3, 5)
    call.query = torch.zeros_like(call.query)
    torch.testing.assert_close(scaled(call, (4, 4)), fused(call, []))
    for now, base in (((1, 1), (4, 4)), ((4, 4), (1, 1))):
        call = a_call(*now)
        assert torch.equal(scaled(call, base), fused(call, []))


@pytest.mark.parametrize("additive", [False, True])
def test_padded_keys_are_not_counted(additive: bool) -> None:
    """Text of 5 and 2 tokens beside 12 of the image."""
    visible = torch.arange(17) < torch.tensor([[17], [14]])
    mask = torch.where(visible, 0.0, -10000.0) if additive else visible
    call = a_call(3, 4, text=5, mask=mask[:, None, None], site=JOINT)
    found = scaled(call, (4, 4))
    for row, text in enumerate((5, 2)):
        factor = math.sqrt(math.log(12 + text) / math.log(16 + text))
        # as a tensor, as the recipe gives it: a number is the kernel's own scale, which rounds otherwise
        wanted = fused(call, [ScaleQuery(factor=torch.tensor(factor).view(1, 1, 1))])
        torch.testing.assert_close(found[row], wanted[row], atol=1e-6, rtol=1e-5)
    assert torch.equal(scaled(call, (2, 6)), fused(call, []))


@pytest.mark.parametrize("run", [fused, reference])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_among_image_tokens_alone(run: Any, kv_heads: int) -> None:
    call = a_call(3, 4, text=5, site=JOINT)
    call.key, call.value = call.key[:, :kv_heads], call.value[:, :kv_heads]
    scores = call.scaling * call.query @ call.key.transpose(2, 3)
    scores[:, :, :12, :12] *= math.sqrt(math.log(12) / math.log(16))
    edit = reattend.recipe("entropy-scaling", scope="image").scaled((4, 4), call)
    found = run(call, [edit])
    torch.testing.assert_close(found, scores.softmax(dim=-1) @ call.value, atol=1e-5, rtol=1e-5)


# -- how many tokens a model sees at its own size ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "base", "places"),
    [
        ("UNet2DConditionModel", None, [(8, 8), (4, 4), (8, 8), (8, 8)]),
        ("UNet2DConditionModel", (72, 40), [(9, 5), (5, 3), (9, 5), (9, 5)]),
        ("SD3Transformer2DModel", None, [(4, 4)] * 3),
        ("SD3Transformer2DModel", (64, 32), [(4, 2)] * 3),
        ("FluxTransformer2DModel", 1024, [(64, 64)] * 4),
        ("QwenImageTransformer2DModel", 1024, [(64, 64)] * 2),
        ("PixArtTransformer2DModel", None, [(4, 4)] * 2),
        ("CogVideoXTransformer3DModel", None, [(4, 4)] * 2),
        ("LTXVideoTransformer3DModel", 64, [(8, 8)] * 2),
    ],
)  # fmt: skip
def test_places_at_the_model_s_own_size(name: str, base: Any, places: list[tuple[int, int]]) -> None:
    table = reattend.sites(build(name)[0])
    found = [base_places(table.canvas, layer[0].name, base) for layer in image_layers(table).values()]
    assert found == places


def test_each_level_has_a_factor_of_its_own() -> None:
    """A canvas of 12 x 10 places for a UNet of 8 x 8 with three levels, which see 12 x 10, 6 x 5 and 3 x 3 places."""
    torch.manual_seed(0)
    model, inputs = unet(
        block_out_channels=(16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    inputs["sample"] = torch.randn(2, 4, 12, 10)
    counts = {
        "down_blocks.0": (120, 64),
        "down_blocks.1": (30, 16),
        "mid_block": (9, 4),
        "up_blocks.1": (30, 16),
        "up_blocks.2": (120, 64),
    }

    def by_hand(call: Call) -> ScaleQuery:
        now, base = next(value for name, value in counts.items() if call.site is not None and call.site.name.startswith(name))
        assert call.num_keys == now
        return ScaleQuery(factor=math.sqrt(math.log(now) / math.log(base)))

    model.eval()
    plain = predict(model, inputs)
    with attach(model, [Plan("by hand", [Edits(reattend.sites(model).kind("self"), by_hand)])]):
        wanted = predict(model, inputs)
    with reattend.apply(model, "entropy-scaling") as session:
        found = predict(model, inputs)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert not torch.equal(found, plain) and all("attn1" in name for name in session.stats["entropy-scaling"])
    with reattend.apply(model, "entropy-scaling", layers=[2]) as session:
        predict(model, inputs)
    assert len(session.stats["entropy-scaling"]) == 1


def test_what_tells_the_size() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    table = reattend.sites(pipe)
    assert table.canvas == Canvas(pipe.unet, (8, 8), 2) == table.stack("denoiser").canvas
    assert canvas_of(tiny_pipelines.flux(), pipe.unet).size == (8, 8)
    flux = tiny_pipelines.flux()
    assert reattend.sites(flux).canvas == Canvas(flux.transformer, (128, 128), 2), "the default of its pipelines"
    assert reattend.sites(flux.transformer).canvas.size is None

    class Draws:
        vae_scale_factor_spatial = 16

        def __call__(self, height: int = 480, width: int = 832) -> None: ...

    assert canvas_of(Draws(), flux.transformer) == Canvas(flux.transformer, (30, 52), 16)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        (
            "FluxTransformer2DModel",
            {},
            "size of the pictures that FluxTransformer2DModel was trained on is not known: give it as base",
        ),
        ("SanaTransformer2DModel", {}, "linear attention has no softmax"),
        ("SD3Transformer2DModel", {"layers": [3]}, "layer 3 does not exist: .* has layers 0 to 2"),
        ("SD3Transformer2DModel", {"base": 8}, "base 8 is smaller than one token"),
    ],
)
def test_models_that_do_not_fit(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        reattend.apply(build(name)[0], "entropy-scaling", **parameters)


def test_lumina_s_pipelines_do_it_themselves() -> None:
    from diffusers import LuminaNextDiT2DModel

    model = LuminaNextDiT2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=1, num_attention_heads=2, num_kv_heads=2,
        multiple_of=8, cross_attention_dim=8,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="themselves .base_sequence_length"):
        reattend.apply(model, "entropy-scaling")


# -- pipelines ---------------------------------------------------------------------------------------------------------


def test_a_canvas_of_the_model_s_own_size_is_the_untouched_picture() -> None:
    pipe = tiny_pipelines.stable_diffusion()

    def draw(**size: int) -> Tensor:
        return pipe("a fox", num_inference_steps=2, generator=seeded(), output_type="latent", **size).images

    sizes: list[dict[str, int]] = [{}, {"height": 24, "width": 24}, {"height": 8, "width": 32}, {"height": 24, "width": 16}]
    plain = [draw(**size) for size in sizes]
    with reattend.apply(pipe, "entropy-scaling") as session:
        assert torch.equal(draw(), plain[0]) and torch.equal(draw(height=8, width=32), plain[2]) and session.applied == 0
        assert not torch.equal(draw(height=24, width=24), plain[1])
        assert not torch.equal(draw(height=24, width=16), plain[3])
    assert all(torch.equal(draw(**size), wanted) for size, wanted in zip(sizes, plain))


@pytest.mark.parametrize("name", ["SD", "SD3", "PixArt"])
def test_a_canvas_that_cannot_be_drawn_is_refused_before_the_first_step(name: str) -> None:
    steps: list[int] = []
    if name == "PixArt":
        pipe, call, _, _ = pixart_alpha()
    else:
        pipe = tiny_pipelines.stable_diffusion() if name == "SD" else tiny_pipelines.stable_diffusion_3()
        call = {"prompt": "a fox"}
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    denoiser.register_forward_pre_hook(lambda *_: steps.append(1))
    with reattend.apply(pipe, "entropy-scaling") as session, pytest.raises(ValueError, match="divisible"):
        pipe(**{**call, "height": 17, "width": 16}, num_inference_steps=2, output_type="latent")
    assert not steps and session.applied == 0


@pytest.mark.filterwarnings("ignore:.*never acted")
def test_an_unknown_raster_is_one_error() -> None:
    model, inputs = build("FluxTransformer2DModel")
    inputs["img_ids"] = torch.zeros(16, 3)
    with (
        reattend.apply(model, "entropy-scaling", base=1024),
        pytest.raises(ReattendError, match="entropy-scaling: which image token"),
    ):
        predict(model, inputs)


def test_the_models_own_canvas_is_named_as_the_reason_why_nothing_happens() -> None:
    reason = (
        "the picture has as many places as those of the training, at which nothing changes: draw another size, or name base"
    )
    pipe = tiny_pipelines.stable_diffusion()
    with (
        pytest.warns(ReattendWarning, match=f"'entropy-scaling' never acted in 2 forward passes: {reason}$"),
        reattend.apply(pipe, "entropy-scaling"),
    ):
        pipe("a fox", num_inference_steps=2, output_type="latent")
    with pytest.warns(ReattendWarning, match=reason):
        report = reattend.compare(pipe, "entropy-scaling", prompt="a fox", num_inference_steps=1, attention=False)
    assert any(reason in note for note in report.notes)
    cell = Cell(suite("binding"), "entropy-scaling", [{"name": "entropy-scaling"}], {}, 1)
    (note,) = Measured({}, [cell], [], 0, 1, 1).notes
    assert note == f"'entropy-scaling' never acted, so nothing was changed: {reason}."
