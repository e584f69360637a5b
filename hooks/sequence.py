"""Knows, for every forward pass of a token model, where it stands: prefill or decode, which step, which tokens.

One forward pre-hook on the whole model reads its arguments; what it learns is kept per sequence (per cache object, so threads that
generate at the same time on one model do not mix), for as long as the cache lives.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..interventions import Clock, ReattendError, Site, TokenMap
from .branch import fuse_branches, prepare_branches
from .caches import cache_in, cache_length, cache_of, has_buffers
from .diffusers_facts import denoiser_in
from .discovery import pretrained_root, unwrapped_model
from .images import join_images
from .lookahead import check_lookahead, look_ahead
from .module_hooks import Hooks
from .probe import Running, run_probes
from .sides import unfollow
from .tokens import build_roles

if TYPE_CHECKING:
    from .attachment import Attachment
    from .session import Session


@dataclass
class Sequence:
    """What is known of one batch of sequences: its prompt's roles, how long it is, and what interventions remember."""

    ids: Tensor | None
    tokens: TokenMap
    step: int = -1
    prompt_ids: Tensor | None = None
    memory: dict[object, dict[Any, Any]] = field(default_factory=dict)


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
    # what branches need after the pass: its arguments, and the sessions it ran under
    branched: tuple[dict[str, Any], list[Session]] | None = None
    # the tokens of an encoder-decoder model are its decoder's; what its encoder reads may be no tokens at all
    two_sided: bool = False
    # where the model put the tokens of this pass, as far as somebody has to know (see `positions`)
    positions: Tensor | None = None
    # pieces: this part of a prompt follows on another one with no generated token between them (chunked prefill, or a cached beginning)
    pieces: bool = False
    loose_memory: dict[object, dict[Any, Any]] = field(default_factory=dict)
    # what the model was given to keep keys in; None where it makes one itself, which grows
    cache: Any = None

    def tokens_at(self, site: Site) -> TokenMap | None:
        """The tokens that the rows of a site stand for; None where these are frames of sound or patches of an image."""
        if site.stack == "encoder":
            return self.encoder_tokens or (None if self.two_sided else self.tokens)
        return None if site.stack in ("vision", "audio", "connector") else self.tokens

    @functools.cached_property
    def buffered(self) -> bool:
        """Whether keys come in buffers that may be longer than the sequence."""
        return has_buffers(self.cache)

    def memory(self, key: object) -> dict[Any, Any]:
        """The store of one plan for this sequence."""
        store = self.loose_memory if self.sequence is None else self.sequence.memory
        return store.setdefault(key, {})


OUTSIDE = Clock("encode")


class SequenceTracker:
    """Installed on the outermost pretrained model (or on any other module that is wrapped)."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self.handles = Hooks()
        self.by_cache: weakref.WeakKeyDictionary[Any, Sequence] = weakref.WeakKeyDictionary()
        self.local = threading.local()
        model = unwrapped_model(attachment.model)
        # a denoiser has no sequence: the denoiser door follows it
        followed = isinstance(model, nn.Module) and denoiser_in(model) is None
        self.root = pretrained_root(model) if followed else None
        self.in_flight = attachment.in_flight

    # -- hooks -------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        if self.root is None or self.handles:
            return
        self.signature = inspect.signature(type(self.root).forward)
        # the hook that ends passes first: none may begin that cannot end
        self.handles.after(self.root, self._leave)
        self.handles.before(self.root, self._enter, kwargs=True)

    def uninstall(self) -> None:
        self.handles.remove()
        self.local.stack = []
        unfollow(list(self.by_cache))

    def current(self) -> Forward:
        """The forward pass of this thread; outside of one (a vision tower run by `generate` beforehand) an "encode" clock."""
        stack = getattr(self.local, "stack", None)
        return stack[-1] if stack and self.in_flight.here() is not None else Forward(OUTSIDE)

    def probing(self) -> Running | None:
        """The probe whose pass is under way in this thread."""
        stack = getattr(self.local, "stack", None)
        return stack[-1].probe if stack else None

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.probing() is not None:
            return
        # but for probes, no forward pass of a model starts inside another one of itself: anything left here was interrupted
        self.local.stack = []
        sessions = self.attachment.begin()
        if not sessions:
            return
        given = self.signature.bind_partial(module, *args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        forward = self._forward(given, sessions)
        self.local.stack.append(forward)
        del given[next(iter(self.signature.parameters))]
        if any(session.branches or session.lookaheads for session in sessions):
            prepare_branches(self, forward, given, sessions)
            for session in sessions:
                for plan, *_ in session.lookaheads:
                    check_lookahead(forward, given, plan)
            forward.branched = given, sessions
        for session in sessions:
            session.forwards += 1
        run_probes(self, forward, given, sessions)

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.probing() is not None:
            return
        stack = getattr(self.local, "stack", None)
        forward = stack.pop() if stack else None
        cache = cache_of(output)
        if forward is not None and forward.sequence is not None and cache is not None and not isinstance(cache, tuple):
            self.by_cache[cache] = forward.sequence
        try:
            if forward is not None and forward.branched is not None and output is not None:
                fuse_branches(self, forward, forward.branched[0], output, forward.branched[1])
                look_ahead(self, forward, forward.branched[0], output, forward.branched[1])
        except BaseException:
            self.attachment.land(None)
            raise
        self.attachment.land(output)

    @functools.cached_property
    def offset_modules(self) -> list[Any]:
        """Modules that keep the offset of multimodal RoPE from one pass to the next."""
        return [] if self.root is None else [m for m in self.root.modules() if hasattr(m, "rope_deltas")]

    # -- reading one forward pass --------------------------------------------------------------------------------------

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
        fresh = pieces = False
        if not isinstance(source, Tensor) or source.dim() < 2:
            return Forward(OUTSIDE, encoder_tokens=encoder_tokens, two_sided=encoder_decoder)
        batch, width = source.shape[:2]
        if not batch or not width:
            raise ReattendError(f"the prompt is empty: {tuple(source.shape)} input tokens; give at least one token per row")
        cache = cache_in(given)
        past = cache_length(cache)
        sequence = self._known(cache, past, ids)
        if sequence is None or sequence.tokens.batch != batch:
            prompt = width - _drafted(given, width)
            if past and ids is not None:
                # a cache that was filled before the session: its tokens are not known, but they stand in front of these
                ids, prompt = torch.cat([ids.new_full((batch, past), -1), ids], dim=1), past + prompt
            tokens = self._new_map(ids, embeds, mask, given, sessions, prompt)
            sequence = Sequence(ids, tokens, prompt_ids=ids)
            if cache is not None and not isinstance(cache, tuple):
                self.by_cache[cache] = sequence
            self.local.uncached = sequence if cache is None else None
            clock = Clock("prefill" if self._generates() or past else "encode")
            fresh = not past
        elif past + width <= sequence.tokens.prompt_length:
            # a model without a cache that is called with the same prompt again, or a chunk of it
            clock = Clock("prefill")
        elif width == 1 or _drafted(given, width) or cache is None:
            sequence.step += 1
            sequence.ids = ids if cache is None else sequence.ids
            sequence.tokens.length = past + width
            clock = Clock("decode", sequence.step)
        else:
            pieces = sequence.step < 0
            self._extend(sequence, ids, mask, past, width, given, sessions)
            clock = Clock("prefill")
        sequence.tokens.length = past + width
        return Forward(
            clock, sequence.tokens, sequence, encoder_tokens, fresh, two_sided=encoder_decoder, pieces=pieces, cache=cache
        )

    def _generates(self) -> bool:
        can = getattr(self.root, "can_generate", None)
        return bool(can()) if callable(can) else True

    def _known(self, cache: Any, past: int, ids: Tensor | None) -> Sequence | None:
        """The sequence that this pass goes on with, or None if it starts one."""
        if cache is not None and not isinstance(cache, tuple):
            return self.by_cache.get(cache) if past else None
        last = getattr(self.local, "uncached", None)
        if last is None or ids is None or last.ids is None or last.ids.shape[0] != ids.shape[0]:
            return None
        # beams may have changed places since the last step: only their prompts are sure to be the same
        before, prompt = last.ids, last.tokens.prompt_length
        grown = ids.shape[1] == before.shape[1] + 1 and torch.equal(ids[:, :prompt], before[:, :prompt])
        return last if grown else None

    def _extend(
        self, sequence: Sequence, ids: Tensor | None, mask: Any, past: int, width: int, given: dict, sessions: list
    ) -> None:
        """More prompt after a cache: the next chunk of a chunked prefill, or the next turn of a conversation."""
        if ids is not None and sequence.prompt_ids is not None:
            known = sequence.prompt_ids
            filler = known.new_full((known.shape[0], max(0, past - known.shape[1])), -1)
            ids = torch.cat([known, filler, ids], dim=1)
            sequence.prompt_ids = ids
            extended = self._new_map(ids, None, mask, given, sessions)
            sequence.tokens.roles = extended.roles
            sequence.tokens.images = join_images(sequence.tokens.images, extended.images, past, extended.roles.get("image"))
        sequence.tokens.prompt_length = past + width
        sequence.step = -1

    def _new_map(
        self,
        ids: Tensor | None,
        embeds: Tensor | None,
        mask: Any,
        given: dict[str, Any],
        sessions: list,
        prompt: int | None = None,
    ) -> TokenMap:
        source = ids if ids is not None else embeds
        assert source is not None
        batch, width = source.shape[:2]
        prompt = width if prompt is None else prompt
        tokens = TokenMap(batch, prompt, width)
        build_roles(tokens, self.root, ids if ids is None else ids[:, :prompt], mask, given, sessions)
        return tokens


def _drafted(given: dict[str, Any], width: int) -> int:
    """Drafted tokens among this pass's tokens: assisted decoding asks for the logits of its drafts and of the token before them."""
    keep = given.get("logits_to_keep")
    if isinstance(keep, int) and 1 < keep <= width:
        return keep - 1
    return 0
