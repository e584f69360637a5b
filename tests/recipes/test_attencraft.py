"""attencraft beyond the matrix: its maps and masks on tensors, what it reads in stock pipelines, and that it changes nothing; bad input."""

from __future__ import annotations

import diffusers
import pytest
import reattend
import tiny_pipelines
import tiny_prompts
import torch
from PIL import Image
from reattend.hooks import AtStep, Capture, Latents, Plan, attach
from reattend.interventions import row_weights
from reattend.recipes.attencraft import Found, leading, reduced, refined, spanned
from reattend.recipes.kit.registry import load_recipe, save_recipe
from reattend.recipes.kit.samplers import encoded, levels
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import interpolate


def craft(**parameters):
    return reattend.recipe("attencraft", **({"words": ["a", "b"]} | parameters))


# -- maps and masks --------------------------------------------------------------------------------------------------------


def maps_of(seed: int = 0) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.rand(3, 4, 4, generator=made), torch.rand(64, 64, generator=made)


def test_four_products_are_the_power_that_is_brought_to_0_to_1_twice():
    maps, affinity = maps_of()
    large = interpolate(maps[None], size=(8, 8), mode="bicubic")[0].square().flatten(1)
    kin = spanned(affinity.flatten(), 0).view(64, 64).double()
    power = spanned(torch.linalg.matrix_power(kin, 4).flatten(), 0).view(64, 64)
    wanted = spanned(spanned(large, 1).double() @ power.T, 1).unflatten(1, (8, 8))
    torch.testing.assert_close(refined(maps, affinity, (8, 8), 2, 4), wanted.float(), atol=1e-4, rtol=0)


def test_nothing_is_spread_where_places_are_their_own_kin_alone():
    maps, _ = maps_of()
    wanted = spanned(interpolate(maps[None], size=(8, 8), mode="bicubic")[0].square().flatten(1), 1).unflatten(1, (8, 8))
    torch.testing.assert_close(refined(maps, torch.eye(64), (8, 8), 2, 4), wanted)
    torch.testing.assert_close(refined(maps, maps_of()[1], (8, 8), 2, 0), wanted)


def test_a_map_that_is_the_same_everywhere_is_0():
    maps, affinity = maps_of()
    maps[1] = 0.3
    assert refined(maps, affinity, (8, 8), 2, 4).isfinite().all()
    assert spanned(torch.full((2, 5), 0.3), 1).abs().max() == 0


@pytest.mark.parametrize("count", [2, 3, 4])
def test_masks_are_disjoint_and_follow_their_maps(count):
    maps = torch.rand(count, 8, 8, generator=torch.Generator().manual_seed(1))
    masks = leading(maps, 0.1)
    assert masks.sum(dim=0).max() == 1 and masks.any()
    assert torch.equal(leading(maps.flip(0), 0.1), masks.flip(0))
    assert not leading(maps, 1.0).any()
    assert torch.equal(leading(maps, 0.0).sum(dim=0) == 1, torch.ones(8, 8, dtype=torch.bool))


def test_things_that_cannot_be_told_apart_are_an_error(tmp_path):
    maps = torch.zeros(3, 4, 4)
    maps[0, :2], maps[1, 2:, :2], maps[2, 2:, 2:] = 1, 0.5, 0.3
    found = Found(("red circle", "square"), maps)
    assert found.masks().flatten(1).sum(dim=1).tolist() == [8, 4, 4]
    assert found.masks(size=(16, 8)).shape == (3, 16, 8)
    with pytest.raises(reattend.ReattendError, match="no place is told to be 'the background'.*lower threshold"):
        found.masks(threshold=0.4)
    with pytest.raises(reattend.ReattendError, match="'red circle'"):
        found.masks(threshold=1.0)
    with safe_open(found.save(tmp_path / "masks.safetensors"), "pt") as file:
        assert file.metadata() == {"names": "red circle\nsquare"} and torch.equal(file.get_tensor("maps"), maps)
        assert torch.equal(file.get_tensor("masks").bool(), found.masks())


def test_maps_of_small_pictures_are_not_made_smaller():
    assert [reduced(kind, 64, 64) for kind in ("cross", "self")] == [(16, 16), (32, 32)]
    assert [reduced(kind, 16, 16) for kind in ("cross", "self")] == [(8, 8), (16, 16)]
    assert [reduced(kind, 8, 12) for kind in ("cross", "self")] == [(8, 12), (8, 12)]


# -- pipelines -------------------------------------------------------------------------------------------------------------


def photo(seed: int = 5, width: int = 16, height: int = 16) -> Image.Image:
    pixels = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((pixels * 255).byte().numpy())


def draw(pipe, **more) -> Tensor:
    return pipe(**{
        "prompt": "a b", "num_inference_steps": 5, "guidance_scale": 2.0, "generator": torch.Generator().manual_seed(1),
        "output_type": "latent", **more,
    }).images  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("more", [{}, {"image": photo()}])
def test_it_changes_no_bit_and_reads_the_same_again(more, guidance):
    pipe, recipe = tiny_pipelines.stable_diffusion(), craft(**more)
    assert recipe.found == []
    base = draw(pipe, guidance_scale=guidance)
    with reattend.apply(pipe, recipe):
        assert torch.equal(draw(pipe, guidance_scale=guidance), base)
        (first,) = recipe.found
        draw(pipe, guidance_scale=guidance)
    (again,) = recipe.found
    assert torch.equal(first.maps, again.maps) and first.names == ("a", "b")
    assert first.maps.shape == (3, 8, 8) and first.maps.min() >= 0 and first.maps.max() <= 1


def test_what_it_reads_is_the_attention_of_one_pass():
    pipe, kept = tiny_pipelines.stable_diffusion(), {}
    sites = reattend.sites(pipe)

    def read(call, edits):
        if kept.get("on") and call.num_queries == 64:
            weights = row_weights(call, [], torch.arange(64)).mean(dim=1)
            kept.setdefault(call.site.kind, []).append(weights[0])

    def before(at: AtStep) -> None:
        if at.clock.step == 0:
            times = at.scheduler.timesteps.tolist()
            index = min(range(len(times)), key=lambda one: abs(times[one] - 400))
            clean = encoded(at.pipeline, [photo()], at.latents)
            noise = torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(3))
            kept["on"] = True
            at.look(levels(at.scheduler)[index].mixed(clean, noise), timestep=times[index], text="conditional")
            kept["on"] = False

    with attach(pipe, [Plan("by hand", [Latents(before, steps=[Capture(sites.kind("cross", "self"), read)])])]):
        draw(pipe)
    words = torch.stack(kept["cross"]).mean(dim=0).view(8, 8, -1)
    maps = torch.stack([words[..., 1], words[..., 2], words[..., 0]])
    wanted = refined(maps, torch.stack(kept["self"]).mean(dim=0), (8, 8), 2, 4)
    recipe = craft(image=photo(), timestep=400, seed=3)
    with reattend.apply(pipe, recipe):
        draw(pipe)
    torch.testing.assert_close(recipe.found[0].maps, wanted, atol=1e-4, rtol=0)


def test_the_picture_that_is_drawn_is_read_when_it_has_little_noise():
    pipe, seen = tiny_pipelines.stable_diffusion(), []

    class Noting(type(craft())):
        def composed(self, looked, pictures, latents):
            seen.append(now[-1])
            return super().composed(looked, pictures, latents)

        def before(self, at):
            now.append((at.clock.step, at.clock.scheduled))
            super().before(at)

    for timestep, step in ((999, 0), (500, 2), (150, 4), (0, 4)):
        now: list = []
        with reattend.apply(pipe, Noting(words=["a"], timestep=timestep)):
            draw(pipe)
        assert seen.pop()[0] == step and not seen, timestep


def test_every_prompt_has_words_and_a_picture_of_its_own():
    pipe, pictures, words = tiny_pipelines.stable_diffusion(), [photo(5), photo(6)], [["a", "b"], ["c"]]
    # random weights are nearly even, and spreading them leaves next to nothing but rounding to be brought to 0..1
    both = craft(words=words, image=pictures, spread=0)
    with reattend.apply(pipe, both):
        draw(pipe, prompt=["a b", "b c"], num_images_per_prompt=2)
    assert [one.names for one in both.found] == [("a", "b"), ("a", "b"), ("c",), ("c",)]
    for row, prompt in enumerate(("a b", "b c")):
        alone = craft(words=words[row], image=pictures[row], spread=0)
        with reattend.apply(pipe, alone):
            draw(pipe, prompt=prompt)
        torch.testing.assert_close(both.found[2 * row].maps, alone.found[0].maps, atol=1e-4, rtol=0)


def test_columns_are_the_words_they_hold_and_a_passage_has_its_strongest_token():
    pipe, maps = tiny_pipelines.stable_diffusion(), {}
    for name, given in {"words": {"words": ["a b", "c"]}, "columns": {"words": None, "columns": [[1, 2], [3]]}}.items():
        recipe = craft(**given, image=photo())
        with reattend.apply(pipe, recipe):
            draw(pipe, prompt="a b c")
        maps[name] = recipe.found[0].maps
    assert torch.equal(maps["words"], maps["columns"])


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"])
def test_schedulers_and_pictures_that_are_not_square(scheduler):
    pipe, recipe = tiny_pipelines.stable_diffusion(), craft(image=photo(5, 32, 16))
    more = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **more)
    with reattend.apply(pipe, recipe):
        draw(pipe, height=16, width=32)
    assert recipe.found[0].maps.shape == (3, 8, 16) and recipe.found[0].maps.isfinite().all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"size": 32}, r"size must be \(height, width\), got 32"),
        ({"size": (8, 8, 8)}, r"size must be \(height, width\)"),
        ({"size": (0, 8)}, "size must be a whole number of at least 1, got 0"),
        ({"size": (8.5, 8)}, "size must be a whole number of at least 1, got 8.5"),
        ({"size": (10**9, 10**9)}, "size must hold at most"),
        ({"threshold": float("nan")}, "threshold must be a number, got NaN"),
        ({"threshold": 1.5}, "threshold must lie from 0 to 1, got 1.5"),
        ({"threshold": "high"}, "threshold must be a number"),
    ],
)
def test_masks_that_cannot_be_made(given, said):
    with pytest.raises(reattend.ReattendError, match=said):
        Found(("a",), maps_of()[0][:2]).masks(**given)


def test_masks_that_cannot_be_written(tmp_path):
    maps = torch.zeros(2, 4, 4)
    maps[0, :, :2] = maps[1, :, 2:] = 1
    found = Found(("a",), maps)
    (tmp_path / "file").write_text("no folder")
    for where, said in {
        tmp_path: "is a folder; name a file",
        tmp_path / "file" / "masks": "is a file",
        "/proc/masks": "/proc",
    }.items():
        with pytest.raises(reattend.ReattendError, match=f"the file of masks: .*{said}"):
            found.save(where)
    assert found.save(tmp_path / "new" / "masks.safetensors").is_file()


def test_a_run_without_a_step_near_the_timestep_is_refused():
    pipe = tiny_pipelines.stable_diffusion()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    recipe = craft(words=["a"], image=photo())
    said = "timestep 150 .* no step of this run is near it: the nearest of 1 has 999; draw with more steps"
    with pytest.raises(reattend.ReattendError, match=said), reattend.apply(pipe, recipe):
        draw(pipe, prompt="a b", num_inference_steps=1)
    with reattend.apply(pipe, recipe):
        draw(pipe, prompt="a b", num_inference_steps=4)
    assert recipe.found


def test_a_run_that_ends_before_the_noise_is_as_little_is_read_at_its_last_step():
    pipe, call = tiny_prompts.sdxl()
    recipe, read = craft(words=["a"]), []
    with reattend.apply(pipe, recipe):
        draw(
            pipe, prompt="a b", num_inference_steps=6, denoising_end=0.5, **call,
            callback_on_step_end=lambda pipe, step, *rest: read.append(len(recipe.found)) or rest[-1],
        )  # fmt: skip
    assert len(read) > 1 and read == [0] * (len(read) - 1) + [1]


def test_a_copy_has_found_nothing():
    pipe, recipe = tiny_pipelines.stable_diffusion(), craft(image=photo())
    with reattend.apply(pipe, recipe):
        draw(pipe)
    copied = recipe.model_copy(update={"threshold": 0.2})
    with reattend.apply(pipe, copied):
        draw(pipe, prompt=["a b", "b a"])
    assert len(copied.found) == 2 and len(recipe.found) == 1


def test_a_recipe_that_has_read_is_the_same_recipe(tmp_path):
    pipe, recipe = tiny_pipelines.stable_diffusion(), craft(image=photo())
    with reattend.apply(pipe, recipe):
        draw(pipe)
    assert recipe == craft(image=photo()) == load_recipe(save_recipe(recipe, tmp_path / "recipe.yaml"))


def test_bad_input_is_an_error_before_the_first_step(tmp_path):
    pipe, states = tiny_pipelines.stable_diffusion(), torch.randn(1, 64, 16)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(reattend.ReattendError, match="image: .*cannot be read as a picture"):
        reattend.apply(pipe, craft(image=tmp_path / "text.png"))
    embeds = {"prompt": None, "prompt_embeds": states, "negative_prompt_embeds": states}
    runs = [
        ({"words": ["zebra"]}, {}, "zebra"),
        ({}, embeds, "no text encoder"),
        ({"words": ["z"]}, {"prompt": " ".join(["a"] * 80 + ["z"])}, "z"),
        ({"image": photo(5, 16, 12)}, {}, "image: a picture of 16 x 12 pixels has other proportions"),
        ({"image": [photo()] * 2}, {}, "image for 2 prompts, and 1 pictures"),
        ({"image": photo(), "cross_resolution": 5}, {}, "no cross-attention sees 5 places along the shorter side"),
        ({"image": photo(), "self_resolution": 5}, {}, "no self-attention sees 5 places.*another self_resolution"),
    ]
    for parameters, call, said in runs:
        with pytest.raises(reattend.ReattendError, match=said), reattend.apply(pipe, craft(**parameters)):
            draw(pipe, callback_on_step_end=lambda *_: pytest.fail("a step was done"), **call)
    with pytest.raises(reattend.ReattendError, match="apply the recipe to the pipeline"):
        reattend.apply(pipe.unet, craft(words=None, columns=[[1]]))
    recipe = craft(words=None, columns=[[1], [2]])
    with reattend.apply(pipe, recipe):
        draw(pipe, **embeds)
    assert recipe.found[0].names == ("1", "2")
