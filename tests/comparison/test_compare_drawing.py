"""`compare` on pipelines that draw: prompts, also empty ones and pairs of a source and its edit, and pictures of a recipe's own."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import reattend
import tiny_pipelines
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image
from rich.console import Console

SHORT = dict(num_inference_steps=2, attention=False)
ERASER = dict(boxes=[0.0, 0.0, 0.5, 0.5], scale=5.0)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.stable_diffusion()


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_an_empty_prompt_that_was_given_is_a_prompt(pipe, several):
    given = [[("attentive-eraser", ERASER)]] if several else [("attentive-eraser", ERASER)]
    report = reattend.compare(pipe, *given, prompt="", num_inference_steps=2)
    assert report.request["prompt"] == ""
    assert not (report.columns[0].same if several else report.metrics["identical"])


EDIT = dict(edit="replace", stop=1.0, self_stop=1.0)


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("given", [False, True], ids=["seed", "generator"])
def test_a_source_and_its_edits_begin_with_the_same_noise(pipe, several, given):
    told = {"generator": torch.Generator().manual_seed(5)} if given else {"seed": 5}
    asked = dict(prompt=["a fox", "a map", "a fox"], num_images_per_prompt=2, **told, **SHORT)
    recipe = ("prompt-reweight", {**EDIT, "pictures": 2})
    if several:
        drawn = reattend.compare(pipe, [recipe, "softpag"], **asked).untouched.pictures
    else:
        drawn = reattend.compare(pipe, recipe, **asked).before.pictures
    # shown are four of the six: 0, 2, 3 and 5
    first, _, second, again = (bytes(picture.tobytes()) for picture in drawn)
    pixels = [picture.tobytes() for picture in alone(pipe, [5, 6], 2)]
    assert [first, again] == pixels, "those of the source prompt, each drawn by itself from its own seed"
    assert second not in pixels


def alone(pipe, seeds, steps):
    draw = torch.Generator
    return [pipe("a fox", num_inference_steps=steps, generator=draw().manual_seed(seed)).images[0] for seed in seeds]


def test_maps_of_words_are_read_from_pictures_of_the_same_noise(pipe):
    report = reattend.compare(pipe, ("prompt-reweight", EDIT), prompt=["a fox", "a fox"], **SHORT)
    first, second = (report.maps.read("fox", picture) for picture in (0, 1))
    assert torch.allclose(first["before"]["fox"], second["before"]["fox"], atol=1e-5)


def test_without_an_edit_prompts_have_noises_of_their_own(pipe):
    first, second = reattend.compare(pipe, "softpag", prompt=["a fox", "a fox"], **SHORT).before.pictures
    assert first.tobytes() != second.tobytes()


def test_an_edit_across_runs_is_refused_before_anything_runs(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe), "__call__", lambda *_, **__: pytest.fail("ran"))
    for given in (["prompt-reweight"], [["prompt-reweight"]]):
        with pytest.raises(reattend.ReattendError, match="draws every run from the start: give both prompts at once"):
            reattend.compare(pipe, *given, prompt="a fox", edit="replace", source="run")


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(numpy.arange(16 * 16 * 3, dtype=numpy.uint8).reshape(16, 16, 3))


@pytest.fixture(scope="module")
def over_a_picture(pipe):
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    made = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def given_to(report):
    """Whether a recipe, and the pipeline, got the picture."""
    return [item["parameters"]["image"] is not None for item in report.recipes], bool(report.inputs)


@pytest.mark.parametrize("as_pair", [False, True])
def test_a_picture_that_the_pipeline_does_not_take_is_the_recipes(pipe, picture, tmp_path, as_pair):
    own = dict(words=["fox", "map"], timestep=100, cross_resolution=4, self_resolution=8)
    asked = dict(prompt="a fox and a map", **SHORT)
    if as_pair:
        report = reattend.compare(pipe, ("attencraft", own), image=picture, **asked)
    else:
        picture.save(tmp_path / "pic.png")
        report = reattend.compare(pipe, "attencraft", image=tmp_path / "pic.png", **own, **asked)
    assert given_to(report) == ([True], False)
    (found,) = report.maps.chosen[0].found
    recipe = reattend.recipe("attencraft", image=picture, **own)
    with reattend.apply(pipe, recipe):
        pipe("a fox and a map", num_inference_steps=2)
    assert torch.equal(recipe.found[0].maps, found.maps)


def test_a_picture_to_begin_with_is_an_erasers(pipe, picture):
    report = reattend.compare(pipe, "attentive-eraser", image=picture, invert=True, prompt="", **ERASER, **SHORT)
    assert given_to(report) == ([True], False) and not report.metrics["identical"]
    variants = [("attentive-eraser", {"scale": 3.0}), ("attentive-eraser", {"scale": 9.0}), "softpag"]
    report = reattend.compare(pipe, variants, image=picture, invert=True, boxes=ERASER["boxes"], prompt="", **SHORT)
    assert [column.label for column in report.columns] == [
        "attentive-eraser(scale=3.0)",
        "attentive-eraser(scale=9.0)",
        "softpag",
    ]


@pytest.mark.parametrize(
    "recipe, told, both",
    [
        ("attentive-eraser", ERASER, True),
        (("attentive-eraser", ERASER), {}, False),
        (reattend.recipe("attentive-eraser", **ERASER), {}, False),
    ],
    ids=["named", "pair", "object"],
)
def test_a_picture_that_both_take(over_a_picture, picture, recipe, told, both):
    report = reattend.compare(over_a_picture, recipe, image=picture, prompt="", **told, num_inference_steps=4, attention=False)
    assert given_to(report) == ([both], True)


def test_a_picture_that_nobody_takes_is_refused(pipe, picture):
    for recipe in ("softpag", reattend.recipe("attentive-eraser", **ERASER)):
        with pytest.raises(
            reattend.ReattendError, match="takes no 'image' .a picture for a recipe is a parameter of the recipe's"
        ):
            reattend.compare(pipe, recipe, image=picture, prompt="", **SHORT)


def test_a_page_and_a_terminal_say_that_a_recipe_only_reads(pipe, tmp_path):
    own = dict(words=["fox"], cross_resolution=4, self_resolution=8)
    report = reattend.compare(pipe, ("attencraft", own), prompt="a fox", **SHORT)
    several = reattend.compare(pipe, [("attencraft", own), "softpag"], prompt="a fox", **SHORT)
    for each in (report, several):
        assert "reads and changes nothing" in Path(each.html(tmp_path / "page.html")).read_text()
        console = Console(width=400)
        with console.capture() as said:
            console.print(each)
        assert said.get().count("reads and changes nothing") == 1 and "never acted" not in said.get()
    assert len(several.columns[0].notes) == 1 and several.columns[1].notes == []


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_3"])
def test_a_missing_prompt_is_named(kind, several):
    pipe = getattr(tiny_pipelines, kind)()
    given = [["softpag"]] if several else ["softpag"]
    with pytest.raises(reattend.ReattendError, match=f"^{type(pipe).__name__} draws what a prompt says: give prompt"):
        reattend.compare(pipe, *given, **SHORT)
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs") as error:
        reattend.compare(pipe, *given, prompt="a fox", callback_on_step_end_tensor_inputs=["x"], **SHORT)
    assert not isinstance(error.value, reattend.ReattendError), "what else a pipeline refuses it says itself"


def test_without_a_prompt_embeddings_are_one(pipe):
    report = reattend.compare(pipe, "softpag", prompt_embeds=torch.zeros(1, 64, 16), guidance_scale=1.0, **SHORT)
    assert report.request["prompt"] is None


def test_several_words_in_one_text_are_told_to_be_a_list(pipe):
    for words, said in (
        ("circle, square", r": several words are a list of them, \[circle, square\]$"),
        ("circle, map", "square'$"),
    ):
        with pytest.raises(reattend.ReattendError, match=f"'{words}' is not in prompt 0, .*{said}"):
            reattend.compare(pipe, "attencraft", words=words, prompt="a circle and a square", **SHORT)
