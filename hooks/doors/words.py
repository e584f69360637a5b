"""The words door: which text columns of a denoiser hold which words of the prompt (how: `tokens`).

Gives: roles of the token map at every site whose keys hold the text, for conditional rows, those of guides among them: `name`, all
words that were asked for, and `name.0`, `name.1`, ... one for each; with them "start", "words" and "end": the start token, the tokens of the
prompt itself and the end token, of every text encoder. A column belongs to the token whose state it holds, bit for bit, whatever a pipeline
makes of its encoders' states: several encoders, cut templates, long prompts in chunks, several prompts and pictures, and prompts that were
encoded by hand while the session lasts. Words whose columns were weighted are told by the columns around them.

Costs: eight channels of every state of the last 32 text encodings are kept on the CPU; eight channels of the text go there in every pass, and
each new text is compared with them (two rows of 77 columns 10 ms, one of 512 15 ms, on one busy CPU thread).

Refuses: a denoiser alone and pipelines without text encoders, unless columns are given; one name for different words; before the first
denoiser call words that are not in a prompt, or more than once where no occurrence is named, texts that came from no encoding seen by this
session (prompt_embeds made before it: give columns, or encode them within), two encoders that share columns and hold the word at different
ones, and rows of which it is not known whether they are conditional.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...interventions import ReattendError
from ..actions import Action, Rank, RootCall
from ..handles import Handles, Holder
from ..host import Host
from ..plan import Facts, Plan, Step
from ..sites.discovery import original_of
from ..tokens.denoisers import DenoiserForward
from ..tokens.marks import Marks
from ..tokens.pass_text import ENCODE_WITHIN, PassText
from ..tokens.text_columns import Stream
from ..tokens.text_encodings import TextEncodings, text_encoders
from ..tokens.words import Occurrence, Text, Word, columns_of, texts_read

TEXTS = 8
# of every prompt, whoever asks; and what else the tokens of a denoiser are called
OF_A_PROMPT = ("start", "words", "end")
TAKEN = (*OF_A_PROMPT, "image", "text", "padding", "reference", "register", "frame")


@dataclass(eq=False)
class Words(Step):
    """Words of a denoiser's prompt: `name` and `name.0`, `name.1`, ... become roles of the TokenMap.

    words: for every prompt a list of words or passages (one inner list = the same for every prompt), each a text or (text, occurrence);
    whole words, in any case of letters. columns: or for every prompt a list of column lists, one for each word, counted from 0 in the
    text that the denoiser gets. Neither: "start", "words" and "end" alone. occurrence: which one when a word occurs more than once
    (from 0, -1 = the last, "all"; None: that is an error). needed: whether a word that is not in its prompt, or after what its encoders
    read of it, is an error; else its role has no columns. called: what users have given one of, or one per prompt. hint: said beside
    a word that is not there. Whoever reads or edits
    in the same plan finds what the encoders wrote in `call.memory[step]`: {conditional row of the denoiser's batch: a `Text` per encoder},
    with the ids of its tokens and their columns.
    Raises ReattendError for the name of a role that there is, an empty word, lists that name nothing, both words and columns, or a negative
    column.
    """

    name: str
    words: Sequence[Sequence[Word]] | None = None
    columns: list[list[list[int]]] | None = None
    occurrence: Occurrence = None
    needed: bool = True
    called: str = ""
    hint: str = ""

    def __post_init__(self) -> None:
        if not self.name or self.name in TAKEN:
            raise ReattendError(f"words need a name of their own, other than {', '.join(TAKEN)}, got {self.name!r:.80}")
        if self.words is not None and self.columns is not None:
            raise ReattendError("give words or columns, not both")
        for given, what in ((self.words, "words"), (self.columns, "columns")):
            if given is not None and not (isinstance(given, (list, tuple)) and any(given) and all(map(_listed, given))):
                raise ReattendError(
                    f"{what} must hold a list for every prompt, or one for all, that names something, got {given!r:.80}"
                )
        for word in (w for row in self.words or () for w in row):
            text = word[0] if isinstance(word, tuple) else word
            if not isinstance(text, str) or not text.strip() or any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ReattendError(
                    f"a word to find in the prompt must be a text that is not empty, of whole letters (UTF-8), got {word!r:.80}"
                )
        for columns in (c for row in self.columns or () for c in row):
            if not _listed(columns) or not columns or not all(isinstance(column, int) and column >= 0 for column in columns):
                raise ReattendError(f"columns of a word must be numbers from 0 on, one or more, got {columns!r:.80}")
        if self.occurrence not in (None, "all") and not isinstance(self.occurrence, int):
            raise ReattendError(f'occurrence must be a number, "all" or None, got {self.occurrence!r:.80}')

    def check(self, facts: Facts) -> str:
        if not facts.denoisers:
            return "its step Words finds words of a denoiser's prompt, and this model has no denoiser: Spans serves models that read tokens"
        if self.columns is None and not text_encoders(facts.model):
            name = type(original_of(facts.model)).__name__
            return f"its step Words reads the prompt with text encoders and their tokenizers, and {name} has none: give columns"
        return ""

    def beside(self, plan: Plan, others: Sequence[tuple[Plan, Step]]) -> str:
        for _, other in others:
            if not isinstance(other, Words) or other is self or vars(other) == vars(self):
                continue
            both = next((role for role in self.roles if role in other.roles and role not in OF_A_PROMPT), None)
            if both is not None:
                return f"two steps mark different words of the prompt as {both!r}: give each a name of its own"
        return ""

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        reader = _Reader(self, plan, {} if self.columns is not None else text_encoders(session.model))
        handles = session.handles()
        reader.encodings.listen(handles)
        handles.act(Action(Rank.FACTS, before=reader.mark, certain=f"the words of {plan.recipe!r}"))
        return handles

    @property
    def roles(self) -> list[str]:
        """All roles that it makes."""
        given: Sequence[Sequence[Any]] = self.words or self.columns or []
        each = [f"{self.name}.{number}" for number in range(max(map(len, given), default=0))]
        return [*([self.name] if given else []), *each, *(OF_A_PROMPT if self.columns is None else [])]


def _listed(value: Any) -> bool:
    return isinstance(value, (list, tuple, range))


class _Reader:
    """What a pipeline's text encoders gave while a session lasts, and the words in the texts that came of it."""

    def __init__(self, step: Words, plan: Plan, encoders: dict[str, tuple[nn.Module, Any]]) -> None:
        self.step, self.plan = step, plan
        self.encodings = TextEncodings(encoders)
        self.known: OrderedDict[Any, Marks] = OrderedDict()

    # -- what a denoiser gets ------------------------------------------------------------------------------------------

    def mark(self, call: RootCall) -> None:
        """Tells the facts of a pass which columns of its text these are, before its first layer."""
        assert isinstance(call.forward, DenoiserForward)
        try:
            marks = self._marks(PassText.of(call, list(self.encodings.encoded)))
        except ReattendError as error:
            raise ReattendError(f"{self.plan.recipe}: {error}") from None
        call.forward.marks.append(marks)
        call.forward.memory(self.plan.memory_key)[self.step] = marks.texts

    def _marks(self, text: PassText) -> Marks:
        if text.key not in self.known:
            self.known[text.key] = self._read(text)
            if len(self.known) > TEXTS:
                self.known.popitem(last=False)
        return self.known[text.key]

    def _read(self, text: PassText) -> Marks:
        """The roles of the conditional rows of a pass's text, and what was read there."""
        step, own = self.step, text.own
        given: Sequence[Any] = step.columns or step.words or []
        marks = {role: torch.zeros(text.rows, text.width, dtype=torch.bool) for role in step.roles}
        streams: dict[int, list[Stream]] = {}
        read: dict[int, Sequence[Text]] = {}
        if step.columns is None:
            streams = {row: text.read(row * text.frames, self.encodings.tokenizers) for row in text.conditional}
        for row in text.conditional:
            number, copy = own.index(text.source[row]), row not in own
            if streams and not streams[row] or (copy and step.columns is not None and not text.copied(row)):
                if copy:
                    continue  # a guide with a text of its own
                raise ReattendError(
                    f"the text of prompt {number} came from no text encoder while this session looked: {ENCODE_WITHIN}"
                )
            named, first = (
                _of_prompt(given, number, len(own), step.called or f"lists of {'columns' if step.columns else 'words'}")
                if given
                else ((), number)
            )
            found: dict[str, Sequence[int]] = {}
            each: list[set[int]] = []
            if step.columns is not None:
                each = [set(columns) for columns in named]
            else:
                texts = read[row] = texts_read(streams[row], self.encodings.tokenizers)
                for role in OF_A_PROMPT:
                    found[role] = sorted(set().union(*(getattr(one, role) for one in texts)))
                if named and not copy and _ids(streams[own[first]]) != _ids(streams[row]):
                    raise ReattendError(
                        f"{len(given)} lists of words for {len(own)} rows of other prompts than that: give one list per prompt"
                    )
                try:
                    others = list(dict.fromkeys(str(_ids(streams[row])) for row in own[: number + 1]))
                    prompt = others.index(str(_ids(streams[own[number]])))
                    each = [columns_of(word, step.occurrence, texts, prompt, step.needed, step.hint) for word in named or ()]
                except ReattendError as error:
                    if copy:
                        continue
                    raise ReattendError(f"{error}{text.unread(row * text.frames, streams[row])}") from None
            strange = sorted(column for columns in each for column in columns if column >= text.width)
            if strange:
                raise ReattendError(f"columns {strange} of a text that has {text.width} columns, counted from 0")
            found |= {f"{step.name}.{index}": sorted(columns) for index, columns in enumerate(each)}
            if given:
                found[step.name] = sorted(set().union(*each))
            for role, columns in found.items():
                marks[role][row * text.frames : (row + 1) * text.frames, columns] = True
        return Marks(marks, read)


def _of_prompt(given: Sequence[Any], number: int, count: int, what: str) -> tuple[Any, int]:
    """(what belongs to the `number`th of `count` rows, the first row of the same prompt): prompts come as often as there are pictures."""
    times, rest = divmod(count, len(given))
    if rest:
        raise ReattendError(f"{len(given)} {what} for {count} conditional rows: give one per prompt, or one for all")
    index = number // times
    return given[index], number if len(given) == 1 else index * times


def _ids(streams: list[Stream]) -> list[tuple[str, list[int]]]:
    return [(stream.encoder, stream.ids) for stream in streams]
