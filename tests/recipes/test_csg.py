"""CSG on whole pipelines: every picture by its own layout, both parts by themselves, both halves of guidance, and what it refuses."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import reattend
import tiny_modular
import tiny_pipelines
import torch
from reattend.interventions import Call, ReattendError, row_weights
from reattend.recipes.csg import CSG
from torch import Tensor

LEFT, RIGHT = [0, 0, 0.5, 1], [0.5, 0.25, 1, 1]
PROMPTS = ["a b", "the map"]
BOXES = [{"a": LEFT, "b": RIGHT}, {"the": RIGHT, "map": LEFT}]
LAYOUT = {"boxes": BOXES, "scale": 2.0, "tries": 2}


def attentive(scheduler: Any = diffusers.EulerDiscreteScheduler) -> Any:
    pipe = tiny_pipelines.stable_diffusion()
    for name, weight in pipe.unet.named_parameters():
        # random weights hardly attend to anything
        if "to_q" in name or "to_k" in name:
            weight.data *= 2
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    return pipe


def draw(pipe: Any, prompts: list[str], rows: list[int], **more: Any) -> Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))[rows]
    call = {"prompt": prompts, "negative_prompt": ["b"] * len(prompts), "latents": latents}
    return pipe(**{"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent", **call, **more}).images


def steered(pipe: Any, rows: tuple[int, ...] = (0, 1), call: dict[str, Any] | None = None, **parameters: Any) -> Tensor:
    with reattend.apply(pipe, "csg", **{**LAYOUT, **parameters}):
        return draw(pipe, [PROMPTS[row] for row in rows], list(rows), **(call or {}))


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[float]]]:
    """(step, L of every picture), in the order in which they are asked for."""
    seen: list[tuple[int, list[float]]] = []
    evaluate = CSG.evaluate

    def noting(self: CSG, table: Any, at: Any, x: Tensor, number: int) -> tuple[Tensor, Tensor]:
        loss, slope = evaluate(self, table, at, x, number)
        seen.append((at.clock.step, loss.tolist()))
        return loss, slope

    monkeypatch.setattr(CSG, "evaluate", noting)
    return seen


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Call, Tensor]]:
    """(call, its weights) wherever weights are redistributed."""
    seen: list[tuple[Call, Tensor]] = []
    redistribute = CSG.redistribute

    def noting(self: CSG, name: str, call: Call) -> Any:
        edit = redistribute(self, name, call)
        if edit is not None:
            seen.append((call, row_weights(call, [edit], torch.arange(call.num_queries))))
        return edit

    monkeypatch.setattr(CSG, "redistribute", noting)
    return seen


@pytest.mark.parametrize("only", [{}, {"scale": 0}, {"strength": 0}, {"background": [{"b": [0, 0, 1, 1]}, {"the": LEFT}]}])
def test_every_picture_goes_by_its_own_layout(only):
    pipe = attentive(diffusers.DDIMScheduler)
    plain = draw(pipe, PROMPTS, [0, 1])
    if "background" in only:
        only = {"boxes": [{"a": LEFT}, {"map": RIGHT}], **only}
    both = steered(pipe, **only)
    for row in (0, 1):
        parts = {name: value[row] for name, value in {"boxes": BOXES, **only}.items() if isinstance(value, list)}
        alone = steered(pipe, (row,), **{**only, **parts})[0]
        largest = alone.abs().max()
        torch.testing.assert_close(both[row] / largest, alone / largest, atol=1e-4, rtol=1e-4)
        assert (both[row] - plain[row]).abs().max() > 1e-3 * largest
    assert torch.equal(steered(pipe, **only), both) and torch.equal(draw(pipe, PROMPTS, [0, 1]), plain)


def test_weights_lie_in_the_boxes(maps):
    """Both halves: none of the layout's tokens outside their boxes, others keep their ratios, rows sum to 1."""
    pipe = attentive()
    steered(pipe, (0,), boxes=BOXES[0], scale=0)
    assert len(maps) == 3 * 3
    inside = torch.zeros(2, 8, 8, dtype=torch.bool)
    inside[0, :, :4] = inside[1, 2:, 4:] = True
    for call, weights in maps:
        plain = row_weights(call, [], torch.arange(64))
        given = plain[..., [1, 2]].sum(dim=-1)
        assert weights.shape[0] == 2 and torch.allclose(weights.sum(dim=-1), torch.ones(()))
        rest = [0, *range(3, call.num_keys)]
        scale = weights[..., 0] / plain[..., 0]
        assert torch.allclose(weights[..., rest], plain[..., rest] * scale[..., None], atol=1e-6)
        for column, places in ((1, inside[0]), (2, inside[1])):
            assert (weights[..., column][..., ~places.flatten()] == 0).all()
            found = torch.where(places.flatten(), given * scale, 0)
            assert torch.allclose(weights[..., column], found, atol=1e-6)


def test_all_tokens_of_a_word_have_its_box_and_a_box_for_everything_changes_no_weight(maps):
    pipe = attentive()
    steered(pipe, (1,), boxes={"map": LEFT}, scale=0)
    (call, weights), *_ = maps
    # start, "the" and "map" letter by letter
    outside = (torch.arange(64) % 8) >= 4
    assert (weights[:, :, outside, 4:7] == 0).all() and (weights[:, :, ~outside, 4:7] > 0).all()
    assert torch.allclose(weights[:, :, ~outside, 4], weights[:, :, ~outside, 6])
    maps.clear()
    steered(pipe, (0,), boxes={"b": [0, 0, 1, 1]}, scale=0)
    for call, weights in maps:
        assert torch.allclose(weights, row_weights(call, [], torch.arange(64)), atol=1e-6)


def test_it_goes_downhill_and_stays_where_nothing_is_lost(losses):
    pipe = attentive(diffusers.DDIMScheduler)
    given = {"scale": 0.05, "tries": 4, "steps": 1, "strength": 0}
    steered(pipe, dropout=1.0, topk=1.0, **given)
    assert [step for step, _ in losses] == [0] * 4
    for row in (0, 1):
        fell = [loss[row] for _, loss in losses]
        assert fell == sorted(fell, reverse=True) and fell[-1] < fell[0]
    losses.clear()
    # one token whose box is everything has nothing outside and no other word beside it
    plain = draw(pipe, ["b"], [0])
    with reattend.apply(pipe, "csg", boxes={"b": [0, 0, 1, 1]}, **given) as session:
        assert torch.equal(draw(pipe, ["b"], [0]), plain)
    assert losses == [(0, [0.0])] and session.applied == 0


def test_tokens_of_a_word_do_not_compete():
    """Without other words there is no inter-token loss, however many tokens a word has: the margin says nothing then."""
    pipe = attentive()
    drawn = [steered(pipe, (1,), boxes={"map": LEFT}, strength=0, margin=margin) for margin in (0.0, 1.0)]
    assert torch.equal(*drawn)
    drawn = [steered(pipe, (1,), boxes=BOXES[1], strength=0, margin=margin) for margin in (0.0, 1.0)]
    assert not torch.equal(*drawn)


def test_the_random_places_go_by_the_seed():
    pipe = attentive()
    first, same, other = (steered(pipe, strength=0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_masks_columns_and_a_picture_that_is_not_square():
    pipe = attentive()
    mask = torch.zeros(16, 16)
    mask[:, :8] = 1
    boxed = steered(pipe, (0,), boxes={"a": LEFT, "b": RIGHT})
    assert torch.equal(steered(pipe, (0,), boxes={"a": mask, "b": RIGHT}), boxed)
    assert torch.equal(steered(pipe, (0,), boxes={"a": LEFT, "b": RIGHT}, columns={"a": [1], "b": [2]}), boxed)
    wide = {"latents": torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1)), "height": 16, "width": 24}
    plain = draw(pipe, PROMPTS[:1], [0], **wide)
    boxed = steered(pipe, (0,), wide, boxes={"a": LEFT})
    halves = torch.arange(24).lt(12).expand(16, -1)
    assert torch.equal(steered(pipe, (0,), wide, boxes={"a": halves}), boxed) and not torch.equal(boxed, plain)


def test_the_window_of_the_weights_is_one_step_longer():
    pipe = attentive()
    with reattend.apply(pipe, "csg", boxes=BOXES, steps=1, scale=5.0) as session:
        draw(pipe, PROMPTS, [0, 1])
    counts = session.stats["csg"]
    assert counts.pop("latents") == 1 and [*counts.values()] == [2] * 3


def test_passes_with_a_gradient_end_at_the_last_map():
    """On a UNet whose last up block sees more places than the maps have."""
    pipe, ran = attentive(), []
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    pipe.unet = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=2, **blocks,
    ).eval()  # fmt: skip
    handle = pipe.unet.up_blocks[1].register_forward_pre_hook(lambda *_: ran.append(1))
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    steered(pipe, (0,), {"latents": latents, "height": 32, "width": 32}, boxes=BOXES[0])
    handle.remove()
    # the three steps of the picture, and the first further pass, which looks for the maps of 8 x 8 places
    assert len(ran) == 3 + 1


@pytest.mark.parametrize("only", [False, True])
def test_guidance_in_two_calls_of_the_denoiser(only):
    """diffusers' modular pipelines run the two halves one after the other."""
    pipe, _, call = tiny_modular.sdxl()
    given = {"boxes": BOXES[0], "columns": {"a": [1], "b": [2]}, "conditional_only": only, "tries": 1}
    plain = tiny_modular.draw(pipe, call)
    with reattend.apply(pipe, "csg", **given) as session:
        assert not torch.equal(tiny_modular.draw(pipe, call), plain)
    counts = session.stats["csg"]
    assert counts.pop("latents") == 4 and [*counts.values()] == [4 if only else 8] * 3


def test_the_negative_prompts_rows_are_changed_or_not():
    """In one batch: without the gradient, the first step's unconditional prediction shows it."""
    pipe, kept = attentive(), []
    handle = pipe.unet.register_forward_hook(lambda module, args, output: kept.append(output[0]))
    draw(pipe, PROMPTS, [0, 1])
    steered(pipe, scale=0, conditional_only=True)
    steered(pipe, scale=0)
    handle.remove()
    plain, only, both = kept[::3]
    assert torch.equal(only[:2], plain[:2]) and not torch.equal(both[:2], plain[:2])
    assert torch.equal(only[2:], both[2:]) and not torch.equal(only[2:], plain[2:])


@pytest.mark.parametrize("only", [{}, {"scale": 0}])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"boxes": {"wolf": LEFT}}, "'wolf' is not in prompt 0"),
        ({"boxes": [*BOXES, BOXES[0]]}, "3 mappings of boxes for 2"),
        ({"boxes": {"a": LEFT}, "columns": {"a": [700]}}, "700.* of a text that has"),
        ({"boxes": [{"a": [0, 0, 0.05, 1]}, BOXES[1]]}, "csg: 'a': it holds none of the 8 x 8 places"),
        ({"boxes": [{"a": torch.ones(8, 16)}, BOXES[1]]}, "csg: 'a': a mask of 16 x 8 has other proportions"),
        ({"boxes": [{"a": [0, 0, 1, 1]}, BOXES[1]], "background": [{"b": LEFT}, {}]}, "leave 'b' none of 8 x 8 places"),
    ],
)
def test_refusals_before_anything_is_drawn(given, said, only):
    pipe, stepped = attentive(), []
    with pytest.raises(ReattendError, match=said):
        steered(pipe, call={"callback_on_step_end": lambda *_: stepped.append(1)}, **{**given, **only})
    assert not stepped


def test_texts_that_nobody_saw_and_words_after_the_end():
    pipe = attentive()
    embeds = pipe.encode_prompt(PROMPTS[0], "cpu", 1, True, "b")
    late = {"prompt": None, "negative_prompt": None, "prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    with reattend.apply(pipe, "csg", boxes={"a": LEFT}), pytest.raises(ReattendError, match="give columns"):
        draw(pipe, [], [0], **late)
    with reattend.apply(pipe, "csg", boxes={"fox": LEFT}), pytest.raises(ReattendError, match="'fox' is not in prompt 0"):
        draw(pipe, ["a " * 70 + "fox"], [0])
    with (
        reattend.apply(pipe, "csg", boxes={"a": LEFT}, resolution=5),
        pytest.raises(ReattendError, match="no cross-attention sees 5 places"),
    ):
        draw(pipe, PROMPTS[:1], [0])
