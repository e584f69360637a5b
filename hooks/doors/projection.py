"""The projection door: queries, keys and values of new tokens between their projection and RoPE, to be changed or read.

Gives: the outputs of the q, k and v projections of a pass's new tokens, per head, after the model's own norms of them and before RoPE and the
cache, to a function that may return others; in joint blocks of denoisers those of the text's own projections too. What is changed in a
key or value stays in the cache, so later steps of a generation cost nothing. With normed=False the output before the norm is given.

Costs: one hook per projection and pass and what the function computes; no attention matrix, no copy of what is not changed.

Refuses: projections that are fused into one (unfuse them where the model can), sites whose norm cannot be placed before or after RoPE,
models without projections of their own (multi-head latent attention); a run after adapters have come or gone, or projections were fused,
since the session began; new states of another shape; a function that changes states in place (which does not show under
torch.inference_mode).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...interventions import Clock, ProjectKey, ReattendError, Site, TokenMap
from ..actions import RootCall
from ..handles import Handles, Holder
from ..host import Host
from ..passes import Forward
from ..plan import Facts, Plan, Step, sites_misfit
from ..sites.projections import WHICH, Hooked, Split, heads_of, projection_misfit, projection_of
from ..sites.table import SiteTable
from ..tokens.states import tokens_of, version_of


@dataclass
class Projected:
    """What the projection door sees at one projection of one pass: its new tokens before RoPE and cache.

    states [B, heads, T, D]: what was projected (key heads for keys and values), as it is now: some models turn it in place afterwards, so
    a copy is what keeps. which: "query", "key" or "value". added: by
    further projections: the text stream's own in a joint block, those of images to look at in cross-attention. clock and memory as in a Call.
    """

    states: Tensor
    which: str
    added: bool
    site: Site
    clock: Clock
    memory: dict[Any, Any]
    known: dict[str, Tensor] = field(repr=False)
    find: Callable[[], TokenMap | None] = field(repr=False)

    @property
    def query(self) -> Tensor:
        """[B, H, T, D] of the same tokens. Raises ReattendError where it is projected later, or the step did not ask for it."""
        return self._of("query")

    @property
    def key(self) -> Tensor:
        """[B, Hkv, T, D] of the same tokens, or ReattendError."""
        return self._of("key")

    @property
    def value(self) -> Tensor:
        """[B, Hkv, T, D] of the same tokens, or ReattendError."""
        return self._of("value")

    def _of(self, which: str) -> Tensor:
        if which not in self.known:
            raise ReattendError(
                f"{self.site.name}: its {which} is not known when its {self.which} is projected; name it in `of`, and wait for the last"
            )
        return self.known[which]

    @property
    def tokens(self) -> TokenMap | None:
        """The map of the sequence that these tokens end, or of these tokens on a denoiser; None where nothing is known of them."""
        return self.find()

    @property
    def start(self) -> int:
        """Absolute position of the first of these tokens. Raises ReattendError where the pass has no token map."""
        return self._map.length - self.states.shape[2]

    def places(self, role: str) -> Tensor:
        """Bool [B, T]: which of these tokens carry a role. Raises ReattendError where the pass has no token map."""
        found = self._map
        return found.positions(role, found.length - self.states.shape[2], found.length, self.states.device)

    @property
    def _map(self) -> TokenMap:
        found = self.tokens
        if found is None:
            raise ReattendError(
                f"no token map at {self.site.name}: call the whole model with input_ids, so that tokens have roles"
            )
        return found


Projecting = Callable[[Projected], ProjectKey | Tensor | None]


@dataclass
class Projection(Step):
    """edit(Projected) -> other states [B, heads, T, D], ProjectKey (of keys), or None, before RoPE and cache.

    of: which of "query", "key" and "value" it is called for, each when it is projected, in the model's order (where
    queries and keys have norms, values are mostly the first).
    reader(Projected): read-only, after all edits of the sessions before. A step has one of the two. normed: after the norms that the model
    puts on queries and keys before RoPE, else before them. prompts: not in steps of decoding, which then run compiled where the model is.
    label: its name in the session's counters, for an edit. Raises ReattendError for both functions or neither, and for an `of` that names
    nothing.
    """

    sites: SiteTable
    edit: Projecting | None = None
    reader: Callable[[Projected], None] | None = None
    label: str = ""
    of: Sequence[str] = ("key",)
    normed: bool = True
    prompts: bool = False
    # what its hooks are on: known once the model is
    hooked: list[Hooked] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        if (self.edit is None) == (self.reader is None):
            raise ReattendError(
                "a Projection step takes either edit=..., which changes states, or reader=..., which looks at them"
            )
        if isinstance(self.of, str) or not self.of or set(self.of) - set(WHICH) or len(set(self.of)) < len(self.of):
            raise ReattendError(f'Projection: of must name some of "query", "key" and "value" once each, got {self.of!r:.60}')

    def check(self, facts: Facts) -> str:
        return sites_misfit(self.sites) or projection_misfit(self.sites, self.of)

    def ready(self, call: RootCall) -> str:
        return next(filter(None, (one.misfit for one in self.hooked)), "")

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        handles = session.handles()
        if self.edit is not None:
            session.counter(self.label or plan.recipe)
        self.hooked = Hooked.all_of(self.sites, self.of, normed=self.normed)
        # one for each stream of a site
        waiting: dict[tuple[str, bool], Waiting] = {}
        for one in self.hooked:
            together = waiting.setdefault((one.site.name, one.added), Waiting(len(self.of)))
            function = self._at(host, session, plan, one.site, one.which, one.added, together)
            handles.after(one.module, function, prompts=self.prompts)
        return handles

    def _at(
        self, host: Host, session: Holder, plan: Plan, site: Site, which: str, added: bool, waiting: Waiting
    ) -> Callable[..., Tensor | None]:
        def project(_: nn.Module, args: tuple, output: Tensor | None) -> Tensor | None:
            if output is None or session not in host.active():
                return None
            forward = host.current()
            if self.prompts and forward.answers:
                return None
            version = version_of(output)
            split = Split(output, args, site, heads_of(site, which))
            known = waiting.met(forward, which, split.states)

            def find() -> TokenMap | None:
                attention = self.sites.module(site)
                beside = projection_of(attention, "key", added=True) is not None
                # of cross-attention it is images to look at that are added
                text = added and site.kind != "cross"
                return tokens_of(forward, site, attention, split.states, keys=which != "query", text=text, beside=beside)

            memory = forward.memory(plan.memory_key)
            seen = Projected(split.states, which, added, site, forward.clock, memory, known, find)
            if self.reader is not None:
                self.reader(seen)
                _unchanged(output, version, seen)
                if forward.probe is not None and len(known) == len(self.of) and not added:
                    forward.probe.read(self, self.sites.module(site))
                return None
            assert self.edit is not None
            states = _changed(self.edit(seen), seen)
            _unchanged(output, version, seen)
            if states is None:
                return None
            known[which] = states
            session.counter(self.label or plan.recipe)[site.name] += 1
            return split.back(states)

        return project


class Waiting:
    """What one pass has projected at one site so far, per thread: queries wait here for the keys of the same tokens."""

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self.passes: dict[int, tuple[Forward, dict[str, Tensor]]] = {}

    def met(self, forward: Forward, which: str, states: Tensor) -> dict[str, Tensor]:
        """{"query": ...} of this pass, with what has just been projected; forgotten here once it is complete."""
        thread = threading.get_ident()
        began, known = self.passes.pop(thread, (None, {}))
        if began is not forward or which in known:
            known = {}
        known[which] = states
        if len(known) < self.parts:
            self.passes[thread] = (forward, known)
        return known


def _unchanged(output: Tensor, version: int, seen: Projected) -> None:
    """Raises ReattendError where a function has written into what the model goes on with."""
    if version_of(output) != version:
        raise ReattendError(
            f"Projection at {seen.site.name}: its function changed a {seen.which} in place; return new states instead"
        )


def _changed(edit: ProjectKey | Tensor | None, seen: Projected) -> Tensor | None:
    """The new states; None where nothing changes. Raises ReattendError for what does not fit."""
    if edit is None:
        return None
    if isinstance(edit, Tensor):
        if edit.shape != seen.states.shape:
            raise ReattendError(
                f"Projection at {seen.site.name}: a {seen.which} must keep its shape {tuple(seen.states.shape)}, got {tuple(edit.shape)}"
            )
        return edit.to(seen.states.device, seen.states.dtype)
    if not isinstance(edit, ProjectKey):
        raise ReattendError(
            f"Projection at {seen.site.name}: its function must return states, ProjectKey or None, got {edit!r:.80}"
        )
    if edit.is_identity:
        return None
    if seen.which != "key":
        raise ReattendError(f"Projection at {seen.site.name}: ProjectKey changes keys, and this is its {seen.which}")
    return edit.on_key(seen.states)
