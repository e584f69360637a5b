"""TPG: what a shuffle is to each kind of block, its draws, and which blocks it takes."""

from __future__ import annotations

import functools
import warnings
from typing import Any
from unittest.mock import patch

import pytest
import reattend
import tiny_pipelines
import torch
from reattend.hooks import Entering, Inject, Plan, attach
from reattend.hooks.sites.discovery import layer_module
from reattend.interventions import Clock, ReattendError, ReattendWarning, Site, TokenMap, UnsupportedError
from reattend.recipes.tpg import UNET, blocks_of, default_blocks, knows_places
from tiny_denoisers import DENOISERS, build, unet
from tiny_runs import STEPS, draw, flux, stable_diffusion
from torch import Tensor

UNETS = ("UNet2DConditionModel", "UNetMotionModel")
RANDPERM = torch.randperm


@torch.no_grad()
def predict(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs)[0]


def everywhere(model: Any, number: int, **more: Any) -> Any:
    """A session that shuffles all rows before one block."""
    recipe = reattend.recipe("tpg", force=True, **more)
    table = blocks_of(reattend.sites(model))[number]
    return attach(model, [Plan("tpg", [Inject(table, functools.partial(recipe.shuffled, number))])])


def spread(tokens: Tensor) -> Tensor:
    """The tokens [B, T, width] in an order that does not depend on where they lie."""
    return torch.stack([row[row[:, 0].argsort()] for row in tokens])


def leaving(model: Any, number: int, run: Any) -> Tensor:
    """The image's tokens as they leave a block while `run` runs."""
    found: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        streams = [output] if isinstance(output, Tensor) else [part for part in output if part is not None]
        found.append(max(streams, key=lambda stream: stream.shape[1]))

    handle = layer_module(model, blocks_of(reattend.sites(model))[number][0].name).register_forward_hook(keep)
    run()
    handle.remove()
    return found[0]


# -- what a shuffle is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENOISERS)
def test_blocks_that_know_places_do_not_commute_with_a_shuffle_and_the_others_do(name: str) -> None:
    model, inputs = build(name)
    blocks = blocks_of(reattend.sites(model))
    last = 0 if name in UNETS else max(blocks)
    plain = leaving(model, last, lambda: predict(model, inputs))
    with everywhere(model, 0):
        shuffled = leaving(model, last, lambda: predict(model, inputs))
    assert not torch.allclose(shuffled, plain)
    same = torch.allclose(spread(shuffled), spread(plain), atol=1e-5)
    # in a UNet it is the convolutions between the stacks that know them
    assert same == (name in UNETS or not knows_places(blocks)), (spread(shuffled) - spread(plain)).abs().max()


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "PixArtTransformer2DModel", "AuraFlowTransformer2DModel"])
def test_where_blocks_do_not_the_branch_is_the_prediction_with_its_patches_shuffled(name: str) -> None:
    model, inputs = build(name)
    with pytest.raises(UnsupportedError, match="told where its image tokens lie at its input alone.*force=True"):
        reattend.apply(model, "tpg")

    def patches(prediction: Tensor) -> Tensor:
        return spread(prediction.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))

    plain = predict(model, inputs)
    for block in blocks_of(reattend.sites(model)):
        with everywhere(model, block):
            found = predict(model, inputs)
        assert not torch.allclose(found, plain)
        torch.testing.assert_close(patches(found), patches(plain), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", UNETS)
def test_the_branch_leaves_a_stack_with_the_tokens_of_the_conditional_rows(name: str) -> None:
    model, inputs = build(name)
    count = len(leaving(model, 0, lambda: predict(model, inputs)))
    with reattend.apply(model, "tpg"):
        found = leaving(model, 0, lambda: predict(model, inputs))
    assert len(found) == 2 * count
    torch.testing.assert_close(spread(found[count:]), spread(found[:count]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[count:], found[:count], atol=1e-2)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "FluxTransformer2DModel", "SanaTransformer2DModel"])
def test_the_other_rows_keep_their_bits(name: str) -> None:
    model, inputs = build(name)
    last = max(blocks_of(reattend.sites(model)))
    with attach(model, [Plan("tpg", [reattend.recipe("tpg").guide()])]):
        plain = leaving(model, last, lambda: predict(model, inputs))
    with reattend.apply(model, "tpg"):
        found = leaving(model, last, lambda: predict(model, inputs))
    count = len(plain) // 2
    assert torch.equal(found[:count], plain[:count]) and not torch.allclose(found[count:], plain[count:])


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "FluxTransformer2DModel", "SanaTransformer2DModel"])
def test_equal_to_two_calls(name: str) -> None:
    model, inputs = build(name)
    plain, (number,) = predict(model, inputs), default_blocks(reattend.sites(model))
    with everywhere(model, number):
        weak = predict(model, inputs)
    with reattend.apply(model, "tpg", scale=2.0):
        found = predict(model, inputs)
    scale = plain.abs().max()
    torch.testing.assert_close(found / scale, (plain + 2.0 * (plain - weak)) / scale, atol=1e-4, rtol=1e-4)


def test_without_a_shuffle_the_branch_is_the_conditional_prediction() -> None:
    model, inputs = build("UNet2DConditionModel")
    plain = predict(model, inputs)

    def as_they_are(n: int, **_: Any) -> Tensor:
        return torch.arange(n)

    with patch.object(torch, "randperm", as_they_are), reattend.apply(model, "tpg", scale=3.0) as session:
        found = predict(model, inputs)
    assert session.applied == 1
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)


def test_text_in_the_image_s_stream_stays_in_place() -> None:
    """Lumina 2: each row has a text of its own length, and padding at the end."""
    model, inputs = build("Lumina2Transformer2DModel")
    recipe, seen = reattend.recipe("tpg"), []

    def write(entering: Entering) -> Tensor | None:
        new = recipe.shuffled(0, entering)
        seen.append((entering.hidden, new, entering.places("image")))
        return new

    with attach(model, [Plan("tpg", [Inject(blocks_of(reattend.sites(model))[0], write)])]):
        predict(model, inputs)
    ((hidden, new, places),) = seen
    assert bool(places.any()) and bool((~places).any())
    assert torch.equal(new[~places], hidden[~places])
    for old, other, there in zip(hidden, new, places, strict=True):
        assert torch.equal(spread(other[None, there]), spread(old[None, there])) and not torch.equal(other[there], old[there])


def test_rows_with_other_numbers_of_places_are_shuffled_as_alone() -> None:
    recipe, site = reattend.recipe("tpg"), Site("layers.0.attn", 0, "denoiser", "joint", 2, 2, 8, True, "sdpa")

    def shuffled(hidden: Tensor, places: Tensor) -> Tensor:
        tokens = TokenMap(len(places), 6, 6, {"image": places, "text": ~places})
        new = recipe.shuffled(0, Entering(hidden, {}, None, site, Clock("denoise", steps=2), {}, lambda: tokens))
        assert new is not None
        return new

    places = torch.tensor([[False, True, True, True, True, True], [False, False, False, True, True, True]])
    hidden = torch.randn(2, 6, 4)
    both = shuffled(hidden, places)
    assert torch.equal(both, torch.cat([shuffled(hidden[row, None], places[row, None]) for row in (0, 1)]))
    assert torch.equal(both[~places], hidden[~places]) and not torch.equal(both, hidden)


# -- its draws -----------------------------------------------------------------------------------------------------------


def drawn(pipe: Any, call: dict[str, Any], **parameters: Any) -> list[list[int]]:
    """Every permutation of a run."""
    found: list[list[int]] = []

    def note(*given: Any, **more: Any) -> Tensor:
        order = RANDPERM(*given, **more)
        found.append(order.tolist())
        return order

    with reattend.apply(pipe, "tpg", **parameters), patch.object(torch, "randperm", note):
        draw(pipe, call)
    return found


@pytest.mark.parametrize("case", [stable_diffusion, lambda: stable_diffusion(guidance=1.0), flux, lambda: flux(guidance=1.0)])
def test_one_draw_for_each_block_and_step_however_the_pipeline_guides(case: Any) -> None:
    pipe, call, _, _ = case()
    blocks = [0, 2]
    found = drawn(pipe, call, blocks=blocks)
    assert len(found) == STEPS * len(blocks) == len({tuple(order) for order in found})
    torch.manual_seed(1)
    assert drawn(pipe, call, blocks=blocks) == found
    # a block's draw does not depend on which others are listed
    assert drawn(pipe, call, blocks=[2]) == found[1::2]
    assert not set(map(tuple, drawn(pipe, call, blocks=blocks, seed=1))) & set(map(tuple, found))


def test_guidance_in_one_batch_draws_what_a_run_without_draws() -> None:
    pipe, call, _, _ = stable_diffusion()
    assert drawn(pipe, call) == drawn(pipe, {**call, "guidance_scale": 1.0})


def test_the_same_seed_gives_the_same_picture_and_another_seed_another_one() -> None:
    pipe, call, _, _ = stable_diffusion()
    pictures = []
    for seed in (0, 0, 1):
        with reattend.apply(pipe, "tpg", seed=seed):
            pictures.append(draw(pipe, call))
    assert torch.equal(pictures[0], pictures[1]) and (pictures[0] - pictures[2]).abs().max() > 1e-4


def test_the_official_draws_come_from_the_global_generator() -> None:
    pipe, call, _, _ = stable_diffusion()
    found = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        found.append(drawn(pipe, call, official_rng=True, seed=seed))
    assert found[0] == found[1] != found[2]


def test_a_scheduler_that_evaluates_a_step_twice_draws_twice() -> None:
    from diffusers import HeunDiscreteScheduler

    pipe, call, _, _ = stable_diffusion()
    pipe.scheduler = HeunDiscreteScheduler()
    found = drawn(pipe, call)
    assert len(found) == 2 * STEPS - 1 == len({tuple(order) for order in found})
    assert drawn(pipe, call) == found


def test_a_bare_denoiser_draws_by_its_step() -> None:
    model, inputs = build("UNet2DConditionModel")
    with reattend.apply(model, "tpg"):
        one, again = predict(model, inputs), predict(model, inputs)
        other = [predict(model, {**inputs, "timestep": torch.tensor(t)}) for t in (400, 400)]
    assert torch.equal(one, again) and torch.equal(*other)


def test_one_token_cannot_be_shuffled() -> None:
    torch.manual_seed(0)
    model, inputs = unet(
        block_out_channels=(16, 16, 16, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    (mid,) = (n for n, table in blocks_of(reattend.sites(model)).items() if table[0].stack == "denoiser.mid")
    with pytest.warns(ReattendWarning, match="tpg: 1 image token enters the block of mid_block"):
        session = reattend.apply(model.eval(), "tpg", blocks=[0, mid])
        with session:
            predict(model, inputs)
    assert sum(session.stats["tpg"].values()) == 1


def test_a_compiled_denoiser_runs_as_it_is_written_while_the_session_lasts() -> None:
    model, inputs = build("UNet2DConditionModel")
    with reattend.apply(model, "tpg"):
        wanted = predict(model, inputs)
    torch._dynamo.reset()
    model.compile(backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReattendWarning)
        with reattend.apply(model, "tpg") as session:
            found = [predict(model, inputs), predict(model, inputs)]
    assert all(torch.equal(one, wanted) for one in found) and session.applied == 2


# -- its blocks ----------------------------------------------------------------------------------------------------------


def hollow(**config: Any) -> Any:
    """A UNet without weights, and the table of its sites."""
    with torch.device("meta"):
        model, _ = unet(norm_num_groups=4, **config)
    return reattend.sites(model)


def test_the_default_of_sdxl_is_the_published_one() -> None:
    sdxl = hollow(
        sample_size=128,
        layers_per_block=2,
        block_out_channels=(8, 8, 8),
        transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    assert len(blocks_of(sdxl)) == 70 and default_blocks(sdxl) == list(range(6, 24))
    assert {blocks_of(sdxl)[n][0].name[:28] for n in (4, 23)} == {
        "down_blocks.2.attentions.0.t",
        "down_blocks.2.attentions.1.t",
    }


@pytest.mark.parametrize(("size", "layers", "wanted"), [(64, 2, [4, 5]), (32, 1, [2]), (16, 1, [7]), (4, 1, [9])])
def test_other_unets_shuffle_the_last_down_block_or_what_softpag_takes(size: int, layers: int, wanted: list[int]) -> None:
    """SD 1.5's shape, and the zoo's: 64 x 64 pictures, 16 x 16 latents."""
    table = hollow(
        sample_size=size,
        layers_per_block=layers,
        block_out_channels=(8,) * 4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    assert default_blocks(table) == wanted


def test_a_unet_without_attention_on_its_way_down_has_a_default_too() -> None:
    table = hollow(down_block_types=("DownBlock2D", "DownBlock2D"))
    (number,) = default_blocks(table)
    assert table.missing == "" and blocks_of(table)[number][0].stack in UNET


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("UNet2DConditionModel", {"blocks": [4]}, "block 4 does not exist: .* has blocks 0 to 3"),
        ("UNet2DConditionModel", {"blocks": [-1]}, "block -1 does not exist"),
        ("SD3Transformer2DModel (3.5)", {"blocks": [3], "force": True}, "has blocks 0 to 2"),
    ],
)
def test_blocks_that_do_not_exist(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        reattend.apply(build(name)[0], "tpg", **parameters)


def test_attention_that_is_in_no_block_is_refused() -> None:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="whose self-attention lies in blocks"):
        reattend.apply(model, "tpg")


def test_on_a_language_model() -> None:
    from tiny_llama import tiny_llama

    with pytest.raises(ReattendError, match="tpg needs a diffusion model"):
        reattend.apply(tiny_llama(), "tpg")


def test_part_of_a_schedule_with_rescale() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    with reattend.wrap(pipe).use("tpg", scale=3.0, rescale=0.7, start=0.3, stop=0.9) as session:
        pipe("a fox", num_inference_steps=4, output_type="latent")
    assert list(session.stats["tpg"].values()) == [2]
