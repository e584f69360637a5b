"""Passages of the prompt that a user marks: how recipes take them, and the token set they become."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ...hooks import Spans

if TYPE_CHECKING:
    from .base import Recipe

Text = str | list[str] | list[list[str]] | None
Ranges = list[tuple[int, int]] | list[list[tuple[int, int]]] | None

TEXT_HELP = "exactly as in the prompt: one, several in every prompt, or a list of them per prompt"
RANGES_HELP = "token ranges [start, stop) instead, counted from the first real token: for every prompt, or per prompt"
OCCURRENCE_HELP = (
    "which occurrence of a passage, from 0, -1 = the last; None: a passage that occurs twice in a prompt is an error"
)


def per_prompt(text: Text, ranges: Ranges) -> list[list[Any]] | None:
    """Texts or ranges as one list per prompt (a single list goes for every prompt); None where neither names anything."""
    given: Any = [text] if isinstance(text, str) else text if text is not None else ranges
    if not given:
        return None
    return list(given) if isinstance(given[0], list) else [list(given)]


def check_passages(text: Text, ranges: Ranges, what: str) -> None:
    """Raises ValueError unless exactly one of text and ranges names a passage. what: what happens to it, for the message."""
    if text is not None and ranges is not None:
        raise ValueError("give text or ranges, not both")
    if text is None and ranges is None:
        raise ValueError(f"text is required: the passage to {what}, as it stands in the prompt (or ranges of tokens)")
    if not any(per_prompt(text, ranges) or ()):
        raise ValueError("text (or ranges) names no passage")


def marked_role(recipe: Recipe) -> str:
    """A role of its own for every recipe object: two on one model may mark different passages, and one that is begun again has its own."""
    return f"{recipe.slug}-{recipe.serial}"


def passage_spans(
    role: str, text: Text, ranges: Ranges, occurrence: int | None = None, official: bool | Literal["inside"] = False
) -> Spans:
    """The step that makes the passages a role of the prompt's tokens."""
    rows = per_prompt(text, ranges)
    if ranges is not None:
        return Spans(role, ranges=rows, official=official)
    return Spans(role, texts=rows, occurrence=occurrence, official=official)
