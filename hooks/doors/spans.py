"""The spans door: token sets of the user's, found in every prompt (how: `tokens`).

Gives: roles of the token map by name: passages of a prompt, the question in it, or numbered segments; whoever reads `call.columns(name)` then
has their columns, per batch row, through padding, chunks, turns and caches.

Costs: one search per prompt, on the CPU; nothing at decode.

Refuses: models that read no tokens, empty passages and ranges, one name for different passages, and (before the first layer) passages
that do not occur in a prompt or occur more than once where no occurrence is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ...interventions import ReattendError, TokenMap
from ..handles import Handles, Holder
from ..host import Host
from ..plan import Facts, Plan, Step
from ..tokens.question import add_question
from ..tokens.segments import add_segments
from ..tokens.spans import add_spans
from ..tokens.transcript import Transcript


@dataclass
class Spans(Step):
    """A token set of the user's: `name` becomes a role of the TokenMap.

    texts: for every prompt a list of passages to find in it (one inner list = the same for every prompt). ranges: or token
    ranges [start, stop) per prompt, counted without padding. occurrence: which match when a passage occurs more than once
    (from 0, -1 = the last; None: that is an error). official: instead of strict overlap the rule of PASTA (True) or of SEKA ("inside").
    Raises ReattendError for an empty passage or range.
    """

    name: str
    texts: list[list[str]] | None = None
    ranges: list[list[tuple[int, int]]] | None = None
    occurrence: int | None = None
    official: bool | Literal["inside"] = False

    def __post_init__(self) -> None:
        if not self.texts and not self.ranges:
            raise ReattendError("spans need texts (passages to find in the prompt) or ranges (token positions)")
        for text in (t for row in self.texts or () for t in row):
            if not isinstance(text, str) or not text:
                raise ReattendError(f"a passage to find in the prompt must be a text that is not empty, got {text!r}")
        for start, stop in (r for row in self.ranges or () for r in row):
            if not 0 <= start < stop:
                raise ReattendError(f"a range of tokens must have 0 <= start < stop, got ({start}, {stop})")

    def check(self, facts: Facts) -> str:
        return facts.without_tokens(f"its step {type(self).__name__} finds passages of a prompt")

    def beside(self, plan: Plan, others: Sequence[tuple[Plan, Step]]) -> str:
        if any(isinstance(other, Spans) and other.name == self.name and other != self for _, other in others):
            return f"two steps mark different passages of the prompt as {self.name!r}: give each a name of its own"
        return ""

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        handles = session.handles()
        handles.mark(self)
        return handles

    def mark(self, tokens: TokenMap, ids: Tensor | None, given: Any, read: Callable[[], list[Transcript] | None]) -> None:
        """Adds its roles to the map of a prompt. given: the session's tokenizer or processor; read: see `add_spans`."""
        add_spans(tokens, ids, self, read)


@dataclass
class Question(Spans):
    """The user's question as two roles: `name`, all of its tokens, and `name-words`, those of its words that matter.

    It is the last turn of the user as the chat template marks it (a prompt without any turn marker is all the user's), or the
    passages that texts or ranges name. Image tokens, special tokens and the white space around them never belong to it.
    words(text) -> [start, stop) of the words that matter; None: all. Where there are none of them, the whole question counts; so it
    does without a tokenizer to read the text, unless must_read says that this is an error.
    """

    words: Callable[[str], list[tuple[int, int]]] | None = None
    must_read: bool = False

    def __post_init__(self) -> None:
        if self.texts is not None or self.ranges is not None:
            super().__post_init__()

    def mark(self, tokens: TokenMap, ids: Tensor | None, given: Any, read: Callable[[], list[Transcript] | None]) -> None:
        add_question(tokens, ids, self, given, read)


@dataclass
class Segments(Spans):
    """The passages of each prompt as numbered roles in the order of the prompt: `name.0`, `name.1`, ...

    Passages may be given in any order; equal ones stand in the prompt as often as in the list. Tokens between two passages have to be
    the same everywhere ("\\n- " before each, or "\\n" after each): they then count as part of every passage, also of the first
    or the last. A prompt needs a token before its first segment and one after its last.
    """

    def mark(self, tokens: TokenMap, ids: Tensor | None, given: Any, read: Callable[[], list[Transcript] | None]) -> None:
        add_segments(tokens, ids, self, read)
