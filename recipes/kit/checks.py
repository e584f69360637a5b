"""Arguments of public functions: of the kind that is meant, or one ReattendError that names the argument and what would be right."""

from __future__ import annotations

import math
import reprlib
from typing import Any

from ...interventions import ReattendError

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 100
_repr.maxlong = 40


def shown(value: Any) -> str:
    """A value as it was given, cut short where it is long."""
    return _repr.repr(value)


def whole_number(value: Any, what: str, least: int | None = None) -> int:
    """The value, if it is an integer that fits into 64 bits and is at least so large."""
    plain = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if not plain or (least is not None and value < least):
        raise ReattendError(
            f"{what} must be a whole number{'' if least is None else f' of at least {least}'}, got {shown(value)}"
        )
    return value


def number(value: Any, what: str) -> float:
    """The value, if it is a number and not NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (isinstance(value, int) and abs(value) >= 2**63):
        raise ReattendError(f"{what} must be a number, got {shown(value)}")
    if math.isnan(value):
        raise ReattendError(f"{what} must be a number, got NaN")
    return value


def truth(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise ReattendError(f"{what} must be True or False, got {shown(value)}")
    return value


def text(value: Any, what: str) -> str:
    """The value, if it is a text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise ReattendError(f"{what} must be a text, got {shown(value)}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ReattendError(f"{what} holds half of a letter (a lone surrogate), which no tokenizer reads: decode it as UTF-8")
    return value


def tokenizer(value: Any) -> Any:
    """The value, if it can be a tokenizer or processor, or is None."""
    if value is not None and (isinstance(value, type) or not callable(value) or not hasattr(value, "decode")):
        raise ReattendError(f"tokenizer must be the model's tokenizer or processor, got {shown(value)}")
    return value
