"""benchmarks/gpu.py where there is no GPU: its code runs to the end on the CPU, says what is wrong, and keeps what it had."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_edits
import gpu_models
import pytest
import reattend
import torch
from gpu_parts import Part
from gpu_targets import targets
from reattend.interventions import fused
from tiny_language import language_model

SCRIPT = Path(gpu_edits.__file__).with_name("gpu.py")


def started(folder: Path, *arguments: str) -> subprocess.Popen:
    # not resolved: what lies beside a checkout is no package of ours
    paths = [str(Path(reattend.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def part(folder: Path, seconds: float = 60.0) -> Part:
    return Part("Title", folder / "part.json", time.monotonic() + seconds, torch.device("cpu"), True)


@pytest.mark.slow
def test_every_section_of_a_dry_run(tmp_path):
    run = started(tmp_path, "--dry-run", "--seconds", "50")
    page, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    kept = (tmp_path / "gpu-dry-run.md").read_text(encoding="utf-8")
    for text in (page, kept):
        for title in (
            "Machine",
            "Correctness of edits",
            "Correctness of recipes",
            "One call",
            "eager Python",
            "compiled",
            "key lengths",
        ):
            assert f"{title}" in text
        assert "failed" not in text and "ended" not in text and "| NO |" not in text
        assert "## Targets" in text and "missed" not in text


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="measures where there is one")
def test_without_a_gpu_it_says_so(tmp_path):
    run = started(tmp_path)
    page, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and "no GPU" in page and "|" not in page and not list(tmp_path.iterdir())


def test_a_wrong_edit_is_named_and_a_failure_is_a_row(tmp_path, monkeypatch):
    def off(call, edits):
        if type(edits[0]).__name__ == "HeadGain":
            raise RuntimeError("too | many\nlines")
        return fused(call, edits) * (1.5 if type(edits[0]).__name__ == "MixValue" else 1.0)

    monkeypatch.setattr(gpu_edits, "fused", off)
    names = ("head gain", "mix value", "gain")
    some = [case for case in gpu_edits.cases() if case[0] in names][:9]
    monkeypatch.setattr(gpu_edits, "cases", lambda: iter(some))
    page = part(tmp_path)
    page.dry = False
    gpu_edits.measure(page)
    text = page.markdown()
    assert "3 of 9 are right" in text and "mix value" in text and "RuntimeError: too / many |" in text
    assert page.figures == {"edits right": 3, "edits tried": 9}


def test_all_conditions_are_met_and_every_edit_comes_early():
    every = list(gpu_edits.cases())
    names = {name for name, _, _ in every}
    first = every[: 3 * len(names)]
    assert {name for name, _, _ in first} == names and len(set(every)) == len(every)
    assert {condition.dim for _, _, condition in first} == {64, 80, 128, 256}


def test_rows_that_fail_or_are_not_reached(tmp_path):
    page = part(tmp_path, -1.0)
    table = page.table("A table", ["one"])

    def broken():
        raise ValueError("no")

    assert not page.attempt(table, "row", broken) and not page.reached("another row")
    text = page.markdown()
    assert "| row | failed: ValueError: no |" in text and "Not reached in the time of this section: another row." in text
    assert text.replace("\n", "\\n") in page.file.read_text(encoding="utf-8")


def test_a_twin_shares_weights_and_leaves_the_model_untouched():
    model = language_model("Llama")
    own = gpu_models.twin(model)
    assert all(a is b for a, b in zip(model.parameters(), own.parameters(), strict=True))
    inputs = gpu_models.prompt(model, 2, 32)
    with torch.no_grad():
        before = model(**inputs).logits
        with reattend.apply(own, "instaboost", ranges=[(8, 12)], multiplier=20):
            assert torch.equal(model(**inputs).logits, before) and not torch.equal(own(**inputs).logits, before)


def test_targets_say_met_missed_or_not_measured():
    figures = {
        "call, prefill, 4096, transfer of 3 columns": 1.10,
        "call, prefill, 16384, transfer of 3 columns": 1.10,
        "model, prefill 4k, act, all heads": 1.2,
        "aim, model, prefill 4k, act, all heads": 1.3,
        "edits right": 3,
        "edits tried": 4,
    }
    text = targets(figures)
    assert "prefill at 4k: transfer of 3 columns | 1.15 | 1.10 | met |" in text
    assert "prefill at 16k: transfer of 3 columns | 1.05 | 1.10 | **missed** |" in text
    assert "prefill 4k: act, all heads | 1.30 | 1.20 | met |" in text
    assert "edits that are right | all | 3 of 4 | **missed** |" in text
    assert "recipes that are right | all | not measured |" in text
    assert "**missed**" not in targets({**figures, "edits right": 4}, dry=True)
