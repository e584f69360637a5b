"""The command line on files and places that are not as they should be: one line that names what is wrong, status 2, nothing overwritten."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from reattend import __main__ as command_line
from reattend.command_line import console
from text_pipelines import image_pipe, llama, text_pipe, tokenizer  # noqa: F401
from typer.testing import CliRunner

RECIPE = ["-r", "streaming", "--set", "sinks=1", "--set", "window=3"]
PROMPT = ["-t", "the red dog sat on a big house", "--max-new-tokens", "2"]


@pytest.fixture
def call(monkeypatch, tmp_path):
    monkeypatch.setitem(console.state, "debug", False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "wide").write_bytes("hello".encode("utf-16"))
    (tmp_path / "wide.yaml").write_bytes("name: streaming".encode("utf-16"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n123")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("[]")

    def run(*arguments: str):
        return CliRunner().invoke(command_line.app, list(arguments))

    return run


@pytest.fixture
def saved(text_pipe, tmp_path):  # noqa: F811
    text_pipe.model.save_pretrained(tmp_path / "model")
    text_pipe.tokenizer.save_pretrained(tmp_path / "model")
    return "model"


def one_line_error(result) -> str:
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    lines = [line for line in result.stderr.strip().splitlines() if "%|" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["run", "nowhere", *RECIPE, "-t", "@binary"], "text file: 'binary' is not UTF-8 text"),
        (["run", "nowhere", *RECIPE, "-t", "@wide"], "it looks like UTF-16"),
        (["run", "nowhere", *RECIPE, "-t", "@folder"], "'folder' is a folder"),
        (["analyse", "nowhere", "-f", "binary"], "'binary' is not UTF-8 text"),
        (["run", "nowhere", "-r", "wide.yaml", *PROMPT], "recipe file: 'wide.yaml' is not UTF-8 text"),
        (["run", "nowhere", *RECIPE, "-i", "broken.png"], "picture: 'broken.png' cannot be read as a picture"),
        (["run", "nowhere", *RECIPE, "-i", "folder"], "picture: 'folder' is a folder"),
        (["compare", "nowhere", *RECIPE, *PROMPT, "--seed", "9" * 30], "--seed must be a whole number"),
        (["compare", "nowhere", *RECIPE, *PROMPT, "--html", "folder"], "--html: 'folder' is a folder"),
        (["compare", "nowhere", *RECIPE, *PROMPT, "--html", "file"], "--html: 'file' exists already; name another file, or"),
        (["compare", "nowhere", *RECIPE, *PROMPT, "--html", "file/x.html"], "'file' is a file, so nothing can be written"),
        (["profile", "act", "nowhere", "--out", "file"], "--out: 'file' exists already; name another file, or overwrite it with --force"),
        (["run", "nowhere", *RECIPE, *PROMPT, "--device", "magic"], "--device 'magic' cannot be used here"),
        (["run", "broken", *RECIPE, *PROMPT], "cannot load 'broken'"),
        (["sites", "broken"], "names neither a transformer nor a unet"),
    ],
)  # fmt: skip
def test_bad_files_and_places(call, arguments, words):
    assert words in one_line_error(call(*arguments))


def test_places_of_an_evaluation(call, saved):
    options = ["eval", "-m", saved, "-s", "highlight", "-n", "1", "--resamples", "5"]
    assert "out: 'file' is a file" in one_line_error(call(*options, "--out", "file"))


def test_a_picture_goes_into_a_folder_that_is_there_and_not_over_another(call, image_pipe, tmp_path, monkeypatch):  # noqa: F811
    from reattend.comparison import loading

    monkeypatch.setattr(loading, "load", lambda *_, **__: image_pipe)
    options = ["run", "pipe", "-r", "softpag", "-t", "the red dog", "--steps", "1", "-o"]
    assert "--out: there is no folder 'new'; make it first" in one_line_error(call(*options, "new/x.png"))
    assert "--out: 'x' names no kind of picture" in one_line_error(call(*options, "x"))
    (tmp_path / "x.png").write_bytes(b"mine")
    assert "--out: 'x.png' exists already" in one_line_error(call(*options, "x.png"))
    assert (tmp_path / "x.png").read_bytes() == b"mine"
    result = call(*options, "x.png", "--force")
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "x.png").size[0] > 0


def test_a_report_is_overwritten_with_force(call, saved, tmp_path):
    options = ["compare", saved, *RECIPE, *PROMPT, "--html", "new/report.html"]
    assert call(*options).exit_code == 0
    before = (tmp_path / "new" / "report.html").read_bytes()
    assert "'new/report.html' exists already" in one_line_error(call(*options))
    assert (tmp_path / "new" / "report.html").read_bytes() == before
    assert call(*options, "--force").exit_code == 0


def test_results_of_other_settings_are_kept(call, saved, tmp_path):
    options = ["eval", "-m", saved, "-s", "highlight", "-n", "2", "--resamples", "5", "--out", "out", "--json"]
    assert call(*options).exit_code == 0
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    again = call(*options)
    assert again.exit_code == 0 and "earlier results" not in again.stderr
    assert [file.name for file in (tmp_path / "out").glob("results*")] == ["results.json"]
    other = call(*options, "--seed", "1")
    assert other.exit_code == 0 and "earlier results, of other settings:" in other.stderr
    (kept,) = (tmp_path / "out").glob("results.*.json")
    assert (
        json.loads(kept.read_text())["seed"] == 0
        and json.loads(kept.read_text())["cells"][0]["metrics"] == first["cells"][0]["metrics"]
    )
    assert json.loads((tmp_path / "out" / "results.json").read_text())["seed"] == 1
