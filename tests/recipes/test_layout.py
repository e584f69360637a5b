"""Boxes and masks: what is read, which places they hold, and whose they are."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import reattend
import torch
from PIL import Image, ImageFilter
from reattend.hooks import Capture, Plan, attach, sites
from reattend.interventions import Call, Clock, ReattendError
from reattend.recipes.kit.descent import read_sides
from reattend.recipes.kit.layout import of_picture, pictures_of, places_in, read_region
from tiny_denoisers import build

HALF = np.zeros((4, 8), dtype=bool)
HALF[:, 4:] = True
ROWS = ("00001111",) * 4


def test_boxes_and_masks_are_plain_data():
    assert read_region([0, 0.25, 1, 0.5]) == read_region(np.array([0, 0.25, 1, 0.5])) == (0.0, 0.25, 1.0, 0.5)
    picture = Image.fromarray(HALF.astype(np.uint8) * 255)
    masks = (
        HALF,
        torch.tensor(HALF).to_sparse(),
        torch.tensor(HALF),
        torch.tensor(HALF) * 0.5,
        torch.tensor(HALF).to_sparse(),
        HALF.astype(int).tolist(),
        picture,
        picture.convert("RGB"),
        ROWS,
    )
    assert {read_region(mask) for mask in masks} == {ROWS} == {read_region(list(ROWS))}


def _saved(picture: Image.Image, kind: str, **more: Any) -> Image.Image:
    held = io.BytesIO()
    picture.save(held, kind, **more)
    return Image.open(io.BytesIO(held.getvalue()))


def test_a_picture_is_a_mask_where_it_is_neither_black_nor_transparent():
    held = np.zeros((16, 32), dtype=bool)
    held[4:12, 8:20] = True
    rows = read_region(held)
    white = Image.fromarray(held.astype(np.uint8) * 255)
    clear = Image.new("RGBA", white.size, (255, 255, 255, 255))
    clear.putalpha(white)
    palette = Image.fromarray(held.astype(np.uint8))
    palette.putpalette([0, 0, 0, 0, 0, 9] + [0] * 762)
    pictures = {
        "jpeg": _saved(white, "JPEG", quality=60),
        "1 of 255": Image.fromarray(held.astype(np.uint8)),
        "bits": white.convert("1"),
        "CMYK": white.convert("CMYK"),
        "colour": palette,
        "alpha": clear,
        "grey with alpha": clear.convert("LA"),
        "16 bit": Image.fromarray(held.astype(np.uint16) * 300),
        "integers": Image.fromarray(held.astype(np.int32)),
        "numbers": Image.fromarray(held.astype(np.float32) / 2),
    }
    for name, picture in pictures.items():
        assert read_region(picture) == rows, name
    soft = np.asarray(white.filter(ImageFilter.GaussianBlur(2)))
    assert read_region(Image.fromarray(soft)) == read_region(soft > soft.max() / 10) != read_region(soft)
    for black in (Image.new("L", (8, 8)), Image.new("F", (8, 8)), Image.new("RGBA", (8, 8), (255, 255, 255, 0))):
        with pytest.raises(ValueError, match="the mask is empty"):
            read_region(black)


def test_a_picture_that_cannot_be_read_is_no_mask():
    held = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(held, "PNG")
    broken = Image.open(io.BytesIO(held.getvalue()[:3000]))
    with pytest.raises(ValueError, match="a mask must be.*truncated"):
        read_region(broken)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([0, 0, 64, 64], "0 <= left < right <= 1.*divide pixels"),
        ([-0.1, 0, 0.5, 0.5], "0 <= left < right <= 1"),
        ([0.5, 0, 0.5, 1], "0 <= left < right <= 1"),
        ([0, float("nan"), 1, 1], "0 <= left < right <= 1"),
        ([0, 0, 1], "a box must be"),
        ("mask.png", "a mask must be"),
        (None, "a mask must be"),
        (torch.zeros(4, 4), "the mask is empty"),
        (torch.ones(1, 4, 4), r"must be \[height, width\]"),
        (torch.zeros(0, 4), r"must be \[height, width\]"),
        (torch.full((2, 2), float("nan")), r"must be \[height, width\]"),
        ([[0, 1], [1]], r"must be \[height, width\]"),
        (["01", "0"], "of one length"),
        (["02"], "of one length"),
    ],
)
def test_what_is_no_region(given, said):
    with pytest.raises(ValueError, match=said):
        read_region(given)


def test_a_region_is_the_mask_of_a_file_too(tmp_path):
    Image.fromarray(np.array([[0, 255], [0, 0]], dtype=np.uint8)).save(tmp_path / "mask.png")
    for given in (tmp_path / "mask.png", str(tmp_path / "mask.png")):
        assert reattend.recipe("regional", regions={"a fox": given}).layouts == [{"a fox": ("01", "00")}]
    with pytest.raises(ReattendError, match="no mask of 'a fox' at .*nowhere.png"):
        reattend.recipe("regional", regions={"a fox": tmp_path / "nowhere.png"})


def test_places_of_boxes_and_masks():
    found = places_in((0.25, 0.5, 0.75, 1.0), 8, 4, "a")
    wanted = torch.zeros(8, 4, dtype=torch.bool)
    wanted[4:, 1:3] = True
    assert torch.equal(found, wanted)
    assert torch.equal(places_in(ROWS, 2, 4, "a"), torch.tensor([[False, False, True, True]] * 2))
    assert torch.equal(places_in(ROWS, 8, 16, "a")[:, ::2][::2], torch.tensor(HALF))
    # 33 x 32 latents, and their halves
    tall = ("1" * 256,) * 264
    for sides in ((33, 32), (17, 16), (9, 8)):
        assert places_in(tall, *sides, "a").all()
    for region, sides, said in (
        ((0.0, 0.0, 0.04, 1.0), (8, 8), "'a': it holds none of the 8 x 8 places"),
        (("1000",) + ("0000",) * 3, (1, 1), "holds none"),
        (ROWS, (8, 8), "a mask of 8 x 4 has other proportions than the picture, which is 8 x 8 places"),
        (("1111",) * 5, (4, 4), "other proportions"),
    ):
        with pytest.raises(ReattendError, match=said):
            places_in(region, *sides, "'a'")


def clock(conditional: list[int], unconditional: list[int], source: list[int] | None = None) -> Clock:
    branches = {"conditional": torch.tensor(conditional).bool(), "unconditional": torch.tensor(unconditional).bool()}
    branches = {name: marked for name, marked in branches.items() if marked.any()}
    return Clock("denoise", branches=branches, source=None if source is None else torch.tensor(source))


@pytest.mark.parametrize(
    ("at", "wanted"),
    [
        (clock([1, 1, 1], [0, 0, 0]), ([0, 1, 2], [0, 1, 2], 3)),
        (clock([0, 0, 1, 1], [1, 1, 0, 0]), ([0, 1, 0, 1], [2, 3], 2)),
        (clock([0, 0, 0], [1, 1, 1]), ([0, 1, 2], [None] * 3, 3)),
        # a guide has copied both conditional rows
        (clock([0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 1, 2, 3, 2, 3]), ([0, 1, 0, 1, 0, 1], [2, 3], 2)),
    ],
)
def test_rows_of_one_picture_have_its_number(at, wanted):
    rows = len(at.branches[next(iter(at.branches))])
    q = torch.zeros(rows, 1, 4, 2)
    assert pictures_of(Call(q, q, q, clock=at)) == wanted


def test_prompts_come_as_often_as_there_are_pictures_of_each():
    assert [of_picture("ab", number, 4) for number in range(4)] == list("aabb")
    assert [of_picture("a", number, 3) for number in range(3)] == list("aaa")
    with pytest.raises(ReattendError, match="2 prompts, and 3 pictures"):
        of_picture("ab", 0, 3)


@pytest.mark.parametrize(
    ("latents", "read"),
    [
        ((64, 64), [16, 16]),
        ((96, 64), [24, 16]),
        ((61, 64), [16, 16]),
        ((16, 16), [8, 8]),
        ((8, 8), [8, 8]),
        ((6, 10), [6, 10]),
    ],
)
def test_the_maps_that_are_read_by_default_tell_places_apart(latents, read):
    assert read_sides(*latents) == read


def test_layers_of_a_unet_say_how_large_the_whole_is():
    model, inputs = build("UNet2DConditionModel")
    inputs["sample"] = torch.randn(2, 4, 7, 8)
    seen: set[Any] = set()

    def read(call: Call, edits: Any) -> None:
        tokens = call.query_tokens or call.tokens
        assert tokens is not None
        seen.update((grid.shape, grid.whole) for grid in tokens.grids)

    with attach(model, [Plan("look", [Capture(sites(model), read)])]):
        model(**inputs)
    assert seen == {((1, 7, 8), None), ((1, 4, 4), (7, 8))}
