"""`Call`: its stores are made for those who ask, and what it is given is checked."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from reattend.interventions import Call, Memory, ReattendError


def call(**more) -> Call:
    x = torch.zeros(1, 2, 3, 4)
    return Call(x, x, x, **more)


def test_stores_are_made_when_they_are_asked_for():
    one, other = call(), call()
    assert not {"memory", "attended", "edits", "then"} & vars(one).keys(), "every layer of every step makes a call"
    assert one.looks == () and "then" not in vars(one)
    one.then.append(print)
    one.memory["a"] = 1
    assert list(one.looks) == [print] and isinstance(one.memory, Memory) and one.memory == {"a": 1}
    assert other.then == [] and other.memory == {} and other.attended == {} and other.edits == []


def test_a_copy_keeps_what_it_holds():
    one = call(scale=0.5, number=3)
    one.memory["a"] = 1
    other = dataclasses.replace(one, query=one.query + 1)
    assert (other.scale, other.number, other.memory) == (0.5, 3, {"a": 1}) and other.key is one.key


def test_a_field_that_there_is_not():
    with pytest.raises(TypeError, match="softcaps"):
        call(softcaps=3.0)
    with pytest.raises(AttributeError, match="softcaps"):
        call().softcaps  # noqa: B018


def test_one_row_is_not_causal_and_a_mask_has_four_axes():
    x = torch.zeros(1, 2, 1, 4)
    assert call(is_causal=True).is_causal and not Call(x, x, x, is_causal=True).is_causal
    with pytest.raises(ReattendError, match="4 dimensions"):
        call(mask=torch.ones(3, 3, dtype=torch.bool))
