"""perplexity: passages of the prose, one text of contexts of several lengths, losses as a forward pass gives them."""

from __future__ import annotations

import math

import pytest
import torch
from reattend import ReattendError
from reattend.evaluation import suite
from reattend.evaluation.material import prose
from suite_checks import ask, check_items, subject


def test_the_prose_is_prose_and_the_same_every_time() -> None:
    assert len(prose.paragraphs()) > 200 and len(prose.text()) > 80_000
    assert not any(mark in prose.text() for mark in (">>>", "::=", "+--", "\t"))
    assert all(p == " ".join(p.split()) and p.endswith(".") for p in prose.paragraphs())
    sentences, again = prose.sentences(3), prose.sentences(3)
    drawn = [next(sentences) for _ in range(5)]
    assert drawn == [next(again) for _ in range(5)] and drawn != [s for s, _ in zip(prose.sentences(4), range(5))]
    assert len(prose.digest()) == 12


def test_passages_lie_apart_and_begin_at_words() -> None:
    asked = suite("perplexity", lengths=(8, 32), passage=100)
    items = check_items(asked, 20)
    spans = [(item.data["start"], item.data["stop"]) for item in items]
    assert all(stop <= start for (_, stop), (start, _) in zip(spans, spans[1:]))
    for start, stop in spans:
        assert 100 <= stop - start < 140 and prose.text()[start] == " "
    context, passage = asked.rows(subject().tokenizer, items[3])
    assert len(context) == 32
    text = subject().tokenizer.decode(context + passage)
    start, stop = spans[3]
    assert prose.text()[:stop].endswith(text[-120:]) and text.endswith(prose.text()[start:stop])


def test_losses_are_those_of_the_passage_after_each_context() -> None:
    asked = suite("perplexity", lengths=(8, 32), passage=60)
    items = asked.items(3, 0)
    for item, record in zip(items, ask(asked, items)):
        view = subject()
        context, passage = asked.rows(view.tokenizer, item)
        for length in (8, 32):
            ids = context[-length:] + passage
            with torch.no_grad():
                logits = view.module(input_ids=torch.tensor([ids])).logits[0, length - 1 : -1]
            wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(passage), reduction="sum")
            assert record["loss"][str(length)] == pytest.approx(float(wanted), rel=1e-4)
        assert record["tokens"] == len(passage)
        assert record["bytes"] == len(prose.text()[item.data["start"] : item.data["stop"]].encode())
    ask(asked, items, [("streaming", {"window": 8})])


def test_metrics_and_their_direction() -> None:
    asked = suite("perplexity", lengths=(8,))
    scores = asked.score([{"tokens": 2, "bytes": 8, "loss": {"8": 3.0}}, {"tokens": 2, "bytes": 8, "loss": {"8": 1.0}}])
    assert scores == pytest.approx({"perplexity_8": math.e, "bits_per_byte_8": 0.25 / math.log(2)})
    assert set(asked.lower) == set(scores)


def test_bad_lengths_are_refused() -> None:
    with pytest.raises(ReattendError, match="lengths"):
        suite("perplexity", lengths=(8, 8))
    with pytest.raises(ReattendError, match="too few"):
        suite("perplexity", lengths=(100_000,)).items(2, 0)
