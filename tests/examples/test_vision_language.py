"""The vision-language example runs offline, with known sink dimensions and with a profile."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "vision_language.py"
    spec = importlib.util.spec_from_file_location("vision_language_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_answers_before_and_after(example, capsys):
    *_, moved = example.main(["--model", "tiny", "--tokens", "12"])
    assert moved > 0.005
    said = capsys.readouterr().out
    assert "VAR acted" in said and "in 2 layers" in said


def test_move_zero_is_the_model_itself(example):
    import reattend

    with pytest.warns(reattend.ReattendWarning, match="never acted"):
        before, after, moved = example.main(["--model", "tiny", "--tokens", "6", "--move", "0"])
    assert before == after and moved == 0


def test_profile_is_made_once_and_used(example, tmp_path, capsys):
    path = tmp_path / "sinks.safetensors"
    first = example.main(["--model", "tiny", "--tokens", "6", "--profile", str(path)])
    made = path.stat().st_mtime_ns
    assert example.main(["--model", "tiny", "--tokens", "6", "--profile", str(path)]) == first
    assert path.stat().st_mtime_ns == made
    assert "VAR acted" in capsys.readouterr().out
