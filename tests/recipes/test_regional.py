"""regional: texts stay in their regions, whatever the others say; layouts per picture; what overlaps and what nobody holds."""

from __future__ import annotations

from typing import Any

import pytest
import reattend
import torch
from examples.nag import saved
from examples.regional import LEFT, RIGHT, TWO, called, grouped, parts
from reattend.interventions import Grouped, ReattendError, fused
from reattend.recipes.regional import cross_groups, joint_groups
from tiny_denoisers import build, noise
from tiny_prompts import FAMILIES
from tiny_runs import seeded, stable_diffusion, stable_diffusion_3
from torch import Tensor

NEAR: dict[str, Any] = {"atol": 2e-4, "rtol": 1e-3}
HALVES = {"a dog": [0, 0, 0.5, 1], "a map": [0.5, 0, 1, 1]}
pipelines = pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_3])


def draw(pipe: Any, call: dict[str, Any], **more: Any) -> Tensor:
    return pipe(**{"num_inference_steps": 2, "generator": seeded(), "output_type": "latent", **call, **more})[0]


def drawn(pipe: Any, call: dict[str, Any], regions: Any, given: dict[str, Any] | None = None, **parameters: Any) -> Tensor:
    with reattend.apply(pipe, "regional", regions=regions, **{"stop": 1.0, **parameters}):
        return draw(pipe, call, **(given or {}))


def operands(count: int, seed: int = 0) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 2, count, 8, generator=numbers) for _ in range(3)]


def halves(side: int = 4) -> Tensor:
    """Two masks, the left and the right half."""
    left = (torch.arange(side) < side // 2).expand(side, side)
    return torch.stack([left, ~left])


@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_a_region_sees_nothing_of_the_others(ratio):
    """Image rows of a region and its text, whatever the other's text and image are; blended, they change."""
    held, each, base, image, nothing = parts(2, 3, halves(), base=2)
    query, key, value = operands(len(image))
    edit = grouped(joint_groups(held, each, base, image, nothing, ratio, True))
    before = fused(called("joint", query, key, value), [edit])
    others = each[1] | held[1]
    changed = [
        torch.where(others[:, None], other, own) for own, other in zip((key, value), operands(len(image), 1)[:2], strict=True)
    ]
    after = fused(called("joint", query, *changed), [edit])
    assert torch.equal(before[:, :, each[0]], after[:, :, each[0]])
    assert torch.equal(before[:, :, held[0]], after[:, :, held[0]]) is (ratio == 0)
    assert not torch.isclose(before[:, :, others], after[:, :, others]).all(dim=-1).any()


def test_rows_sum_to_one_where_regions_overlap_and_where_there_are_none():
    """A row's shares are 1 together; overlaps join both regions; what nobody holds reads the prompt and itself."""
    masks = torch.zeros(2, 4, 4)
    masks[0, :3, :3], masks[1, 1:, 1:3] = 1, 1
    held, each, base, image, nothing = parts(2, 3, masks, base=2)
    shares, _ = joint_groups(held, each, base, image, nothing, 0.3, True)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(len(image)))
    shares, columns = joint_groups(held, each, base, image, nothing, 0.0, True)
    seen = torch.einsum("qg,kg->qk", shares, columns.float()) > 0
    free, both = image & ~held.any(dim=0), held.all(dim=0)
    prompt = ~image & ~each.any(dim=0)
    assert torch.equal(seen[free], (prompt | free).expand(int(free.sum()), -1))
    assert torch.equal(seen[both], (each.any(dim=0) | held.any(dim=0)).expand(int(both.sum()), -1))
    assert torch.equal(seen[prompt], (prompt | image).expand(2, -1))
    shares, _ = cross_groups(masks.flatten(1), each[:, :24], base[:24], 0.25)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(16))
    torch.testing.assert_close(shares[5], torch.tensor([0.25, 0.375, 0.375]))
    assert shares[15].tolist() == [1, 0, 0]


def test_disjoint_regions_are_an_attention_for_each():
    """Of n tokens and R regions, n^2 / R pairs and a little more are computed, not n^2."""
    held, each, base, image, nothing = parts(2, 3, halves(16), base=3)
    edit: Grouped = grouped(joint_groups(held, each, base, image, nothing, 0.0, True))
    pairs = sum(len(part.queries) * len(part.keys) for part in edit.parts(1))
    assert pairs < 0.6 * len(image) ** 2


def test_one_region_everywhere_is_its_text_in_the_prompts_place():
    """Cross-attention, where the prompt is then read by nobody."""
    model, inputs = build("UNet2DConditionModel")
    text = noise(1, 5, 8)
    with torch.no_grad():
        wanted = model(**{**inputs, "encoder_hidden_states": text.expand(2, -1, -1)})[0]
        regions = {"a": [0, 0, 1, 1]}
        with reattend.apply(model, "regional", regions=regions, tensors=saved("everywhere", {"prompt_embeds": text})):
            found = model(**inputs)[0]
    torch.testing.assert_close(found, wanted, **NEAR)


def test_a_text_everywhere_is_the_prompt_of_a_pipeline_and_its_padding_is_read_or_not():
    pipe, call, *_ = stable_diffusion(guidance=4.0)
    call = {**call, "prompt": "a fox", "num_images_per_prompt": 1}
    everywhere = {"a dog": [0, 0, 1, 1]}
    wanted = draw(pipe, call, prompt="a dog")
    torch.testing.assert_close(drawn(pipe, call, everywhere), wanted, **NEAR)
    assert (drawn(pipe, call, everywhere, padding=False) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_encodes_and_reads_the_texts(family):
    pipe, call = FAMILIES[family]()
    given = {"prompt": "a red circle", **call}
    base = draw(pipe, given)
    said = {
        "Lumina2": "lays out the text of each sample by its length",
        "CogVideoX": "has places for 16 text tokens",
    }.get(family)
    if said:
        with pytest.raises(ReattendError, match=said):
            drawn(pipe, given, TWO)
        return
    # some of them see one place alone
    whole = [0, 0, 1, 1]
    got, other = drawn(pipe, given, {"a dog": whole, "a map": whole}), drawn(pipe, given, {"a sky": whole, "a map": whole})
    assert got.isfinite().all()
    for different in (base, other):
        assert (got - different).abs().max() > 1e-5 * base.abs().max()
    assert torch.equal(draw(pipe, given), base)


@pipelines
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_every_picture_has_its_own_regions(make, guidance):
    """Several prompts with other numbers of regions, and two pictures of each: as alone."""
    pipe, call, part, _ = make(guidance=guidance)
    channels, size = (getattr(pipe, part).config[name] for name in ("in_channels", "sample_size"))
    latents = torch.randn(4, channels, size, size, generator=seeded())
    call = {**call, "height": None, "width": None, "num_images_per_prompt": 2}
    regions, prompts = [TWO, {"large trees": [0.2, 0, 1, 0.7]}], ["a fox", "a map"]
    together = drawn(pipe, call, regions, {"prompt": prompts, "latents": latents})
    for number in (0, 1):
        own = slice(2 * number, 2 * number + 2)
        alone = drawn(pipe, call, regions[number], {"prompt": prompts[number], "latents": latents[own]})
        torch.testing.assert_close(together[own], alone, **NEAR)


@pipelines
def test_boxes_are_masks_and_masks_have_any_size(make):
    pipe, call, *_ = make(guidance=1.0)
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    masks = {"a dog": left, "a map": (1 - left).repeat_interleave(2, 0).repeat_interleave(2, 1).numpy()}
    assert torch.equal(drawn(pipe, call, masks), drawn(pipe, call, HALVES))


@pipelines
def test_the_prompt_as_embeddings_and_texts_that_are_too_long(make):
    """The regions' texts are encoded with the pipeline's own settings: what is too long for it is cut off, as its prompt is."""
    pipe, call, _, _ = make(guidance=1.0)
    call = {**call, "prompt": "a fox", "num_images_per_prompt": 1}
    third = {"prompt_2": None, "prompt_3": None} if make is stable_diffusion_3 else {}
    encoded = pipe.encode_prompt("a fox", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False, **third)
    given = {"prompt": None, "prompt_embeds": encoded[0]} | ({"pooled_prompt_embeds": encoded[2]} if third else {})
    torch.testing.assert_close(drawn(pipe, call, HALVES, given), drawn(pipe, call, HALVES), **NEAR)
    long = {" ".join(["a dog"] * 100): LEFT, "a map": RIGHT}
    assert drawn(pipe, call, long).isfinite().all()


@pipelines
def test_after_the_regions_the_prompt_alone_is_read(make):
    """Defaults: joint models keep regions for the first 0.4 of the steps, those with cross-attention for all."""
    pipe, call, *_ = make(guidance=1.0)
    with reattend.apply(pipe, "regional", regions=HALVES) as session:
        draw(pipe, call, num_inference_steps=5)
    (counts,) = session.stats.values()
    assert set(counts.values()) == {2 if make is stable_diffusion_3 else 5}


@pipelines
def test_outside_its_part_of_the_schedule_the_denoiser_is_the_plain_one(make):
    pipe, call, *_ = make()
    denoiser, calls = getattr(pipe, "unet", None) or pipe.transformer, []
    handle = denoiser.register_forward_hook(lambda *seen: calls.append(seen[1:]), with_kwargs=True)
    with reattend.apply(pipe, "regional", regions={"a dog": [0, 0, 0.5, 1]}, start=0.25, stop=0.5):
        draw(pipe, call, num_inference_steps=4)
    handle.remove()
    with torch.no_grad():
        same = [torch.equal(denoiser(*args, **given)[0], found[0]) for args, given, found in calls]
    assert same == [True, False, True, True]


def test_places_in_no_region_read_no_regions_text_in_any_block():
    """Where nothing is kept apart they read the prompt and the whole image, the others all regional texts and the whole image."""
    masks = torch.zeros(2, 4, 4)
    masks[0, :3, :3], masks[1, 1:, 1:3] = 1, 1
    held, each, base, image, nothing = parts(2, 3, masks, base=2)
    inside, prompt = held.any(dim=0), base & ~image
    for ratio in (0.0, 0.3):
        shares, columns = joint_groups(held, each, base, image, nothing, ratio, False)
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(len(image)))
        seen = torch.einsum("qg,kg->qk", shares, columns.float()) > 0
        assert not seen[image & ~inside][:, each.any(dim=0)].any() and seen[image & ~inside][:, prompt | image].all()
        assert seen[inside][:, each.any(dim=0) | image].all() and bool(seen[inside][:, prompt].any()) is (ratio > 0)


def test_blocks_outside_the_interval_keep_no_regions_apart():
    model, inputs = build("FluxTransformer2DModel")
    texts = saved("interval", {"prompt_embeds": noise(2, 5, 8)})
    found = []
    for more in ({}, {"double_interval": 2}, {"single_interval": 2}):
        with torch.no_grad(), reattend.apply(model, "regional", regions=TWO, tensors=texts, stop=1.0, **more):
            found.append(model(**inputs)[0])
    assert all((one - other).abs().max() > 1e-5 for one, other in ((found[0], found[1]), (found[0], found[2])))


@pipelines
@pytest.mark.parametrize(
    ("regions", "said"),
    [
        ({"a dog": torch.ones(8, 3)}, "regional: region 'a dog': a mask of 3 x 8 has other proportions than the picture"),
        ({"a dog": [0.5, 0.5, 0.51, 0.51]}, "regional: region 'a dog': it holds none of the .* places"),
        ([HALVES] * 3, "3 mappings of regions cannot be shared out to 1 rows"),
    ],
)
def test_refusals_before_anything_is_drawn(make, regions, said):
    pipe, call, *_ = make(guidance=1.0)
    steps: list[int] = []
    with pytest.raises(ReattendError, match=said):
        drawn(
            pipe, {**call, "prompt": "a fox", "num_images_per_prompt": 1}, regions,
            {"callback_on_step_end": lambda pipe, step, *rest: steps.append(step) or {}},
        )  # fmt: skip
    assert not steps


def test_a_bare_joint_denoiser_has_no_schedule_and_tensors_are_counted():
    model, inputs = build("SD3Transformer2DModel")
    with pytest.raises(ReattendError, match="a bare denoiser has none"):
        reattend.apply(model, "regional", regions=TWO, tensors=saved("bare", {"prompt_embeds": noise(2, 5, 8)}))
    three = saved("three", {"prompt_embeds": noise(3, 5, 8)})
    with reattend.apply(model, "regional", regions=TWO, tensors=three, stop=1.0), pytest.raises(ReattendError, match="got 3"):
        model(**inputs)


@pytest.mark.parametrize(
    ("make", "other"),
    [
        (stable_diffusion, ("prompt-reweight", {"columns": [([1, 2], 4.0)], "stop": 1.0})),
        (stable_diffusion, ("nag", {"negative": "a dog"})),
        (stable_diffusion_3, ("prompt-reweight", {"columns": [([1, 2], 4.0)], "stop": 1.0})),
        (stable_diffusion_3, ("pag", {"scale": 3.0})),
        (stable_diffusion_3, ("softpag", {"scale": 3.0})),
    ],
)
def test_beside_others_both_act_whichever_is_named_first(make, other):
    pipe, call, *_ = make()
    regional = ("regional", {"regions": HALVES, "stop": 1.0, "base_ratio": 0.3})
    found = []
    for recipes in ((regional,), (other,), (regional, other), (other, regional)):
        with reattend.apply(pipe, *recipes):
            found.append(draw(pipe, call))
    torch.testing.assert_close(found[2], found[3], **NEAR)
    assert all((found[2] - alone).abs().max() > 1e-3 for alone in found[:2])


@pipelines
def test_regions_that_are_given_twice(make):
    pipe, call, *_ = make()
    with (
        reattend.apply(pipe, ("regional", {"regions": HALVES}), ("regional", {"regions": {"a fox": [0, 0, 1, 0.5]}})),
        pytest.raises(ReattendError, match="regional: regions are given twice.*give all of them in one"),
    ):
        draw(pipe, call)
