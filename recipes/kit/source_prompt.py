"""An edited prompt's picture drawn with the attention of a source prompt's, of the same batch or of the session's first run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ...hooks import Share, Shared, SiteTable, Words
from ...hooks.tokens.words import Text
from ...interventions import Call, Clock, ReattendError, TakeWeights
from .denoisers import reads_prompt
from .prompt_edits import Tokens, mapping

Read = Mapping[int, Sequence[Text]]


@dataclass(eq=False)
class SourcePrompt:
    """kind: how columns of the two prompts belong together. words: the step that reads them, in the same plan. across, within: whether
    attention to the text, and among image tokens, is taken at a time; places: the largest self-attention of a UNet that is, in keys.
    pictures: per prompt."""

    slug: str
    kind: Literal["replace", "refine"]
    of: Literal["batch", "run"]
    words: Words
    across: Callable[[Clock], bool]
    within: Callable[[Clock], bool]
    places: int
    pictures: int = 1
    aligned: bool = False
    # in a session whose first run is the source: what was read there, and in the runs since, the last one last
    source: Read | None = None
    _runs: list[Read] = field(default_factory=list)
    _now: tuple[Clock, Tensor | None] | None = None

    def step(self, sites: SiteTable) -> Share:
        """Hands the source's queries and keys to the edited rows at these sites."""
        rows, part = (self._of_prompt, "") if self.of == "batch" else (None, "conditional")
        return Share(sites, self.take, of=self.of, keep=("query", "key"), rows=rows, part=part, at=self.acts, label=self.slug)

    def acts(self, call: Call) -> bool:
        """Whether anything is taken at a call."""
        if not (self._text(call) or self._image(call)):
            return False
        if self.of == "run":
            rows = call.clock.rows("conditional", call.batch)
            if rows is None or not bool(rows.any()):
                return False  # the unconditional half, in a call of its own
            self._note(call)
            return True
        return self.edited(call) is not None

    def edited(self, call: Call) -> Tensor | None:
        """Bool [B]: the prompt's rows that are not the source's, copies of them in guides' branches too; None without any."""
        if self._now is None or self._now[0] is not call.clock:
            self._now = (call.clock, self._edited(call))
        return self._now[1]

    def _edited(self, call: Call) -> Tensor | None:
        rows = call.clock.rows("conditional", call.batch)
        if rows is None or not bool(rows.any()):
            return None
        if self.of == "run":
            return rows if self.source is not None else None
        place = torch.arange(call.batch, device=rows.device)
        origin = place if call.clock.source is None else call.clock.source.to(rows.device)
        first = (rows & (origin == place)).nonzero()[: self.pictures, 0]
        return rows & ~torch.isin(origin, first)

    def take(self, call: Call, shared: Shared) -> TakeWeights | None:
        assert shared.query is not None and shared.key is not None
        if self.of == "run" and self.source is None:
            self.source, self._now = self._runs[-2], None
        chosen = self.edited(call)
        if chosen is None:
            return None
        if (shared.query.shape[2], shared.key.shape[2]) != (call.num_queries, call.num_keys):
            raise ReattendError(
                f"{self.slug}: the source run had pictures or a text of another size than this one: give both runs the same height, width and "
                "length of text"
            )
        rows = chosen.to(call.query.device)[:, None]
        if call.site is not None and call.site.kind == "joint":
            rows = rows & call.query_rows("image")
        given: dict[str, Any] = {"query": shared.query, "key": shared.key, "rows": rows, "mask": self._mask(call, shared)}
        if call.site is None or call.site.kind == "self":
            return TakeWeights(columns=torch.arange(0, device=call.query.device), others=True, **given)
        columns, others = self._columns(call), call.site.kind == "joint" and self._image(call)
        if not self._text(call):
            none = torch.zeros(1, len(columns), len(columns), device=columns.device)
            return TakeWeights(columns=columns, transfer=none, own=none[:, 0] + 1, others=others, **given)
        transfer, own = self._mapping(call, shared, chosen, len(columns))
        return TakeWeights(columns=columns, transfer=transfer, own=own, others=others, **given)

    # -- when and where ------------------------------------------------------------------------------------------------

    def _text(self, call: Call) -> bool:
        kind = "" if call.site is None else call.site.kind
        return kind in ("cross", "joint") and self.across(call.clock) and reads_prompt(call)

    def _image(self, call: Call) -> bool:
        kind = "" if call.site is None else call.site.kind
        return (kind == "joint" or (kind == "self" and call.num_keys <= self.places)) and self.within(call.clock)

    def _of_prompt(self, count: int) -> list[int]:
        if count % self.pictures or count == self.pictures:
            raise ReattendError(
                f"{self.slug}: an edit takes the attention of the first of several prompts, each with {self.pictures} picture(s), and this "
                f"batch has {count} picture(s): give the pipeline [source, edited prompt, ...], and pictures=num_images_per_prompt"
            )
        return [place % self.pictures for place in range(count)]

    def _note(self, call: Call) -> None:
        """Which run this is, and what it reads."""
        if self.of == "batch" or self in call.memory:
            return
        call.memory[self] = True
        self._runs = [*self._runs[-1:], call.memory[self.words]]

    # -- which column goes where ---------------------------------------------------------------------------------------

    def _columns(self, call: Call) -> Tensor:
        """Long [m]: the columns of the text, padding too, which every row has at the same places."""
        if call.site is None or call.site.kind == "cross":
            return torch.arange(call.num_keys, device=call.query.device)
        text = call.columns("text") | call.columns("padding")
        if bool((text != text[:1]).any()):
            raise ReattendError(f"{self.slug}: the rows of the batch have their text at different places: draw them one by one")
        return text[0].nonzero()[:, 0]

    def _mask(self, call: Call, shared: Shared) -> Tensor | None:
        if call.mask is None or call.mask.shape[0] == 1:
            return call.mask
        if shared.rows is None:
            raise ReattendError(
                f"{self.slug}: this model hides padding of its text, which is not kept from run to run: give both prompts in one batch"
            )
        return call.mask[shared.rows.to(call.mask.device)]

    def _mapping(self, call: Call, shared: Shared, chosen: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """(transfer [B, m, m], own [B, m]) of each edited row; nothing of others counts."""
        read: Read = call.memory[self.words]
        sources = None if shared.rows is None else tuple(shared.rows.tolist())
        key = ("mapping", id(read), sources, width, call.query.device)
        if key not in call.memory:
            transfer, own = torch.eye(width).repeat(call.batch, 1, 1), torch.zeros(call.batch, width)
            for row in chosen.nonzero()[:, 0].tolist():
                theirs = self._source_of(row, read, sources)
                if row not in read or theirs is None:
                    raise ReattendError(f"{self.slug}: what row {row} of the batch reads, or its source, is not known")
                source, target = ([(text.stream.encoder, Tokens.of(text)) for text in texts] for texts in (theirs, read[row]))
                whose = f"prompt {read[row][0].shown()!r}"
                transfer[row], own[row] = mapping(self.kind, source, target, width, self.aligned, whose)
            call.memory[key] = (transfer.to(call.query.device), own.to(call.query.device))
        return call.memory[key]

    def _source_of(self, row: int, read: Read, sources: Sequence[int] | None) -> Sequence[Text] | None:
        if sources is not None:
            return read.get(sources[row])
        assert self.source is not None
        return self.source.get(row) or (next(iter(self.source.values())) if len(self.source) == 1 else None)
