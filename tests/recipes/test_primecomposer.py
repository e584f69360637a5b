"""primecomposer beyond the matrix: geometry, what each pass reads, the latents of stock pipelines, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import reattend
import tiny_pipelines
import torch
from examples.primecomposer import CROSS, GIVEN, MASK, SELF, halves, image_tokens, photo
from PIL import Image
from reattend.hooks import AtStep, Latents, Plan, attach
from reattend.interventions import Call, Clock, Memory, TokenMap, fused, reference, row_weights
from reattend.recipes.kit.pasting import Placed, extent, pasted, reduced
from reattend.recipes.kit.registry import load_recipe, save_recipe
from reattend.recipes.kit.samplers import encoded, inverted
from tiny_steps import draw_steps, scheduled
from torch import Tensor

WHOLE = Placed((0.5, 0.5), (0.5, 0.5), (1.0, 1.0), torch.ones(4, 4, dtype=torch.bool))
PART = Placed((0.5, 0.5), (0.25, 0.75), (0.5, 0.5), torch.ones(4, 4, dtype=torch.bool))


def composer(**parameters):
    return reattend.recipe("primecomposer", **{**GIVEN, **parameters})


# -- pictures and places ---------------------------------------------------------------------------------------------------


def plain(width: int, height: int, colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def pixels(picture: Image.Image) -> Tensor:
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)


def test_the_thing_fills_its_box_as_far_as_its_proportions_allow():
    reference = plain(8, 8, (0, 0, 255))
    reference.paste((255, 0, 0), (2, 4, 6, 6))  # 4 x 2 pixels
    mask = [[int(2 <= x < 6 and 4 <= y < 6) for x in range(8)] for y in range(8)]
    rows = composer(reference=reference, mask=mask).masks[0]
    assert extent(rows, (8, 8)) == (2, 4, 6, 6) and extent(rows, (16, 16)) == (4, 8, 12, 12)
    composite, own, where = pasted(plain(32, 16, (0, 255, 0)), reference, rows, (0.5, 0.0, 1.0, 1.0), True)
    changed = (pixels(composite) != torch.tensor([0, 255, 0])).any(dim=2)
    wanted = torch.zeros(16, 32, dtype=torch.bool)
    wanted[4:12, 16:32] = True
    corners = torch.tensor([[4, 4, 11, 11], [16, 31, 16, 31]])
    wanted[tuple(corners)] = False  # edges are smooth
    assert torch.equal(changed, wanted) and bool((pixels(composite)[5:11, 18:30, 0] > 200).all())
    assert where.size == (0.5, 0.5) and where.target == (0.5, 0.75) and where.source == (0.5, 0.5)
    held = torch.zeros(16, 32, dtype=torch.bool)
    held[4:12, 8:24] = True
    held[corners[0], corners[1] - 8] = False
    assert torch.equal(where.inside, held) and bool((pixels(own)[5:11, 10:22, 0] > 200).all())
    theirs, ours = reduced(where, 4, 8).places(4, 8)
    assert theirs.tolist() == [10, 11, 12, 13, 18, 19, 20, 21] and (ours - theirs).tolist() == [2] * 8
    there = pasted(plain(32, 16, (0, 255, 0)), reference, rows, (0.5, 0.0, 1.0, 1.0), False)[2]
    assert torch.equal(*there.places(4, 8))


def test_what_whole_places_put_outside_the_picture_is_left_out():
    theirs, ours = Placed((0.5, 0.5), (0.1, 0.5), (0.5, 0.5), torch.ones(4, 4, dtype=torch.bool)).places(4, 4)
    assert theirs.tolist() == [9, 10] and ours.tolist() == [1, 2]
    assert Placed((0.5, 0.5), (0.1, 0.5), (0.5, 0.5), WHOLE.inside).box(4, 4).nonzero().tolist() == [[0, 1], [0, 2]]


def test_a_thing_that_covers_no_place_by_half_is_where_it_touches():
    held = torch.zeros(16, 16, dtype=torch.bool)
    held[4:12, 7] = True
    found = reduced(Placed((0.5, 0.5), (0.5, 0.5), (0.5, 0.5), held), 4, 4)
    assert found.inside.nonzero().tolist() == [[1, 1], [2, 1]] == [[p // 4, p % 4] for p in found.places(4, 4)[0].tolist()]


def test_a_thing_that_covers_nothing():
    with pytest.raises(reattend.ReattendError, match="none of the 4 x 4 places of the latents: make the box larger"):
        reduced(pasted(photo(1), photo(2), composer().masks[0], (0.0, 0.0, 0.1, 0.1), True)[2], 4, 4)


# -- attention -------------------------------------------------------------------------------------------------------------


def call_of(placed: list[Placed], cross: bool = False, side: int = 4, batch: int = 2) -> Call:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, batch, 2, side * side, 4)
    memory = Memory()
    memory["placed"] = placed
    images = image_tokens(batch, side)
    text = TokenMap(batch, 16, 16, {"composed": halves(batch)["conditional"][:, None] & (torch.arange(16) == 3)})
    tokens = {"tokens": text, "query_tokens": images} if cross else {"tokens": images}
    clock = Clock("denoise", 0, 20, branches=halves(batch))
    return Call(q, k, v, site=CROSS if cross else SELF, clock=clock, memory=memory, **tokens)


@pytest.mark.parametrize("run", [fused, reference])
def test_only_conditional_rows_change_and_rows_sum_to_1(run):
    call = call_of([PART])
    theirs, _ = PART.places(4, 4)
    call.memory["seen"] = {SELF.name: (torch.randn(1, 2, 16, 4), [torch.randn(2, len(theirs), 4)])}
    edits = composer().correlate(call)
    got, before = run(call, edits), run(call, [])
    assert torch.equal(got[0], before[0]) and (got[1] - before[1]).abs().max() > 0.1
    sums = row_weights(call, edits, torch.arange(16)).sum(dim=3)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_a_layer_that_does_not_hold_the_thing_is_left_alone():
    nowhere = Placed((0.5, 0.5), (0.5, 0.5), (0.5, 0.5), torch.zeros(4, 4, dtype=torch.bool))
    call = call_of([nowhere, nowhere])
    call.memory["seen"] = {SELF.name: (torch.randn(2, 2, 16, 4), [torch.randn(2, 0, 4)] * 2)}
    assert composer().correlate(call) == []
    call.memory["looking"] = True
    assert composer().alone(call) == []


def test_words_of_the_thing_are_seen_by_the_thing_alone():
    call, recipe = call_of([PART], cross=True), composer(columns=[[3]])
    weights = row_weights(call, [recipe.restrict(call)], torch.arange(16))
    plain, outside = row_weights(call, [], torch.arange(16)), torch.ones(16, dtype=torch.bool)
    outside[PART.places(4, 4)[1]] = False
    assert torch.equal(weights[0], plain[0]) and torch.equal(weights[1][:, ~outside], plain[1][:, ~outside])
    assert weights[1][:, outside, 3].abs().max() == 0
    others = plain[1][:, outside].clone()
    others[..., 3] = 0
    torch.testing.assert_close(weights[1][:, outside], others / others.sum(dim=-1, keepdim=True))
    assert recipe.restrict(call_of([WHOLE], cross=True)) is None


# -- pipelines -------------------------------------------------------------------------------------------------------------


def pipeline(scheduler: str | None = None):
    return scheduled(tiny_pipelines.stable_diffusion(), scheduler)


def draw(pipe, **more) -> tuple[Tensor, list[Tensor]]:
    return draw_steps(pipe, **{"prompt": "a b", "guidance_scale": 2.0, **more})


@pytest.mark.parametrize("same", [True, False])
def test_the_background_is_its_inversion_and_then_itself(same):
    pipe, found = pipeline(), {}
    recipe = composer(same_domain=same, background_until=0.6)
    composite, _, where = pasted(photo(1), photo(2), recipe.masks[0], tuple(GIVEN["box"]), True)

    def invert(at: AtStep) -> None:
        if at.clock.step == 0:
            clean = encoded(at.pipeline, [composite if same else photo(1)], at.latents)
            found.update(inverted(at, clean, "unconditional"))

    with attach(pipe, [Plan("invert", [Latents(invert)])]):
        before, _ = draw(pipe)
    with reattend.apply(pipe, recipe):
        got, steps = draw(pipe)
    outside = ~reduced(where, 8, 8).box(8, 8)
    assert 0 < outside.sum() < 64
    for step in (0, 1, 2):
        assert torch.equal(steps[step][..., outside], found[step + 1][..., outside])
    assert not torch.equal(steps[3][..., outside], found[4][..., outside])
    assert torch.equal(draw(pipe)[0], before) and not torch.equal(got, before)


@pytest.mark.parametrize(
    "scheduler", [None, "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "PNDMScheduler"]
)
def test_background_to_the_end_is_the_picture_and_an_object_that_is_kept_is_the_reference(scheduler):
    pipe, recipe = pipeline(scheduler), composer(background_until=1.0, object_until=1.0)
    composite, own, where = pasted(photo(1), photo(2), recipe.masks[0], tuple(GIVEN["box"]), True)
    with reattend.apply(pipe, recipe):
        got, _ = draw(pipe)
        assert torch.equal(draw(pipe)[0], got), "a second run is the first one again"
    clean, theirs = encoded(pipe, [composite], got), encoded(pipe, [own], got)
    where = reduced(where, 8, 8)
    outside, (source, target) = ~where.box(8, 8), where.places(8, 8)
    assert torch.equal(got[..., outside], clean[..., outside])
    assert torch.equal(got.flatten(2)[..., target], theirs.flatten(2)[..., source])


def test_scores_come_from_the_reference_alone():
    """Where the thing is kept as it is, no generator and no prompt of the negative half changes them."""
    kept = []

    class Noting(type(composer())):
        def note(self, call, edits):
            super().note(call, edits)
            if "looking" in call.memory:
                kept.append([call.memory["seen"][call.site.name][0], *call.memory["seen"][call.site.name][1]])

    pipe = pipeline()
    for seed in (1, 2):
        with reattend.apply(pipe, Noting(**{**GIVEN, "object_until": 1.0})):
            draw(pipe, generator=torch.Generator().manual_seed(seed))
    half = len(kept) // 2
    assert half == 5 * 4, "every step at every layer"
    for one, other in zip(kept[:half], kept[half:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_every_prompt_has_pictures_of_its_own():
    pipe = pipeline()
    lists = {
        "background": [photo(1), photo(3)], "reference": [photo(2), photo(4)], "mask": [MASK, [[0, 1], [0, 1]]],
        "box": [GIVEN["box"], [0.5, 0.1, 1.0, 0.9]], "words": [["a"], ["b"]],
    }  # fmt: skip
    with reattend.apply(pipe, composer(**lists)):
        both, _ = draw(pipe, prompt=["a b", "b c"], generator=[torch.Generator().manual_seed(n) for n in (1, 2)])
    for row, prompt in enumerate(("a b", "b c")):
        with reattend.apply(pipe, composer(**{name: given[row] for name, given in lists.items()})):
            alone, _ = draw(pipe, prompt=prompt, generator=torch.Generator().manual_seed(row + 1))
        size = alone.abs().max()
        torch.testing.assert_close(both[row : row + 1] / size, alone / size, atol=1e-4, rtol=1e-3)


def test_pictures_that_are_not_square_and_a_run_without_guidance():
    pipe = pipeline()
    with reattend.apply(pipe, composer(background=photo(1, 32, 16), words=["b"])) as session:
        got, _ = draw(pipe, height=16, width=32, guidance_scale=1.0)
    assert got.shape[-2:] == (8, 16) and got.isfinite().all()
    assert {count for name, count in session.stats["primecomposer"].items() if "attn2" in name} == {5}


def test_pictures_in_the_recipe_are_data(tmp_path):
    recipe = composer(reference=[photo(2), photo(3)])
    photo(1).save(tmp_path / "there.png")
    save_recipe(recipe, tmp_path / "recipe.yaml", overwrite=True)
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe and composer(background=str(tmp_path / "there.png")).plan(reattend.sites(pipeline()))


def test_bad_input_is_an_error_before_the_first_step(tmp_path):
    pipe = pipeline()
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (16, 16), 0).save(tmp_path / "black.png")
    for given, said in {
        "mask of 3 x 1 has other proportions than the reference": {"mask": [[1, 1, 1]]},
        "mask: the mask is empty": {"mask": tmp_path / "black.png"},
        "no picture for mask at": {"mask": tmp_path / "nowhere.png"},
        "reference: .*cannot be read as a picture": {"reference": tmp_path / "text.png"},
        "background at .*nowhere.png": {"background": tmp_path / "nowhere.png"},
    }.items():  # fmt: skip
        with pytest.raises(reattend.ReattendError, match=given):
            reattend.apply(pipe, composer(**said))
    states = torch.randn(1, 64, 16)
    runs = [
        ({"background": photo(1, 16, 12)}, {}, "background: a picture of 16 x 12 pixels has other proportions"),
        ({"box": [0.0, 0.0, 0.1, 0.1]}, {}, "covers none of the 8 x 8 places of the latents"),
        ({"background": [photo(1), photo(1)]}, {}, "background for 2 prompts, and 1 pictures"),
        ({"reference": [photo(2), photo(2)]}, {}, "reference for 2 prompts, and 1 pictures"),
        ({"mask": [MASK, MASK]}, {}, "mask for 2 prompts, and 1 pictures"),
        ({"box": np.array([GIVEN["box"]] * 2)}, {}, "box for 2 prompts, and 1 pictures"),
        ({"words": ["zebra"]}, {}, "zebra"),
        ({"words": ["b"]}, {"prompt": None, "prompt_embeds": states, "negative_prompt_embeds": states}, "prompt_embeds|no text encoder"),
        ({"words": ["z"]}, {"prompt": " ".join(["a"] * 80 + ["z"])}, "z"),
    ]  # fmt: skip
    for parameters, call, said in runs:
        with pytest.raises(reattend.ReattendError, match=said), reattend.apply(pipe, composer(**parameters)):
            draw(pipe, callback_on_step_end=lambda *_: pytest.fail("a step was done"), **call)
    with pytest.raises(reattend.ReattendError, match="apply the recipe to the pipeline"):
        reattend.apply(pipe.unet, composer())
    with reattend.apply(pipe, composer(columns=[[2]])):
        draw(pipe, prompt=None, prompt_embeds=states, negative_prompt_embeds=states)
