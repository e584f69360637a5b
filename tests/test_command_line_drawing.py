"""How `reattend run` and `compare` draw: steps, guidance and canvas as told, and a model of the zoo as its card says."""

from __future__ import annotations

import json

import pytest
import tiny_pipelines
from PIL import Image
from reattend.zoo.loading import MODELS, meant
from reattend.zoo.train.cards import CARDS
from text_pipelines import llama, text_pipe, tokenizer  # noqa: F401

DRAW = ["-r", "softpag:layers=[0]", "-t", "a red circle"]


@pytest.fixture
def tiny(monkeypatch):
    """A pipeline whose calls are noted."""
    from reattend.comparison import loading

    pipe, calls = tiny_pipelines.stable_diffusion(), []

    class Noted(type(pipe)):
        def __call__(self, prompt=None, height=None, width=None, num_inference_steps=50, guidance_scale=7.5, **more):
            calls.append((num_inference_steps, guidance_scale, height, width))
            told = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
            return super().__call__(prompt, height=height, width=width, **told, **more)

    pipe.__class__ = Noted
    monkeypatch.setattr(loading, "load", lambda *_, **__: pipe)
    return calls


def test_steps_guidance_and_canvas_as_told(call, tiny, tmp_path):
    out = tmp_path / "x.png"
    told = ["--steps", "2", "--guidance", "0", "--height", "16", "--width", "32"]
    result = call("run", "pipe", *DRAW, *told, "-o", str(out))
    assert result.exit_code == 0, result.output
    assert tiny == [(2, 0.0, 16, 32)] and Image.open(out).size == (32, 16)
    tiny.clear()
    result = call("compare", "pipe", "-r", "softpag:layers=[0]", "--sweep", "scale=1,20", "-t", "a dog", *told, "--json")
    assert result.exit_code == 0, result.output
    assert {one[1:] for one in tiny} == {(0.0, 16, 32)} and len(tiny) >= 3, "the untouched run and both variants"


def test_what_is_not_told_is_the_pipelines_own(call, tiny, tmp_path):
    result = call("run", "pipe", *DRAW, "--steps", "1", "-o", str(tmp_path / "x.png"))
    assert result.exit_code == 0, result.output
    assert tiny == [(1, 7.5, None, None)]


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--guidance", "nan"], "--guidance must be a number of at least 0, got nan"),
        (["--guidance", "inf"], "--guidance must be a number of at least 0, got inf"),
        (["--guidance", "-1"], "--guidance must be a number of at least 0, got -1"),
        (["--height", "-8"], "--height"),
    ],
)
def test_what_cannot_be_drawn(call, tiny, tmp_path, words, problem):
    result = call("run", "pipe", *DRAW, *words, "-o", str(tmp_path / "x.png"))
    assert result.exit_code == 2 and problem in result.stderr and "Traceback" not in result.stderr


def test_a_language_model_draws_nothing(call, text_pipe, tmp_path):  # noqa: F811
    saved = str(tmp_path / "llama")
    text_pipe.save_pretrained(saved)
    result = call("run", saved, "-r", "streaming", "-t", "the dog", "--guidance", "1")
    assert result.exit_code == 2
    assert f"--guidance is for models that draw pictures, and {saved} draws none" in result.stderr.replace("\n", " ")


def test_a_model_of_the_zoo_is_drawn_as_its_card_says(call):
    words = ["compare", "zoo:shapes-turbo", "-r", "vsf:negative=star", "-t", "a red circle and a green star", "--json"]
    result = call(*words)
    assert result.exit_code == 0, result.output
    own = {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert own.items() <= json.loads(result.stdout)["request"]["settings"].items()
    result = call(*words, "--steps", "2", "--guidance", "3")
    told = {"num_inference_steps": 2, "guidance_scale": 3.0}
    assert told.items() <= json.loads(result.stdout)["request"]["settings"].items()


def test_other_pipelines_are_left_as_they_are():
    assert meant(tiny_pipelines.stable_diffusion()) == {}
    for name, card in CARDS.items():
        model = MODELS[name]
        assert (model.steps, model.guidance) in ((None, None), (card.steps, card.guidance)), name


def test_an_empty_prompt_is_one_and_none_is_an_error(call, tiny, tmp_path):
    eraser = ["-r", "attentive-eraser:boxes=[0, 0, .5, .5]", "--steps", "2"]
    result = call("run", "pipe", *eraser, "--prompt", "", "-o", str(tmp_path / "x.png"))
    assert result.exit_code == 0 and (tmp_path / "x.png").is_file(), result.output
    result = call("compare", "pipe", *eraser, "--prompt", "", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["request"]["prompt"] == "", result.output
    for command in ("run", "compare"):
        result = call(command, "pipe", *eraser)
        assert result.exit_code == 2 and "give an input with --text (or --prompt)" in result.stderr


def test_an_empty_text_is_none_to_a_language_model(call, text_pipe, monkeypatch):  # noqa: F811
    from reattend.comparison import loading

    monkeypatch.setattr(loading, "load", lambda *_, **__: text_pipe)
    result = call("run", "model", "-r", "streaming", "-t", "")
    assert result.exit_code == 2 and "give an input with --text (or --prompt)" in result.stderr


def test_a_prompt_for_each_picture(call, tiny, text_pipe, tmp_path, monkeypatch):  # noqa: F811
    drawn = ["-r", "softpag:layers=[0]", "--steps", "1", "-t", "a dog", "-t", "a fox"]
    result = call("run", "pipe", *drawn, "-o", str(tmp_path / "x.png"))
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["x-0.png", "x-1.png"]
    result = call("compare", "pipe", *drawn, "--json")
    assert json.loads(result.stdout)["before"]["pictures"] == 2

    from reattend.comparison import loading

    monkeypatch.setattr(loading, "load", lambda *_, **__: text_pipe)
    result = call("run", "model", "-r", "streaming", "-t", "a dog", "-t", "a fox")
    assert result.exit_code == 2 and "--text (or --prompt) stands once: model reads one text" in result.stderr


def test_a_method_that_reads_says_where_its_result_is(call, tiny, tmp_path):
    words = [
        "--set",
        'words=["dog"]',
        "--set",
        "cross_resolution=4",
        "--set",
        "self_resolution=8",
        "--steps",
        "2",
        "-t",
        "a dog",
    ]
    result = call("run", "pipe", "-r", "attencraft", *words, "-o", str(tmp_path / "x.png"))
    assert result.exit_code == 0 and result.stderr.count("what it found is on the recipe: recipe.found") == 1, result.output
    result = call("compare", "pipe", "-r", "attencraft", *words)
    assert result.exit_code == 0 and "recipe.found" in result.stdout, result.output


def test_a_source_and_its_edit_from_the_command_line(call, tmp_path, monkeypatch):
    from reattend.comparison import loading

    monkeypatch.setattr(loading, "load", lambda *_, **__: tiny_pipelines.stable_diffusion())
    drawn = ["-r", "prompt-reweight:edit=replace", "--steps", "2", "-t", "a dog", "-t", "a dog"]
    result = call("run", "pipe", *drawn, "-o", str(tmp_path / "x.png"))
    assert result.exit_code == 0, result.output
    source, edited = (Image.open(tmp_path / f"x-{number}.png") for number in (0, 1))
    assert source.tobytes() == edited.tobytes()
    for command in ("run", "compare"):
        result = call(command, "pipe", *drawn[2:], "-r", "prompt-reweight:edit=replace:source=run")
        assert result.exit_code == 2 and "draws every run from the start" in result.stderr
