"""Knows, for every forward pass of a token model, where it stands: prefill or decode, which step, which tokens.

One forward pre-hook on the whole model reads its arguments; what it learns is kept per sequence (per cache object, so threads that
generate at the same time on one model do not mix), for as long as the cache lives.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...interventions import Clock, ReattendError, TokenMap
from ..actions import RootCall
from ..host import Host
from ..module_hooks import Hooks
from ..passes import OUTSIDE, Forward, Running, Sequence
from ..protocols import Steered
from ..routes.compiled import called_compiled, inside, rest_as_written, run_uncompiled
from ..sites.denoisers import controlnet_in, denoiser_in
from ..sites.discovery import pretrained_root, unwrapped_model
from ..tokens.images import join_images
from ..tokens.roles import add_text_roles, build_roles
from .caches import NAMES, cache_in, cache_of, strange_cache, versions
from .caller import Caller, caller, virtual_tokens
from .known import came_from, is_followed, known_sequence, uncached_sequence, uncountable
from .lengths import Lengths
from .recomputed import parts
from .rows import follow, unfollow


class SequenceTracker:
    """Installed on the outermost pretrained model (or on any other module that is wrapped)."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.handles = Hooks()
        self.by_cache: weakref.WeakKeyDictionary[Any, Sequence] = weakref.WeakKeyDictionary()
        self.lengths = Lengths()
        self.local = threading.local()
        model = unwrapped_model(host.model)
        # a denoiser and a ControlNet have no sequence: another tracker follows them
        followed = isinstance(model, nn.Module) and (denoiser_in(model) or controlnet_in(model)) is None
        self.root = pretrained_root(model) if followed else None
        self.in_flight = host.in_flight

    # -- hooks -------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        if self.root is None or self.handles:
            return
        self.signature = inspect.signature(type(self.root).forward)
        # the names of its arguments, the model itself left out, and those that it takes by position
        own = list(self.signature.parameters.values())[1:]
        self.names = [one.name for one in own]
        self.by_position = [one.name for one in own if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        # the hook that ends passes first: none may begin that cannot end
        # where no step has hooks inside, attention alone is edited, between the graphs of a compiled model
        self.handles.after(self.root, self._leave, compiled=True)
        self.handles.before(self.root, self._enter, kwargs=True, compiled=True)

    def uninstall(self) -> None:
        self.handles.remove()
        self.lengths = Lengths()
        self.local.stack = []
        unfollow(list(self.by_cache))

    def current(self) -> Forward:
        """The forward pass of this thread; outside of one (a vision tower run by `generate` beforehand) an "encode" clock."""
        stack = getattr(self.local, "stack", None)
        return stack[-1] if stack and self.in_flight.here() is not None else Forward(OUTSIDE)

    def under_way(self) -> Forward | None:
        """The forward pass of this thread; None outside of one."""
        stack = getattr(self.local, "stack", None)
        return stack[-1] if stack and self.in_flight.here() is not None else None

    def last(self) -> Forward | None:
        """The forward pass of this thread that began last, where it has not landed; it may have been interrupted."""
        stack = getattr(self.local, "stack", None)
        return stack[-1] if stack else None

    def probing(self) -> Running | None:
        """The pass of a door's own that is under way in this thread."""
        stack = getattr(self.local, "stack", None)
        return stack[-1].probe if stack else None

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict[str, Any]] | None:
        if self.probing() is not None:
            return None
        if getattr(self.local, "look", None) is not None:
            self._look(args, kwargs)
            return None
        # but for those of doors, no forward pass of a model starts inside another one of itself: anything left here was interrupted
        self.local.stack, self.local.call = [], None
        sessions = self.host.begin()
        if not sessions:
            self.lengths = Lengths()  # nobody notes what this pass makes of its cache
            return None
        if (torch.is_grad_enabled() or module.training) and parts():
            raise ReattendError(
                f"{type(module).__name__} is called inside torch.utils.checkpoint, so backward would compute it anew as a whole, which no "
                "session follows: checkpoint its layers instead, as the gradient checkpointing of transformers does"
            )
        call = RootCall(module, args, kwargs, self.names, sessions)

        def read() -> Forward:
            given = self._named(call.args, call.kwargs)
            forward = self._forward(given, sessions)
            self.local.stack.append(forward)
            call.given = given
            return forward

        changed = call.enter(read)
        self._let_hooks_run(sessions)
        if call.actions:
            self.local.call = call
        return changed

    def _let_hooks_run(self, sessions: list[Steered]) -> None:
        """In compiled code no hook runs that was put on after it was made: where this pass has such hooks, it runs as it is written."""
        for session in sessions:
            if session.hooked and called_compiled():
                run_uncompiled(session, "the model", session.hooked)
                rest_as_written()
            elif session.prompt_hooked and not self.current().answers:
                if called_compiled():
                    rest_as_written()
                elif self.root is not None and inside([self.root], steps=False):
                    run_uncompiled(session, "the model", session.prompt_hooked)

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self.probing() is not None:
            return None
        stack, call = getattr(self.local, "stack", None), getattr(self.local, "call", None)
        forward = stack.pop() if stack else None
        cache = cache_of(output)
        if forward is not None and forward.sequence is not None:
            if is_followed(cache):
                self.by_cache[cache] = forward.sequence
            self.local.returned = strange_cache(output) if cache is None and isinstance(output, Mapping) else ""
        self.local.call, changed = None, None
        try:
            if forward is not None and output is not None:
                forward.end(output)
            if call is not None and output is not None:
                changed = call.leave(output)
        except BaseException:
            self.host.land(None)
            raise
        if forward is not None and forward.sequence is not None and forward.sequence.remembers and is_followed(cache):
            follow(cache, forward.sequence)
        if forward is not None and forward.tokens is not None:
            self.lengths.note(cache, forward.tokens.length)
        self.host.land(output)
        return changed

    @contextlib.contextmanager
    def looking(self, running: Running, clock: Clock, memory: dict[Any, Any]) -> Iterator[Forward]:
        """Inside, a pass of the root is read by `running` and edited by nobody; outside of all other passes. memory: by plan."""
        self.local.look = facts = Forward(clock, probe=running, loose_memory=memory)
        with self._offsets_kept():
            try:
                yield facts
            finally:
                begun, self.local.look, self.local.stack = self.local.look is None, None, []
                if begun:
                    self.host.land(None)

    def _look(self, args: tuple, kwargs: dict) -> None:
        """The pass that `looking` waits for begins."""
        forward, self.local.look, self.local.call = self.local.look, None, None
        sessions = self.host.begin()
        given = self._named(args, kwargs)
        ids, embeds, mask = (given.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
        forward.tokens = self._new_map(ids, embeds, mask, given, sessions)
        self.local.stack = [forward]

    @contextlib.contextmanager
    def aside(self, forward: Forward) -> Iterator[None]:
        """Inside, passes of the root are a door's own: `forward` holds their facts, and no action comes before or after them."""
        outer = self.local.stack
        self.local.stack = [forward]
        with self._offsets_kept():
            try:
                yield
            finally:
                self.local.stack = outer

    @contextlib.contextmanager
    def _offsets_kept(self) -> Iterator[None]:
        """Multimodal RoPE keeps its offset on the module: what a pass of a door's own makes of it is taken back."""
        kept = [(m, m.rope_deltas) for m in self.offset_modules]
        try:
            yield
        finally:
            for module, deltas in kept:
                module.rope_deltas = deltas

    @property
    def offset_modules(self) -> list[Any]:
        """Modules that keep the offset of multimodal RoPE from one pass to the next."""
        return self._offset_modules

    @functools.cached_property
    def _offset_modules(self) -> list[Any]:
        return [] if self.root is None else [m for m in self.root.modules() if hasattr(m, "rope_deltas")]

    # -- reading one forward pass --------------------------------------------------------------------------------------

    def _named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the root by name. What does not fit its signature is said by its own forward."""
        if len(args) <= len(self.by_position):
            return {**dict(zip(self.by_position, args, strict=False)), **kwargs}
        given = self.signature.bind_partial(self.root, *args, **kwargs).arguments
        del given[next(iter(self.signature.parameters))]
        return {**given, **given.pop("kwargs", {})}

    def _forward(self, given: dict[str, Any], sessions: list) -> Forward:
        config = getattr(self.root, "config", None)
        encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        ids = given.get("decoder_input_ids" if encoder_decoder else "input_ids")
        embeds = given.get("decoder_inputs_embeds" if encoder_decoder else "inputs_embeds")
        mask = given.get("decoder_attention_mask" if encoder_decoder else "attention_mask")
        encoder_tokens = None
        if encoder_decoder and given.get("input_ids") is not None:
            encoder_tokens = self._new_map(given["input_ids"], None, given.get("attention_mask"), given, sessions)
        source = ids if ids is not None else embeds
        if not isinstance(source, Tensor) or source.dim() < 2:
            return Forward(OUTSIDE, encoder_tokens=encoder_tokens, two_sided=encoder_decoder)
        batch, width = source.shape[:2]
        if not batch or not width:
            raise ReattendError(f"the prompt is empty: {tuple(source.shape)} input tokens; give at least one token per row")
        cache = cache_in(given)
        past = self.lengths.of(cache)
        known = known_sequence(self.by_cache, cache, past, batch)
        if known is not None and width == 1 and past >= known.planned:
            who, drafts = NOBODY, 0
        else:
            who = caller(given, width)
            drafts = width - 1 if who.assistant and known is not None else who.drafts
            self._check_counter(given, cache, past, width, mask, who)
            if cache is None:
                known = uncached_sequence(getattr(self.local, "uncached", []), self.root, ids, batch, width, who)
                past = known.tokens.length if known is not None and width == 1 else 0
        if known is None:
            forward = self._begin(ids, embeds, mask, past, width, drafts, who, cache, given, sessions)
        else:
            forward = self._go_on(known, ids, mask, past, width, drafts, who, cache, given, sessions)
        forward.encoder_tokens, forward.two_sided, forward.cache = encoder_tokens, encoder_decoder, cache
        return forward

    def _begin(
        self, ids: Tensor | None, embeds: Tensor | None, mask: Any, past: int, width: int, drafts: int, who: Caller, cache: Any,
        given: dict[str, Any], sessions: list[Steered],
    ) -> Forward:  # fmt: skip
        """The first pass of a sequence that is seen; `past` tokens of it may stand in its cache already."""
        source = ids if ids is not None else embeds
        assert source is not None
        batch, prompt = source.shape[0], past + width - drafts
        virtual = who.virtual or self._virtual_tokens
        # they stand in the cache that the first pass is given, or at the front of its embeddings
        virtual = virtual if past == virtual or (not past and ids is None) else 0
        known = torch.full((batch, past + width), -1, device=source.device)
        if ids is not None:
            known[:, past:] = ids
        later = None if ids is None else who.to_come(ids, past, past)
        told = None if ids is None and not past else known
        tokens = self._new_map(
            told, embeds, mask, given, sessions, prompt, later, virtual, unread=past - virtual if past else 0
        )
        sequence = Sequence(tokens, [known], list(sessions), call=who.call, began=past, shuffled=who.beams, copies=who.copies)
        sequence.planned = 0 if later is None else prompt + later.shape[1]
        if is_followed(cache):
            self.by_cache[cache] = sequence
        if cache is None:
            # of the prompts in one call of generate each may go on (guidance by a second prompt)
            others = [s for s in getattr(self.local, "uncached", []) if s.call is not None and s.call is who.call]
            self.local.uncached = [*others[-3:], sequence]
        tokens.length = past + width
        clock = Clock("prefill" if self._generates() or past else "encode")
        return Forward(clock, tokens, sequence, fresh=not past, past=past - virtual if past else 0, asked=sequence.asked)

    def _go_on(
        self, known: Sequence, ids: Tensor | None, mask: Any, past: int, width: int, drafts: int, who: Caller, cache: Any,
        given: dict[str, Any], sessions: list[Steered],
    ) -> Forward:  # fmt: skip
        """A further pass of a known sequence: a step of decoding, or more of its prompt."""
        pieces = False
        if width - drafts > 1 and cache is not None or past < known.planned:
            pieces = known.step < 0
            self._extend(known, ids, mask, past, width, drafts, who, given, sessions)
            clock = Clock("prefill")
        else:
            if known.current != sessions:
                self._join(known, sessions)
            known.step += 1
            if cache is None and width > 1 and ids is not None:
                if known.remembers and (index := came_from(known.ids(width - 1, ids.device), ids[:, :-1])) is not None:
                    known.move(index)
                known.pieces = [ids]  # every pass holds the whole text
            else:
                known.read(ids, width)
            clock = Clock("decode", known.step)
        known.tokens.length = past + width
        return Forward(clock, known.tokens, known, past=past, pieces=pieces, asked=known.asked)

    def _extend(
        self, known: Sequence, ids: Tensor | None, mask: Any, past: int, width: int, drafts: int, who: Caller,
        given: dict[str, Any], sessions: list[Steered],
    ) -> None:  # fmt: skip
        """More prompt after a cache: the next chunk of a chunked prefill, or the next turn of a conversation."""
        if known.call is not who.call or who.call is None:
            known.call, known.began = who.call, past
        later = None if ids is None else who.to_come(ids, past, known.began)
        shuffled, known.shuffled = known.shuffled, False
        known.read(ids, width)
        known.shuffled, known.copies = shuffled or who.beams, who.copies
        tokens, prompt = known.tokens, past + width - drafts
        # sessions of other threads may have read it too
        readers = [*(s for s in known.sessions if s.active and s not in sessions), *sessions]
        whole = known.ids(past + width, "cpu" if ids is None else ids.device)
        unread = tokens.unread + (width if ids is None else 0)
        before = tokens.roles["padding"]
        try:
            new = self._new_map(whole, None, mask, given, readers, prompt, later, tokens.virtual, unread, before)
        except ReattendError:
            known.reached(past)
            raise
        tokens.roles, tokens.blind, tokens.unknown, tokens.unread = new.roles, new.blind, new.unknown, unread
        tokens.grids = [] if unread else join_images(tokens.grids, new.grids, past, new.roles.get("image"))
        tokens.prompt_length, known.sessions, known.step = prompt, readers, -1
        known.asked, known.groups = set(), None
        known.planned = 0 if later is None else prompt + later.shape[1]

    def _join(self, known: Sequence, sessions: list[Steered]) -> None:
        """Looks for the passages of sessions that began after the prompt was read."""
        new = [session for session in sessions if session not in known.sessions]
        if new:
            add_text_roles(known.tokens, known.ids(known.tokens.prompt_length, "cpu"), new)
            known.sessions = [*known.sessions, *new]
        known.current = sessions

    @functools.cached_property
    def _virtual_tokens(self) -> int:
        """Virtual tokens that PEFT puts before every prompt, where the session was given the PEFT model itself."""
        return virtual_tokens(getattr(unwrapped_model(self.host.model), "active_peft_config", None))

    def _generates(self) -> bool:
        can = getattr(self.root, "can_generate", None)
        return bool(can()) if callable(can) else True

    def _check_counter(self, given: dict[str, Any], cache: Any, past: int, width: int, mask: Any, who: Caller) -> None:
        """Raises ReattendError where this pass goes on with tokens whose cache nobody here has seen: its steps would be miscounted."""
        if not self._generates():
            return
        last, self.local.last = getattr(self.local, "last", None), (who.call, width, cache is not None)
        problem = uncountable(self.root, given, cache, past, width, mask, who, last, getattr(self.local, "returned", ""))
        if problem:
            raise ReattendError(
                f"{type(self.root).__name__} goes on with tokens that cannot be counted: {problem}. Caches are read by the names "
                f"{' and '.join(NAMES)} ({versions()} found)"
            )

    def forget(self, session: Steered) -> None:
        """Drops all sequences that a session has read."""
        alive = [cache for cache in (reference() for reference in self.by_cache.keyrefs()) if cache is not None]
        mine = [cache for cache in alive if (known := self.by_cache.get(cache)) is not None and session in known.sessions]
        unfollow(mine)
        for cache in mine:
            self.by_cache.pop(cache, None)
        self.local = threading.local()

    def new_map(self, ids: Tensor | None, embeds: Tensor | None, mask: Any, given: dict[str, Any]) -> TokenMap:
        """The map of a prompt that no session has read."""
        return self._new_map(ids, embeds, mask, given, [])

    def _new_map(
        self, ids: Tensor | None, embeds: Tensor | None, mask: Any, given: dict[str, Any], sessions: list,
        prompt: int | None = None, later: Tensor | None = None, virtual: int = 0, unread: int = 0, padding: Tensor | None = None,
    ) -> TokenMap:  # fmt: skip
        """The map of a prompt; what does not stand here is explained at `build_roles`."""
        source = ids if ids is not None else embeds
        assert source is not None
        batch, width = source.shape[:2]
        prompt = width if prompt is None else prompt
        tokens = TokenMap(batch, prompt, width, virtual=virtual, unread=unread)
        build_roles(tokens, self.root, ids if ids is None else ids[:, :prompt], mask, given, sessions, later, padding)
        return tokens


NOBODY = Caller()
