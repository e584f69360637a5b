"""The example for evaluation, on a tiny model: its own suite goes through the runner, and the recipe marks the note it is told."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from tiny_language import language_model, tokenizer
from transformers import pipeline

EXAMPLE = Path(__file__).parents[2] / "examples" / "evaluation.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("evaluation_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_suite_runs_plain_and_with_the_note_marked(example, tmp_path, capsys):
    pipe = pipeline("text-generation", model=language_model(), tokenizer=tokenizer(), device="cpu")
    result = example.main(["--count", "5", "--out", str(tmp_path)], model=pipe)
    assert [cell.recipe for cell in result.cells] == ["none", "emphasise", "emphasise(alpha=0.1)"]
    assert [cell.applied > 0 for cell in result.cells] == [False, True, True]
    said = [[record["said"] for record in cell.records] for cell in result.cells]
    assert said[0] != said[2] and all(len(these) == 5 for these in said)
    assert "second" in capsys.readouterr().out and (tmp_path / "results.json").is_file()


def test_its_metrics(example):
    records = [
        {"said": " Rome.", "first": "Oslo", "second": "Rome"},
        {"said": " Oslo", "first": "Oslo", "second": "Lima"},
        {"said": " Paris", "first": "Oslo", "second": "Lima"},
    ]
    assert example.Notes().score(records) == {"second": pytest.approx(1 / 3), "first": pytest.approx(1 / 3)}
