"""The user's question as token roles: the last turn without template, image and wrapper tokens; passages; words that matter."""

from __future__ import annotations

import re

import pytest
import torch
from asked_images import ASSISTANT, HOW, NEWLINE, USER, WHAT, tiny_models, tokenizer, turn
from reattend.hooks import Question
from reattend.hooks.tokens.question import special_ids
from reattend.hooks.tokens.roles import add_text_roles
from reattend.interventions import ReattendError, TokenMap


class Speaks:
    """As much of a session as the roles of a prompt need."""

    def __init__(self, given, *spans):
        self.tokenizer, self.spans = given, spans


def roles(rows, step, given):
    """(question, words) as lists of positions per row; rows are padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    tokens = TokenMap(len(rows), width, width, {"padding": ids == 0, "image": ids == tiny_models.IMAGE})
    add_text_roles(tokens, ids, [Speaks(given, step)])
    return [[r.nonzero()[:, 0].tolist() for r in tokens.roles[name]] for name in (step.name, f"{step.name}-words")]


def long_words(text):
    return [m.span() for m in re.finditer(r"\w{3,}", text)]


IMAGE = [94, *[tiny_models.IMAGE] * 4, 95]


def test_the_last_turn_of_each_row():
    """Rows of several turns and of one; wrappers and image tokens inside the turn are left out."""
    several = [1, *turn(*HOW, *IMAGE, 8), 30, 31, *turn(*IMAGE, *WHAT)]
    one = [1, *turn(*IMAGE, *HOW)]
    asked, words = roles([several, one], Question("q"), tokenizer())
    width = len(several)
    assert asked == [list(range(width - 8, width - 1)), list(range(width - 5, width - 1))] == words
    assert several[width - 8 : width - 1] == WHAT


def test_text_on_both_sides_of_an_image_and_white_space():
    lines = tokenizer()
    asked, words = roles([[1, *turn(*HOW, *IMAGE, 8, 9)]], Question("q", words=long_words), lines)
    assert asked == [[2, 3, 4, 5, 12, 13]]
    assert words == [[2, 3, 4, 12, 13]], "the question mark is no word"


def test_a_prompt_without_turn_markers_is_all_the_users():
    row = [1, *IMAGE, *WHAT]
    for template in (None, tokenizer().chat_template):
        asked, _ = roles([row, [1, *HOW]], Question("q"), tokenizer(template))
        assert asked == [list(range(7, 14)), list(range(10, 14))]
    marked, plain = roles([[1, *turn(*HOW)], row], Question("q"), tokenizer())[0]
    assert len(marked) == 4 and len(plain) == 7, "row by row"


def test_a_prompt_without_a_user_asks_nothing():
    asked, words = roles([[1, ASSISTANT, 30, 31]], Question("q"), tokenizer())
    assert asked == words == [[]]


def test_words_and_questions_without_any():
    row = [1, *turn(*IMAGE, *WHAT)]
    asked, words = roles([row], Question("q", words=long_words), tokenizer())
    assert [row[i] for i in words[0]] == [5, 7, 8, 9, 11], "what, the, red, dog, doing"
    assert roles([row], Question("q", words=lambda text: []), tokenizer())[1] == asked
    seen = []
    roles([row], Question("q", words=lambda text: seen.append(text) or []), tokenizer())
    assert seen == ["what is the red dog doing ?"], "spans count from the text they are given"


def test_passages_and_ranges():
    rows = [[1, *turn(*IMAGE, *WHAT)], [1, *turn(*HOW, *IMAGE)]]
    asked, _ = roles(rows, Question("q", texts=[["red dog"], ["many cats"]], occurrence=-1), tokenizer())
    assert [[([0] * (len(rows[0]) - len(r)) + r)[i] for i in a] for r, a in zip(rows, asked, strict=True)] == [[8, 9], [13, 14]]
    ranges = Question("q", ranges=[[(1, 10)]], words=long_words)
    assert roles(rows[:1], ranges, tokenizer())[0] == [[1, 8, 9]], "user marker, then the image, then the text"
    assert roles(rows[:1], ranges, None) == [[[1, 2, 7, 8, 9]], [[1, 2, 7, 8, 9]]], "without a tokenizer wrappers are unknown"


def test_what_cannot_be_read():
    row = [[1, *turn(*WHAT)]]
    with pytest.raises(ReattendError, match="tokenizer=processor.*or name its tokens by ranges"):
        roles(row, Question("q"), None)
    with pytest.raises(ReattendError, match="tokenizer=processor"):
        roles(row, Question("q", ranges=[[(1, 3)]], words=long_words, must_read=True), None)
    with pytest.raises(ReattendError, match="0 <= start < stop"):
        Question("q", ranges=[[(3, 3)]])
    tokens = TokenMap(1, 4, 4, {"padding": torch.zeros(1, 4, dtype=torch.bool)})
    with pytest.raises(ReattendError, match="input_ids"):
        add_text_roles(tokens, None, [Speaks(tokenizer(), Question("q"))])


def test_special_ids():
    made = tokenizer()
    special = special_ids(made)
    assert {0, 1, 2, 90, 94, 95} <= special
    assert not {3, USER, ASSISTANT, NEWLINE, 8} & special, "an unknown word is the user's own"
