"""word-tasks: pairs that no profile learns from, demonstrations from the others, and what counts as right."""

from __future__ import annotations

import pytest
import tiny_language
from reattend import ReattendError
from reattend.evaluation import suite
from reattend.recipes import recipe_class
from reattend.recipes.profiling.material.word_pairs import parted
from suite_checks import ask, check_items, subject


def test_questions_are_held_out_and_demonstrations_are_not() -> None:
    learned, held = parted("capital")
    items = check_items(suite("word-tasks", task="capital", shots=5))
    for item in items:
        assert (item.data["input"], item.data["output"]) in held
        assert len(item.data["shown"]) == 5 and all(tuple(pair) in learned for pair in item.data["shown"])
    # the same questions with and without demonstrations
    assert [i.data["input"] for i in suite("word-tasks", task="capital").items(12, 0)] == [i.data["input"] for i in items]
    with pytest.raises(ReattendError, match="28 pairs"):
        suite("word-tasks", task="capital").items(29, 0)
    with pytest.raises(ReattendError, match="task must be one of"):
        suite("word-tasks", task="rhyme")


def test_what_counts_as_right() -> None:
    record = {"input": "hot", "wanted": "cold"}
    said = ["Cold.", "cold", "hot", "It is cold", ""]
    scores = suite("word-tasks").score([{**record, "said": text} for text in said])
    assert scores == {"accuracy": 0.4, "answers_input": 0.2}


def test_a_model_is_asked_under_task_embeddings(tmp_path) -> None:
    asked, name = suite("word-tasks"), "soft-injection"
    items = check_items(asked)[:5]
    assert all(set(record) == {"input", "wanted", "said"} for record in ask(asked, items))
    model = subject().module
    profile = recipe_class(name).profile(model, tiny_language.tokenizer(), prompts=3, shots=2, how="even")
    ask(asked, items, [(name, {"profile_path": str(profile.save(tmp_path / "p.safetensors"))})])
