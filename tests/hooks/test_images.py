"""The image role and the grids of every family, against where the model itself scatters image features and what it puts there."""

from __future__ import annotations

import pytest
import reattend
import tiny_models
import torch
from reattend.hooks import Observe, Plan, attach
from reattend.hooks.tokens.image_grids import place, runs
from reattend.hooks.tokens.images import join_images
from reattend.hooks.trackers.caches import cache_name, cache_of
from reattend.interventions import ReattendError, TokenGrid, TokenMap
from tiny_models import BREAK, END, IMAGE, PINPOINTS, SIZES
from torch.overrides import TorchFunctionMode

FAMILIES = list(tiny_models.BUILDERS)
# the second row has several images and more text, the third has none, so spans differ in every row and the batch is padded
PROMPTS = [[1, 5, 6, "image", 7, 8], [1, 9, "image", 10, 11, 12, "image", 13], [1, 14, 15, 16]]


class Scatters(TorchFunctionMode):
    """Records the mask and the features of every masked_scatter."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.masked_scatter:
            mask, features = args[1], args[2]
            self.seen.append((mask[..., 0].clone() if mask.dim() == 3 else mask.clone(), features.detach().clone()))
        return func(*args, **(kwargs or {}))


def watch(model, run):
    """(token map at the first pass, recorded scatters) of run()."""
    maps = []
    first = reattend.sites(model).stack("decoder").kind("self")[:1]
    with (
        attach(model, [Plan("watch", [Observe(first, lambda o: maps.append(o.tokens))])]),
        Scatters() as scatters,
        torch.no_grad(),
    ):
        run()
    return maps[0], scatters.seen


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_role_is_where_the_model_scatters(family, side):
    tiny = tiny_models.build(family)
    inputs = tiny.inputs(PROMPTS, side)
    tokens, seen = watch(tiny.model, lambda: tiny.model(**inputs))
    masks = [m for m, _ in seen if m.shape == inputs["input_ids"].shape]
    assert len(masks) >= 1
    width = inputs["input_ids"].shape[1]
    role = tokens.positions("image", 0, width)
    assert torch.equal(role, masks[0].expand_as(role))
    assert role[0].any() and role[1].sum() > role[0].sum() / 2 and not role[2].any()
    assert not tokens.positions("image", width, width + 5).any()
    assert not (role & tokens.positions("padding", 0, width)).any()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_finds_the_same_grids(family, beams):
    tiny = tiny_models.build(family)
    inputs = tiny.inputs(PROMPTS[:2])
    direct, _ = watch(tiny.model, lambda: tiny.model(**inputs))
    options = {"max_new_tokens": 2, "do_sample": False, "num_beams": beams}
    generated, _ = watch(tiny.model, lambda: tiny.model.generate(**inputs, **options))
    assert generated.batch == 2 * beams
    expected = [(g.row * beams + beam, g.index.tolist()) for g in direct.grids for beam in range(beams)]
    assert sorted((g.row, g.index.tolist()) for g in generated.grids) == sorted(expected)
    assert len(expected) > 0


def silence_attention(model):
    """Makes the vision tower local: what one cell of a picture shows then changes that cell's token alone."""
    silenced = 0
    for name, parameter in model.named_parameters():
        vision = any(part in name for part in ("vision", "visual"))
        if vision and any(part in name for part in ("out_proj", "o_proj", "attn.proj", "projection_layer")):
            parameter.data.zero_()
            silenced += 1
    assert silenced


def probes(family, inputs, grids):
    """(index into pixel_values, number of the grid, row, column) of corners and of one inner cell of every grid."""
    pixels = inputs["pixel_values"]
    start = 0
    for number, grid in enumerate(grids):
        rows, cols = grid.image.shape
        for r, c in {(0, 0), (0, cols - 1), (rows - 1, 0), (rows - 1, cols - 1), (rows // 2, cols // 2)}:
            if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"):
                token = start + r * cols + c
                yield (slice(4 * token, 4 * token + 4),), number, r, c
                continue
            if family in ("llava_next", "llava_onevision"):
                image, high = divmod(number, 2)
                tile, y, x = 0, r, c
                if high:
                    tile, y, x = high_resolution_tile(SIZES[image], rows, cols, r, c)
                where, cell = (image, tile), 6
            elif family in ("pixtral", "mistral3"):
                where, cell, y, x = (number,), 4 if family == "pixtral" else 8, r, c
            else:
                used = pixels.flatten(-3).any(dim=-1).nonzero()[number].tolist()
                where, cell, y, x = tuple(used), 24 // rows, r, c
            yield (*where, slice(None), slice(y * cell, (y + 1) * cell), slice(x * cell, (x + 1) * cell)), number, r, c
        start += rows * cols


def high_resolution_tile(size, rows, cols, r, c):
    """Tile (behind the base image) and the cell in it that shows cell (r, c) of the unpadded grid of a 4 x 4 cell tiling."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    high, wide = get_anyres_image_grid_shape(size, PINPOINTS, 24)
    r, c = r + (4 * high - rows) // 2, c + (4 * wide - cols) // 2
    return 1 + r // 4 * wide + c // 4, r % 4, c % 4


@pytest.mark.parametrize("family", FAMILIES)
def test_each_cell_of_a_grid_is_that_part_of_the_picture(family):
    tiny = tiny_models.build(family)
    silence_attention(tiny.model)
    inputs = tiny.inputs(PROMPTS[:2])
    tokens, seen = watch(tiny.model, lambda: tiny.model(**inputs))
    mask, features = seen[0]
    features = features.reshape(-1, features.shape[-1])
    places = mask.nonzero()
    assert len(tokens.grids) >= 3
    pictured = {(g.row, p) for g in tokens.grids for p in g.index.flatten().tolist()}
    assert len(pictured) == sum(g.index.numel() for g in tokens.grids), "grids overlap"
    for where, number, r, c in probes(family, inputs, tokens.grids):
        changed = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
        changed["pixel_values"][where] += 1.0 + torch.rand_like(changed["pixel_values"][where])
        again = watch(tiny.model, lambda changed=changed: tiny.model(**changed))[1][0][1].reshape(features.shape)
        moved = places[(again - features).abs().amax(dim=1) > 1e-6].tolist()
        grid = tokens.grids[number]
        assert moved == [[grid.row, int(grid.image[r, c])]], (number, r, c)


def test_a_large_onevision_picture_is_shrunk():
    tiny = tiny_models.llava_onevision("anyres_max_1")
    inputs = tiny.inputs([[1, "image", 7], [1, "image", 5, "image", 8]])
    tokens, _ = watch(tiny.model, lambda: tiny.model(**inputs))
    generated, _ = watch(tiny.model, lambda: tiny.model.generate(**inputs, max_new_tokens=1))
    shapes = [g.shape for g in tokens.grids]
    assert shapes == [g.shape for g in generated.grids] and shapes[0::2] == [(1, 4, 4)] * 3
    # one tile's area at most, up to the tolerance of 1.1 on each side
    assert all(rows * cols <= 16 * 1.1**2 for _, rows, cols in shapes[1::2])
    for grid in tokens.grids[1::2]:
        assert (grid.image.diff(dim=0) == grid.width + 1).all(), "each row is followed by a newline feature"


def test_onevision_samples_of_several_images_have_base_grids_only():
    tiny = tiny_models.llava_onevision()
    ids = torch.tensor([[1, *[IMAGE] * 17, 5, *[IMAGE] * 17, 6]])
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 1, 3, 24, 24),
        "image_sizes": torch.tensor([[24, 60], [50, 20]]), "batch_num_images": torch.tensor([2]),
    }  # fmt: skip
    for run in (lambda: tiny.model(**inputs), lambda: tiny.model.generate(**inputs, max_new_tokens=1)):
        tokens, _ = watch(tiny.model, run)
        assert [g.index.flatten().tolist() for g in tokens.grids] == [list(range(1, 17)), list(range(19, 35))]
        assert tokens.positions("image", 0, 37).sum() == 34, "the newline features belong to the role"


def test_break_tokens_tell_two_adjacent_pictures_apart():
    tiny = tiny_models.pixtral()
    row = [IMAGE, IMAGE]
    ids = torch.tensor([[1, *row, BREAK, *row, END, *row, END, 5]])
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 48, 48),
        "image_sizes": torch.tensor([[8, 8], [4, 8]]),
    }  # fmt: skip
    tokens, _ = watch(tiny.model, lambda: tiny.model(**inputs))
    assert [g.image.tolist() for g in tokens.grids] == [[[1, 2], [4, 5]], [[7, 8]]]


def test_mllama_has_no_image_role():
    tiny = tiny_models.mllama()
    inputs = tiny.inputs([[1, "image", 5, 6]])
    tokens, _ = watch(tiny.model, lambda: tiny.model(**inputs))
    assert "image" not in tokens and tokens.grids == []


def test_text_only_prompt_has_no_image_role():
    tiny = tiny_models.llava()
    tokens, _ = watch(tiny.model, lambda: tiny.model(**tiny.inputs([[1, 5, 6, 7]])))
    assert "image" not in tokens and tokens.grids == [] and not tokens.blind


def test_embeddings_alone_leave_the_image_unknown():
    tiny = tiny_models.llava()
    tokens, _ = watch(tiny.model, lambda: tiny.model(inputs_embeds=torch.randn(1, 5, 32)))
    assert tokens.blind and "image" not in tokens
    with pytest.raises(reattend.ReattendError, match="pass input_ids instead"):
        tokens.positions("image", 0, 5)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "llava_next"])
def test_second_turn_keeps_the_first_picture_and_adds_its_own(family):
    tiny = tiny_models.build(family)
    prompt = [1, 5, "image", 6, 7]
    first = tiny.inputs([prompt])
    maps = []
    sites = reattend.sites(tiny.model).stack("decoder").kind("self")[:1]
    with attach(tiny.model, [Plan("watch", [Observe(sites, lambda o: maps.append(o.tokens))])]), torch.no_grad():
        out = tiny.model.generate(**first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        before = [g.index.tolist() for g in maps[0].grids]
        second = tiny.inputs([[7, 8, "image", 9]])
        ids = torch.cat([out.sequences, second["input_ids"]], dim=1)
        later = {k: v for k, v in second.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
        if family == "qwen2_vl":
            later["mm_token_type_ids"] = (ids == IMAGE).int()
            later["image_grid_thw"] = torch.cat([first["image_grid_thw"], second["image_grid_thw"]])
            later["pixel_values"] = second["pixel_values"]
        past = cache_of(out).get_seq_length()
        if family == "qwen2_vl":
            thw = second["image_grid_thw"]
            later = {"pixel_values": second["pixel_values"], "image_grid_thw": thw}
            later["mm_token_type_ids"] = (ids[:, past:] == IMAGE).int()
        tiny.model(input_ids=ids[:, past:], **{cache_name(tiny.model): cache_of(out)}, **later)
    tokens = maps[-1]
    assert [g.index.tolist() for g in tokens.grids[: len(before)]] == before
    assert len(tokens.grids) == 2 * len(before)
    shown = ids == IMAGE
    shown[:, first["input_ids"].shape[1] : past + 1] = False  # a generated token may have the placeholder's id
    assert torch.equal(tokens.positions("image", 0, ids.shape[1]), shown)


def test_chunks_that_cut_a_picture_in_two():
    tiny = tiny_models.llava()
    inputs = tiny.inputs([[1, 5, "image", 6, 7]])
    whole, _ = watch(tiny.model, lambda: tiny.model(**inputs))
    maps = []
    sites = reattend.sites(tiny.model).stack("decoder").kind("self")[:1]
    with attach(tiny.model, [Plan("watch", [Observe(sites, lambda o: maps.append(o.tokens))])]), torch.no_grad():
        tiny.model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=6)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(maps[-1].positions("image", 0, width), whole.positions("image", 0, width))
    assert [g.index.tolist() for g in maps[-1].grids] == [g.index.tolist() for g in whole.grids]


def test_layouts_that_do_not_account_for_the_tokens_are_refused():
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0]]).bool()
    one = (1, [torch.zeros(1, 1, dtype=torch.long)])
    assert place(mask, [one]) is None
    assert place(mask, [one, (2, [])]) is None, "an image cannot lie in two rows"
    assert [g.image.tolist() for g in place(mask, [one, one, one]) or []] == [[[1]], [[2]], [[1]]]
    assert runs(mask) == [(0, 1, 2), (1, 1, 1)]


def test_join_replaces_a_cut_picture():
    cut, whole = TokenGrid.of_image(0, torch.tensor([[1, 2]])), TokenGrid.of_image(0, torch.tensor([[1, 2], [3, 4]]))
    other = TokenGrid.of_image(0, torch.tensor([[0]]))
    assert join_images([other, cut], [other, whole], past=3) == [other, whole]


def test_a_grid_has_frames_rows_and_columns():
    video = TokenGrid(1, torch.arange(12).view(2, 2, 3), "reference")
    assert video.shape == (video.frames, video.height, video.width) == (2, 2, 3)
    with pytest.raises(ReattendError, match="2 frames of 2 x 3, no single image"):
        _ = video.image
    assert TokenGrid.of_image(0, torch.arange(6).view(2, 3)).image.tolist() == [[0, 1, 2], [3, 4, 5]]
    for index in (torch.arange(6).view(2, 3), torch.zeros(1, 0, 3, dtype=torch.long)):
        with pytest.raises(ReattendError, match="frames, rows, cols"):
            TokenGrid(0, index)
    tokens = TokenMap(2, 12, 12, grids=[video])
    tokens.move(torch.tensor([1, 0, 1]))
    assert [(g.row, g.role, g.shape) for g in tokens.grids] == [(0, "reference", (2, 2, 3)), (2, "reference", (2, 2, 3))]
