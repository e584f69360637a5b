"""The raster of a denoiser's tokens: read from what it was called with, tried against the number of tokens, else said to be unknown."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import reattend
import tiny_denoisers
import tiny_streams
import torch
from reattend.hooks import Edits, Plan, attach
from reattend.hooks.sites.families import Family
from reattend.hooks.tokens.rasters import Latents, Raster, read_latents
from reattend.interventions import Call, HeadGain, ReattendError, ReattendWarning, TokenGrid
from reattend.recipes.kit.denoisers import image_grid
from torch import nn


class Denoiser(nn.Module):
    """A stand-in of a denoiser class: what is read of it is its configuration."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)

    def forward(self, hidden_states: Any) -> None: ...


def read(hidden: Any, family: Family = Family(), config: dict[str, Any] | None = None, **given: Any) -> Latents:  # noqa: B008
    return read_latents(Denoiser(**(config or {})), family, hidden, given, {})


def shapes(latents: Latents) -> list[tuple[str, int, int, int]]:
    return [(r.role, r.frames, r.height, r.width) for r in latents.rasters]


def calls_of(model: nn.Module, inputs: dict[str, Any]) -> list[Call]:
    seen: list[Call] = []
    table = reattend.sites(model).where(lambda s: s.supported)
    plan = Plan("watch", [Edits(table, lambda call: seen.append(call))])
    with pytest.warns(ReattendWarning), torch.no_grad(), attach(model, [plan]):
        model(**inputs)
    return seen


# -- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, config, axes, raster",
    [
        ((2, 4, 8, 12), {"patch_size": 2}, "", (1, 4, 6)),
        ((2, 4, 9, 12), {"patch_size": 2}, "", (1, 4, 6)),
        ((2, 4, 8, 12), {"patch_size": 1}, "", (1, 8, 12)),
        ((2, 4, 8, 12), {}, "", (1, 8, 12)),
        ((2, 4, 3, 8, 12), {"patch_size": (1, 2, 2)}, "", (3, 4, 6)),
        ((2, 4, 4, 8, 12), {"patch_size": 2, "patch_size_t": 2}, "", (2, 4, 6)),
        ((2, 4, 4, 8, 12), {"patch_size": 2, "patch_size_t": None}, "", (4, 4, 6)),
        ((2, 3, 4, 8, 12), {"patch_size": 2}, "bfchw", (3, 4, 6)),
        ((2, 3, 8, 12, 4), {"patch_size": (1, 2, 2)}, "bfhwc", (3, 4, 6)),
    ],
)
def test_latents_in_patches(shape: tuple[int, ...], config: dict[str, Any], axes: str, raster: tuple[int, int, int]) -> None:
    found = read(torch.zeros(shape), Family(axes=axes), config)
    assert found.rasters == (Raster(*raster),) and found.count == raster[0] * raster[1] * raster[2] and not found.reason


def test_packed_latents() -> None:
    packed = torch.zeros(2, 24, 4)
    assert shapes(read(packed, img_ids=tiny_streams.ids_of((0, 4, 6)))) == [("image", 1, 4, 6)]
    assert shapes(read(packed, img_ids=tiny_streams.ids_of((0, 4, 6), width=4).expand(2, -1, -1))) == [("image", 1, 4, 6)]
    assert shapes(read(packed, img_ids=tiny_streams.ids_of((1, 24, 1)))) == [("image", 1, 24, 1)]
    assert shapes(read(packed, img_shapes=[[(1, 4, 6)]] * 2)) == [("image", 1, 4, 6)]
    assert shapes(read(packed, img_shapes=[(1, 4, 6)] * 2)) == [("image", 1, 4, 6)]
    assert shapes(read(packed, num_frames=2, height=3, width=4)) == [("image", 2, 3, 4)]


def test_several_packed_images() -> None:
    ids = tiny_streams.ids_of((0, 2, 6), (1, 2, 3), (1, 3, 2))
    two = [("reference", 1, 2, 3), ("reference", 1, 3, 2)]
    assert shapes(read(torch.zeros(2, 24, 4), img_ids=ids)) == [("image", 1, 2, 6), *two]
    assert shapes(read(torch.zeros(2, 24, 4), img_ids=ids.roll(-12, 0))) == [*two, ("image", 1, 2, 6)]
    other = read(torch.zeros(2, 24, 4), img_ids=ids + torch.tensor([1, 0, 0]))
    assert other.mixed and not other.rasters and "which of them is made is not known" in other.reason
    given = [[(1, 2, 6), (1, 2, 3), (1, 3, 2)]] * 2
    assert shapes(read(torch.zeros(2, 24, 4), img_shapes=given)) == [("image", 1, 2, 6), *two]
    layered = read(torch.zeros(2, 24, 4), config={"use_layer3d_rope": True}, img_shapes=given)
    assert [r.role for r in layered.rasters] == ["image", "image", "reference"]


@pytest.mark.parametrize(
    "given, reason",
    [
        ({}, "not told the height and width of its 24 tokens"),
        ({"img_shapes": [[(1, 4, 5)]] * 2}, "its latents are 24 tokens, and the sizes that it was given make 1 x 4 x 5 = 20"),
        ({"num_frames": 2, "height": 4, "width": 6}, "are 24 tokens, and the sizes that it was given make 2 x 4 x 6 = 48"),
        ({"img_ids": torch.zeros(24, 3)}, "no rasters"),
        ({"img_ids": tiny_streams.ids_of((0, 4, 6)).flip(0)}, "no rasters"),
        ({"img_ids": torch.zeros(24, 1)}, "not understood"),
        ({"img_ids": torch.stack([tiny_streams.ids_of((0, 4, 6)), tiny_streams.ids_of((0, 6, 4))])}, "of its samples differ"),
        ({"img_shapes": [[(1, 4, 6)], [(1, 6, 4)]]}, "samples have different sizes"),
    ],
)
def test_what_does_not_fit_is_no_raster(given: dict[str, Any], reason: str) -> None:
    found = read(torch.zeros(2, 24, 4), **given)
    assert not found.rasters and found.count == 24 and reason in found.reason


def test_ids_are_read_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from reattend.hooks.tokens import rasters

    reads: list[int] = []
    plain = rasters._read_ids
    monkeypatch.setattr(rasters, "_read_ids", lambda *args: (reads.append(1), plain(*args))[1])
    ids, known = tiny_streams.ids_of((0, 4, 6)), {}
    for _ in range(3):
        assert rasters.read_latents(Denoiser(), Family(), torch.zeros(2, 24, 4), {"img_ids": ids}, known).rasters
    assert len(reads) == 1
    rasters.read_latents(Denoiser(), Family(), torch.zeros(2, 24, 4), {"img_ids": tiny_streams.ids_of((0, 6, 4))}, known)
    assert len(reads) == 2


# -- what calls get --------------------------------------------------------------------------------------------------


def test_video_grids_are_frames_rows_and_columns() -> None:
    for name, shape in (
        ("CogVideoXTransformer3DModel", (3, 4, 4)),
        ("WanTransformer3DModel", (2, 4, 4)),
        ("HunyuanVideoTransformer3DModel", (2, 4, 4)),
        ("LTXVideoTransformer3DModel", (2, 4, 4)),
        ("MochiTransformer3DModel", (2, 4, 4)),
    ):
        for call in calls_of(*tiny_denoisers.build(name)):
            assert call.tokens is not None and call.site is not None
            own = call.tokens if call.query_tokens is None else call.query_tokens
            if call.site.stack in ("denoiser.pool", "denoiser.text_refiner"):
                assert not own.grids
                continue
            assert {grid.shape for grid in own.grids} == {shape} and [grid.row for grid in own.grids] == list(range(call.batch))
            with pytest.raises(ReattendError, match="frames of 4 x 4, no single image"):
                image_grid(call, "seg")


@pytest.mark.parametrize(
    "name",
    [
        "PixArtTransformer2DModel",
        "SanaTransformer2DModel",
        "AuraFlowTransformer2DModel",
        "Lumina2Transformer2DModel",
        "SD3Transformer2DModel (3.5)",
    ],
)
def test_latents_that_are_not_square(name: str) -> None:
    model, inputs = tiny_denoisers.build(name)
    height, width = (4, 8) if name.startswith("AuraFlow") else (8, 12)
    patch = 1 if name.startswith("Sana") else 2
    rows, cols = height // patch, width // patch
    for call in calls_of(model, {**inputs, "hidden_states": torch.randn(2, 4, height, width)}):
        own = call.tokens if call.query_tokens is None else call.query_tokens
        assert own is not None and call.site is not None
        expected = set() if call.site.stack == "denoiser.text_refiner" else {(1, rows, cols)}
        assert {grid.shape for grid in own.grids} == expected
        for grid in own.grids:
            assert own.roles["image"][grid.row].nonzero()[:, 0].tolist() == grid.image.flatten().tolist()


def test_a_packed_sequence_of_unknown_places_is_an_image_without_a_grid() -> None:
    """Roles are known, places are not: who needs these is told the numbers."""
    model, inputs = tiny_denoisers.build("LTXVideoTransformer3DModel")
    longer = torch.cat([inputs["hidden_states"], torch.randn(2, 3, 4)], dim=1)
    coords = torch.zeros(2, 3, 35)
    call = calls_of(model, {**inputs, "hidden_states": longer, "video_coords": coords})[0]
    assert call.tokens is not None and call.columns("image").all() and not call.tokens.grids
    with pytest.raises(ReattendError, match="35 tokens, and the sizes that it was given make 2 x 4 x 4 = 32"):
        image_grid(call, "seg")


def test_image_prompts_have_keys_of_their_own() -> None:
    """An IP-Adapter's keys are a reference; the grid of the queries stays with the queries."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    model, inputs = tiny_denoisers.unet()
    for name, module in model.named_modules():
        if name.endswith("attn2"):
            module.set_processor(IPAdapterAttnProcessor2_0(module.inner_dim, 8, num_tokens=(4,)))
    projection = ImageProjection(image_embed_dim=8, cross_attention_dim=8, num_image_text_embeds=4)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    model.register_to_config(encoder_hid_dim_type="ip_image_proj")
    calls = calls_of(model.eval(), {**inputs, "added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 8)]}})
    cross = [call for call in calls if call.site is not None and call.site.kind == "cross"]
    assert [call.num_keys for call in cross] == [5, 4] * 4
    for number, call in enumerate(cross):
        assert call.columns("reference" if number % 2 else "text").all() and not call.columns("image").any()
        assert call.tokens is not None and call.query_tokens is not None and not call.tokens.grids
        side = 4 if call.site is not None and call.site.stack == "denoiser.mid" else 8
        assert {grid.shape for grid in call.query_tokens.grids} == {(1, side, side)} and call.query_rows("image").all()


def test_references_in_the_stream_have_grids_of_their_own() -> None:
    for name, order in (
        ("FluxTransformer2DModel (Kontext)", [("image", 5), ("reference", 29), ("reference", 35)]),
        ("Flux2Transformer2DModel", [("image", 5), ("reference", 29)]),
        ("QwenImageTransformer2DModel (edit)", [("image", 5), ("reference", 29)]),
    ):
        for call in calls_of(*tiny_denoisers.build(name, among=tiny_streams.STREAMS)):
            assert call.tokens is not None
            own = [grid for grid in call.tokens.grids if grid.row == 1]
            assert [(grid.role, int(grid.image[0, 0])) for grid in own] == order
            for grid in own:
                assert call.columns(grid.role)[1, grid.index.flatten()].all()
            assert call.columns("image").sum(dim=1).tolist() == [24, 24]


def test_rows_that_a_guide_adds_have_grids_too() -> None:
    model, inputs = tiny_denoisers.build("Flux2Transformer2DModel", among=tiny_streams.STREAMS)
    seen: list[list[int]] = []

    def note(call: Call) -> HeadGain:
        assert call.tokens is not None
        seen.append(sorted({grid.row for grid in call.tokens.grids}))
        return HeadGain(factor=0.5)

    from reattend.hooks import Guide

    plan = Plan("guided", [Edits(reattend.sites(model)[:1], note), Guide("guided", 2.0)])
    with torch.no_grad(), attach(model, [plan]), reattend.rows("conditional"):
        model(**inputs)
    assert seen == [[0, 1, 2, 3]]


def test_grids_of_rows_at_different_places_are_not_taken_for_one() -> None:
    model, inputs = tiny_denoisers.build("Lumina2Transformer2DModel")
    call = next(call for call in calls_of(model, inputs) if call.site is not None and call.site.kind == "joint")
    assert call.tokens is not None
    assert {int(grid.image[0, 0]) for grid in call.tokens.grids} == {3, 5}
    with pytest.raises(ReattendError, match="different places"):
        image_grid(call, "seg")
    call.tokens.grids = [TokenGrid(row, call.tokens.grids[0].index.clone()) for row in (0, 1)]
    assert image_grid(call, "seg").shape == (4, 4)
