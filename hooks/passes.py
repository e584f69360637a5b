"""Facts of the pass under way: its arguments, its tokens and where it stands, and what is known of its sequence.

Trackers fill them in; routes and doors read them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..interventions import Call, Clock, Memory, Site, TokenMap
from ..interventions.call import OUTSIDE as OUTSIDE
from .protocols import Steered
from .tokens.encoders import EncoderPass
from .tokens.merging import MergedTokens
from .trackers.caches import has_buffers

# Roles that are absent where no token has them.
OPTIONAL = ("image", "video", "system", "user", "assistant")


class Enough(Exception):
    """Ends a probe pass whose last reader has read. Never leaves the probe door."""


class Running:
    """A pass of a door's own under way in one thread: the session that it runs under, and what is still to be read (None: no end).

    forwards: its facts, and those of passes inside it.
    """

    def __init__(self, session: Steered, pending: set[tuple[int, int]] | None = None) -> None:
        self.session, self.pending = session, pending
        self.forwards: list[Forward] = []

    def ended(self, output: Any) -> None:
        """The pass is over; output: None where it stopped before. What backward computes of it anew (gradient checkpointing) goes on."""
        self.pending = None
        for forward in self.forwards:
            forward.end(output)

    def read(self, step: object, module: nn.Module) -> None:
        """Notes that a step has read a site; raises Enough after the last one."""
        if self.pending is not None:
            self.pending.discard((id(step), id(module)))
            if not self.pending:
                raise Enough


@dataclass(eq=False)
class Sequence:
    """What is known of one batch of sequences: its tokens and their roles, how long it is, and what interventions remember."""

    tokens: TokenMap
    # ids [B, n] of all positions, pass by pass; -1 where they are not known
    pieces: list[Tensor]
    # the sessions whose passages have been looked for in it
    sessions: list[Steered] = field(default_factory=list)
    # the sessions of the last pass
    current: list[Steered] = field(default_factory=list)
    step: int = -1
    memory: dict[object, Memory] = field(default_factory=dict)
    # the call of generate that read it last, and how many tokens there were before it
    call: object = None
    began: int = 0
    # how long its prompt is going to be, where that is known of one that comes in chunks
    planned: int = 0
    asked: set[int] = field(default_factory=set)
    # its rows change places (beams): the ids that were generated do not stay in their rows
    shuffled: bool = False
    # how many rows generate has made of each prompt (beams, several answers): they stand side by side
    copies: int = 1
    # [batch]: rows that have the same prompt have the same number; looked up when rows first change places
    groups: Tensor | None = None

    def read(self, ids: Tensor | None, width: int) -> None:
        """Notes the tokens of a further pass."""
        if ids is None or self.shuffled:
            ids = torch.full((self.tokens.batch, width), -1)
        self.pieces.append(ids)

    def ids(self, length: int, device: torch.device | str) -> Tensor:
        """[B, length] long: the ids of its first positions; -1 where they are not known."""
        whole = torch.cat([piece.to(device) for piece in self.pieces], dim=1)
        self.pieces = [whole]
        return torch.nn.functional.pad(whole, (0, max(0, length - whole.shape[1])), value=-1)[:, :length]

    def reached(self, length: int) -> None:
        """Sees to it that `length` positions are known, no more and no less: a cache was cut, or grew while no session looked."""
        known = sum(piece.shape[1] for piece in self.pieces)
        while known > length:
            last = self.pieces.pop()
            known -= last.shape[1]
            if known < length:
                self.pieces.append(last[:, : length - known])
                known = length
        if known < length:
            self.pieces.append(torch.full((self.tokens.batch, length - known), -1))

    def moved_to(self, length: int) -> None:
        """Its cache has another length than after the last pass: it was cut, or a pass ran that no session saw."""
        tokens = self.tokens
        if length < tokens.length:
            self.crop(length)
            return
        self.reached(length)
        tokens.unread += length - tokens.length
        tokens.length = length

    def crop(self, length: int) -> None:
        """What is left when its cache was cut to the first `length` tokens."""
        self.reached(length)
        tokens = self.tokens
        tokens.length = length
        if length >= tokens.prompt_length:
            for store in self.memory.values():
                store.take_back(length)
            return
        tokens.prompt_length, self.groups = length, None
        tokens.unread = min(tokens.unread, length)
        self.planned = 0
        tokens.roles = {role: marked[:, :length] for role, marked in tokens.roles.items()}
        for role in OPTIONAL:
            if role in tokens.roles and not bool(tokens.roles[role].any()):
                del tokens.roles[role]
        tokens.grids = [grid for grid in tokens.grids if int(grid.index.max()) < length]
        self.step = -1
        for store in self.memory.values():
            store.crop(length)

    def fork(self, length: int) -> Sequence:
        """The same for a copy of its cache, as far as that reaches: the two go on apart."""
        tokens = copy.copy(self.tokens)
        tokens.roles, tokens.grids = dict(tokens.roles), list(tokens.grids)
        memory = {key: store.fork({id(self.tokens): tokens}) for key, store in self.memory.items()}
        other = Sequence(tokens, list(self.pieces), list(self.sessions), step=self.step, memory=memory, copies=self.copies)
        other.shuffled = self.shuffled
        if length < tokens.length:
            other.crop(length)
        return other

    @property
    def remembers(self) -> bool:
        """Whether anybody has learned anything of it."""
        return any(self.memory.values())

    def move(self, index: Tensor) -> None:
        """Its cache's rows come from these rows [new batch] now: beams that change places, rows that are selected or repeated."""
        tokens, before = self.tokens, self.tokens.batch
        groups = self.groups
        if groups is None:
            prompt = [self.ids(tokens.prompt_length, "cpu"), *(marked.long().cpu() for marked in tokens.roles.values())]
            groups = torch.cat(prompt, dim=1).unique(dim=0, return_inverse=True)[1]
        self.groups = groups[index]
        alike = torch.equal(self.groups, groups)
        self.pieces = [piece[index.to(piece.device)] for piece in self.pieces]
        if not alike:
            tokens.move(index)
        for store in self.memory.values():
            store.move(index, before, alike, tokens.length)


@dataclass
class Forward:
    """The forward pass under way in this thread."""

    clock: Clock
    tokens: TokenMap | None = None
    sequence: Sequence | None = None
    encoder_tokens: TokenMap | None = None
    # fresh: this pass starts its sequence. probe: it is read by a probe's steps and edited by nobody
    fresh: bool = False
    probe: Running | None = None
    # the tokens of an encoder-decoder model are its decoder's; what its encoder reads may be no tokens at all
    two_sided: bool = False
    # tokens of the sequence that came before this pass
    past: int = 0
    # where the model put the tokens of this pass, as far as somebody has to know (see `positions`)
    positions: Tensor | None = None
    # this part of a prompt follows on another one with no generated token between them (chunked prefill, or a cached beginning)
    pieces: bool = False
    # numbers of the sessions whose steps were asked whether they can serve this prompt or run
    asked: set[int] = field(default_factory=set)
    # what the model was given to keep keys in; None where it makes one itself, which grows
    cache: Any = None
    loose_memory: dict[object, Memory] = field(default_factory=dict)
    # what steps keep of it until it is over, by their identity, and what is to be done then with its output
    kept: dict[int, Any] = field(default_factory=dict)
    endings: list[Callable[[Any], None]] = field(default_factory=list)
    # the pass of an encoder that is under way inside this one, or that this one is
    encoder: EncoderPass | None = None
    # by name of a site: the tokens that its module runs on just now, where a door has merged them for it alone
    merged: dict[str, MergedTokens] = field(default_factory=dict)
    # the last mask that calls were given, and what was left of it: layers share both
    last_masks: tuple[Tensor, Tensor] | None = None
    # the RoPE of its calls, by what it is made of: layers share it
    rotaries: dict[Any, Any] = field(default_factory=dict)

    def share_mask(self, call: Call, given: Tensor) -> None:
        """Gives a call the very tensor that the last layer's call was left with, where that was cut out of the same mask to the same size."""
        assert call.mask is not None
        last = self.last_masks
        if last is not None and last[0] is given and last[1].shape == call.mask.shape:
            call.mask = last[1]
        elif call.mask is not given:
            self.last_masks = given, call.mask

    @property
    def answers(self) -> bool:
        """Whether it holds none of the prompt's tokens: a step of decoding after a cache. Without one a step holds the whole text."""
        return self.clock.phase == "decode" and self.past > 0

    def end(self, output: Any) -> None:
        """The pass is over. output: what its root gave; None where it stopped before."""
        while self.endings:
            self.endings.pop(0)(output)

    def as_it_is(self) -> Forward:
        """The same for a part of the pass that is computed anew later: nothing that is remembered from now on shows in it."""
        other = copy.copy(self)
        other.kept, other.endings = dict(self.kept), []
        other.loose_memory = {key: store.fork({}) for key, store in self.loose_memory.items()}
        if self.sequence is not None:
            other.sequence = self.sequence.fork(self.sequence.tokens.length)
            other.tokens = other.sequence.tokens if self.tokens is self.sequence.tokens else self.tokens
        return other

    def locate(self, call: Call, site: Site) -> None:
        """Fills in the clock and the tokens of a call at a site: those of the keys, and of the queries where these are others.

        None where they are frames of sound, or those of an encoder whose pass is not followed.
        """
        call.clock, call.tokens, call.query_tokens = self.clock, None, None
        if site.stack == "decoder" and self.encoder is None:  # in every step of decoding
            call.tokens = self.tokens if site.kind == "self" else None
            return
        stack = site.stack.partition(".")[0]
        if self.encoder is not None and self.encoder.stack == stack:
            call.tokens, call.query_tokens = self.encoder.maps_at(site, call)
        elif site.kind == "self":
            if stack == "encoder":
                call.tokens = self.encoder_tokens or (None if self.two_sided else self.tokens)
            elif stack == "decoder":
                call.tokens = self.tokens

    def merged_at(self, site: Site) -> MergedTokens | None:
        """The tokens that a site runs on, where a door has merged them."""
        of_encoder = self.encoder is not None and self.encoder.stack == site.stack
        return self.merged.get(site.name) or (self.encoder.merged if of_encoder and self.encoder is not None else None)

    def locate_merged(self, call: Call, site: Site) -> None:
        """Fills in the tokens of a module that a door runs on others than the rest of the model."""
        merged = self.merged.get(site.name)
        if merged is not None and (merged.tokens.batch, merged.tokens.length) == (call.batch, call.num_queries):
            if site.kind == "cross":
                call.query_tokens = merged.tokens
            else:
                call.tokens, call.query_tokens = merged.tokens, None

    def tokens_of(self, states: Tensor, site: Site) -> TokenMap | None:
        """The tokens of what enters a site's layer or comes out of its projections, [B, ..., T, width]."""
        if site.stack == "decoder" and site.kind == "self":
            return self.tokens  # in every step of decoding: without a tensor
        row = states.new_empty(states.shape[0], 1, states.shape[-2], 0)
        call = Call(row, row, row, site=site)
        self.locate(call, site)
        return call.tokens

    @functools.cached_property
    def buffered(self) -> bool:
        """Whether keys come in buffers that may be longer than the sequence."""
        return has_buffers(self.cache)

    def memory(self, key: object) -> Memory:
        """The store of one plan for this sequence."""
        stores = self.loose_memory if self.sequence is None else self.sequence.memory
        store = stores.get(key)
        if store is None:
            store = stores[key] = Memory(since=self.past)
        store.at = self.tokens.length if self.tokens is not None and self.clock.phase == "decode" else 0
        return store
