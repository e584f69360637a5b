"""`reattend compare` with several variants: what the words mean, one report, and words that cannot be."""

from __future__ import annotations

import json

import pytest
import tiny_pipelines
from PIL import Image
from reattend import recipe
from reattend.comparison.arguments import recipes_of, variants_of
from text_pipelines import llama, text_pipe, tokenizer  # noqa: F401

PROMPT = "the red dog sat on a big house and the small cat ran in the garden"
TEXT = ["--text", PROMPT, "--max-new-tokens", "4"]


def test_words():
    window = recipe("streaming", window=3, sinks=1)
    assert variants_of(["streaming:window=3:sinks=1", "streaming:window=5"], ["sinks=1"]) == [
        [window],
        [recipe("streaming", window=5, sinks=1)],
    ]
    assert variants_of(["streaming+act"], ["streaming.window=3", "streaming.sinks=1"])[0][0] == window
    found = variants_of(["emphasise", "instaboost:text=b"], ["text=a", "emphasise.alpha=0.1"])
    assert [[r.as_dict() for r in v] for v in found] == [
        [recipe("emphasise", text="a", alpha=0.1).as_dict()],
        [recipe("instaboost", text="b").as_dict()],
    ]
    assert recipes_of(["streaming:window=3:sinks=1"], []) == [window], "run and analyse read the same words"


def test_sweep_words():
    found = variants_of(["emphasise"], ["text=a"], ["alpha=0.5,0.3"])
    assert [v[0].alpha for v in found] == [0.5, 0.3]
    found = variants_of(["softpag:strength=1"], [], ["layers=[7],[8, 9]"])
    assert [v[0].layers for v in found] == [[7], [8, 9]]
    found = variants_of(["streaming+instaboost:text=a"], [], ["instaboost.multiplier=2,3"])
    assert [(v[0].slug, v[1].multiplier) for v in found] == [("streaming", 2), ("streaming", 3)]


def test_several_recipes_are_one_report(call, saved, tmp_path):
    page = tmp_path / "report.html"
    words = ["-r", "streaming:window=3", "-r", "streaming:window=5+instaboost:text=red dog", "--set", "streaming.sinks=1"]
    result = call("compare", saved, *words, *TEXT, "--json", "--html", str(page))
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [v["label"] for v in data["variants"]] == ["streaming(window=3)", "streaming(window=5) + instaboost"]
    assert data["untouched"]["tokens"] and all(v["edits_applied"] for v in data["variants"])
    assert "A+B lets recipes act together" in result.stderr
    assert page.read_text().startswith("<!doctype html>")
    shown = call("compare", saved, *words, *TEXT)
    assert "untouched" in shown.stdout and "streaming(window=5) + instaboost" in shown.stdout


def test_one_recipe_that_composes_stays_one_comparison(call, saved):
    words = ["-r", "streaming:window=3+instaboost:text=red dog", "--set", "streaming.sinks=1"]
    data = json.loads(call("compare", saved, *words, *TEXT, "--json").stdout)
    assert [r["name"] for r in data["recipes"]] == ["streaming", "instaboost"] and "before" in data


def test_a_sweep(call, saved):
    result = call("compare", saved, "-r", "emphasise", "--set", "text=red dog", "--sweep", "alpha=0.5,0.1", *TEXT, "--json")
    data = json.loads(result.stdout)
    assert [v["differing"] for v in data["variants"]] == [{"alpha": 0.5}, {"alpha": 0.1}]
    assert "variants, each beside" not in result.stderr, "said where recipes could be meant to act together"


def test_pictures_as_png(call, tmp_path, monkeypatch):
    from reattend.comparison import loading

    monkeypatch.setattr(loading, "load", lambda *_, **__: tiny_pipelines.stable_diffusion())
    grid = tmp_path / "grid.png"
    words = ["-r", "softpag", "--set", "layers=[0]", "--sweep", "scale=1,20", "-t", "a dog", "--steps", "2", "--png", str(grid)]
    result = call("compare", "pipe", *words)
    assert result.exit_code == 0, result.output
    assert f"pictures: {grid}" in result.stdout.replace("\n", "") and Image.open(grid).width > 3 * 160
    again = call("compare", "pipe", *words)
    assert again.exit_code == 2 and "--force" in again.stderr


@pytest.mark.parametrize(
    "words, problem",
    [
        (["-r", "streaming", "-r", "none"], "--recipe none: the untouched model always runs too"),
        (["-r", "streaming", "-r", "streaming:windw=3"], "windw is not a parameter of 'streaming'"),
        (["-r", "streaming", "-r", "act", "--set", "window=3"], "write name.key=value, the name one of: streaming, act"),
        (["-r", "streaming", "--set", "act.heads=all"], "write name.key=value"),
        (
            ["-r", "csg", "--set", "boxes.circle=[0, 0, .5, 1]"],
            "boxes is one parameter, which is written whole, as --set 'boxes={\"circle\": [0, 0, 0.5, 1]}'",
        ),
        (["-r", "csg", "-r", "softpag", "--set", "csg.boxes.a.b=1"], "as --set 'csg.boxes={\"a.b\": 1}'"),
        (["-r", "softpag", "--set", "layers=1,2"], "in brackets, as 'layers=[1, 2]'"),
        (["-r", "streaming", "-r", "act", "--sweep", "window=3,4"], "--sweep stands once, beside one --recipe"),
        (["-r", "streaming", "--sweep", "window=3", "--sweep", "sinks=1"], "--sweep stands once"),
        (["-r", "streaming", "--sweep", "window"], "--sweep takes key=value,value,..."),
        (["-r", "streaming", "--sweep", "window= , "], "--sweep takes key=value,value,..."),
        (["-r", "streaming", "--sweep", "window=3,0"], "window"),
        (["-r", "streaming:window=3", "--sweep", "window=3,4"], "--sweep window: window is already set to 3"),
        (["-r", "streaming+act", "--sweep", "window=3,4"], "write name.window=..."),
        (["-r", "streaming", "--sweep", "window=3", "--png", "x.jpg"], "--png: 'x.jpg' must end in .png"),
    ],
)
def test_words_that_cannot_be(call, words, problem):
    result = call("compare", "nowhere", *words, *TEXT)
    assert result.exit_code == 2 and result.stdout == "", result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and problem in line


def test_the_same_variant_twice(call, saved):
    result = call("compare", saved, "-r", "streaming", "--sweep", "window=3,3", *TEXT)
    assert result.exit_code == 2 and "variants 1 and 2 are the same" in result.stderr


def test_texts_make_no_png(call, saved, tmp_path):
    result = call("compare", saved, "-r", "streaming", "--sweep", "window=3,4", *TEXT, "--png", str(tmp_path / "x.png"))
    assert result.exit_code == 2 and "--png draws pictures" in result.stderr
