"""What a recipe hands to a session: which door, at which sites, with which function.

edits       `Edits`: an intervention at selected sites
observe     `Observe`: a read-only tap on a layer's input
capture     `Capture`: a reader of the edited attention of each call (see `capture`)
guide       `Guide`: a further denoiser branch with edits of its own (see `denoise`)
projection  `Project`: an edit of the key projection's output of new tokens; `ReadProjection`: the same, read-only
spans       `Spans`: token sets that the user named by text or position
rewrite     `Probe`: a further pass with the same or changed inputs before a prefill, read but not edited (see `probe`)
branch      `Branch`: the same tokens after other prompts, with logits that become one (see `branch`)
            `Lookahead`: the likeliest next tokens, each tried on the cache before one is chosen (see `lookahead`)
tokens      `Exit`: tokens of some roles leave the sequence behind a layer (see `token_exit`)
rotary      no step: a `Call` has it as `call.rotary` (see `rotary`)

The other door of the design (share) gets its dataclass here and its room beside `denoise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ..interventions import Call, Clock, Edit, ProjectKey, ReattendError, Site, TokenMap
from .sites.table import SiteTable

Intervention = Callable[[Call], "Edit | Sequence[Edit] | None"]


@dataclass
class Edits:
    """At every call of `sites`: intervention(call) -> edits. `label` names it in the session's counters."""

    sites: SiteTable
    intervention: Intervention
    label: str = ""


@dataclass
class Observation:
    """What a tap sees: hidden [B, T, width] entering the layer of `site`; clock, tokens and memory as in a Call."""

    hidden: Tensor
    site: Site
    clock: Clock
    tokens: TokenMap | None
    memory: dict[Any, Any]


@dataclass
class Observe:
    """Read-only: tap(Observation) before the layer that holds each of `sites` runs."""

    sites: SiteTable
    tap: Callable[[Observation], None]


@dataclass
class Capture:
    """Read-only: reader(call, edits) at every call of `sites`, with the edits of all sessions; the outputs stay bit-identical."""

    sites: SiteTable
    reader: Callable[[Call, Sequence[Edit]], None]


@dataclass
class Projection:
    """What the projection door sees of one pass at one site: the new tokens before RoPE and cache, after norms per head.

    key [B, Hkv, T, D]; query [B, H, T, D], where the step asked for it; clock, tokens and memory as in a Call.
    """

    key: Tensor
    query: Tensor | None
    site: Site
    clock: Clock
    tokens: TokenMap | None
    memory: dict[Any, Any]

    @property
    def start(self) -> int:
        """Absolute position of the first of these tokens."""
        return self._map.length - self.key.shape[2]

    def rows(self, role: str) -> Tensor:
        """Bool [B, T] on the CPU: which of these tokens carry a role. Raises ReattendError where the pass has no token map."""
        return self._map.positions(role, self.start, self._map.length)

    @property
    def _map(self) -> TokenMap:
        if self.tokens is None:
            raise ReattendError(
                f"no token map at {self.site.name}: call the whole model with input_ids, so that tokens have roles"
            )
        return self.tokens


@dataclass
class Project:
    """edit(Projection) -> ProjectKey | None: a change of the key projection's output of new tokens, before RoPE and cache.

    What is changed stays in the cache, so that later steps cost nothing. query: the edit reads the queries of the same tokens too.
    """

    sites: SiteTable
    edit: Callable[[Projection], ProjectKey | None]
    label: str = ""
    query: bool = False


@dataclass
class ReadProjection:
    """Read-only: reader(Projection) at the key projection of `sites`, after all edits of the sessions before."""

    sites: SiteTable
    reader: Callable[[Projection], None]
    query: bool = False


@dataclass
class Guide:
    """One more denoiser branch per conditional row, in the same batch, with the edits that name its rows.

    prediction' = prediction + scale * (conditional - branch), added to both halves under classifier-free guidance, so that the
    pipeline's own formula gives eps_u + s (eps_c - eps_u) + scale (eps_c - branch). Interventions find the branch's rows in
    `call.clock` under `name`. start, stop: the part of the schedule it acts in, start <= step / steps < stop.
    Raises ReattendError for a name that is taken or a part that is empty.
    """

    name: str
    scale: float
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if not self.name or self.name in ("conditional", "unconditional"):
            raise ReattendError(f"a guide's name must not be empty, 'conditional' or 'unconditional', got {self.name!r}")
        if not math.isfinite(self.scale):
            raise ReattendError(f"guide {self.name!r}: scale must be a finite number, got {self.scale}")
        if not 0 <= self.start < self.stop <= 1:
            raise ReattendError(f"guide {self.name!r}: 0 <= start < stop <= 1 must hold, got {self.start} and {self.stop}")


@dataclass
class Spans:
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


@dataclass
class Prompt:
    """What a probe may change: the arguments of the pass that is about to run, all of them by name.

    There is no cache among them, and the attention mask is 2-d or absent. tokens: the map of the prompt. config: the model's.
    memory: the recipe's store for this sequence, the one that its interventions read as `call.memory`. past: how many tokens of the
    prompt an earlier pass has read.
    """

    arguments: dict[str, Any]
    tokens: TokenMap
    config: Any
    memory: dict[Any, Any]
    past: int = 0


@dataclass
class Probe:
    """Before a pass that starts a sequence: one more pass, without any edit and without a cache, that `steps` read.

    inputs(Prompt) -> the arguments of that pass, or None where no pass is needed; no function: the arguments of the real pass. Roles
    of changed prompts are those that follow from ids and mask ("image", "bos", "padding"); an unchanged prompt has all of its roles.
    Readers find `call.memory` or `observation.memory` shared with the recipe's other steps, so what they store there the real pass
    can use. early_exit: the pass stops after the last decoder site has been read. Passes that go on with a cache (a chunk of a
    prompt, the next turn, decode steps) have no probe. weighed: the real pass is changed by how much was read, not only by what was
    found, so the probe has gradients where the real pass has them. in_pieces(Prompt): called before a pass that reads a further part of a
    prompt with no generated token before it (chunked prefill, or a beginning that was cached), to refuse it or to say what happens to it.
    """

    steps: Sequence[Observe | Capture]
    inputs: Callable[[Prompt], dict[str, Any] | None] | None = None
    early_exit: bool = True
    in_pieces: Callable[[Prompt], None] | None = None
    weighed: bool = False

    def __post_init__(self) -> None:
        if not self.steps:
            raise ReattendError("a probe needs at least one reader (Observe or Capture)")


@dataclass
class Fusion:
    """What a branch's formula sees at one step: logits [B, n, V] of the real pass and of each branch, for the same n positions.

    n is 1 but where drafted tokens are checked (assisted decoding). clock, tokens and memory are those of the real pass.
    """

    logits: Tensor
    others: list[Tensor]
    clock: Clock
    tokens: TokenMap
    memory: dict[Any, Any]


@dataclass
class Branch:
    """Decoding branches: the same model with other prompts, which go on with the same tokens; fuse(Fusion) -> logits [B, n, V].

    inputs: for each branch a function of the Prompt, before the pass that starts a sequence, to the arguments of the branch's prompt;
    None from any of them: this prompt needs no branch. An argument `position_ids` that is left as it was (also if it was absent) says
    that the branch has the columns and positions of the real pass at every step; else rows must be padded on the left and their
    positions [..., B, T] given. `later_attention_mask` [B, T]: the prompt's mask from the second pass on, if it is another.
    Each branch has a cache of its own, is edited by `steps` alone, and has gradients where the real pass has them. The logits of the
    last position of every row leave the model fused, in every pass, so samplers, beams and processors see no others. Counted as
    "logits" under `label`. A further part of the prompt that would need a branch after the first did not is refused.
    """

    inputs: Sequence[Callable[[Prompt], dict[str, Any] | None]]
    fuse: Callable[[Fusion], Tensor]
    steps: Sequence[Edits | Observe | Capture] = ()
    label: str = ""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ReattendError("a branch step needs at least one function that makes a branch's prompt")


@dataclass
class Exit:
    """Tokens of `roles` leave the sequence in front of `sites`: all decoder layers from some layer on, in their order.

    In every pass that reads a prompt the layers of `sites` run without these tokens (and without padding) and keep no keys of them;
    all others see what they would see if nobody there attended to these tokens. The pass's output has its full length: tokens that
    left have the state in which they entered. Counted at each of `sites` for every pass in which tokens left.
    No other step may act or look at `sites`. A cache that was filled under an exit can only be used under the same session.
    """

    sites: SiteTable
    roles: Sequence[str]
    label: str = ""

    def __post_init__(self) -> None:
        if not self.roles:
            raise ReattendError("an exit needs at least one role whose tokens leave")


@dataclass
class Trials:
    """What a lookahead has seen: logits [B, V], the tried tokens `ids` [B, n], and for each of the n what was read of it [B, ...].

    clock, tokens and memory are those of the real pass; what memory holds and has `move(name, index)` goes where beams go.
    """

    logits: Tensor
    ids: Tensor
    readings: list[Tensor]
    clock: Clock
    tokens: TokenMap
    memory: dict[Any, Any]


@dataclass
class Lookahead:
    """After every pass the `count` likeliest next tokens of each row are tried; score(Trials) -> the logits [B, V] that leave the model.

    A trial is an unedited pass with one token, after which the cache is as before; read(Call) -> [B, ...] at the call of `sites` (one
    site). Needs a cache whose last token can be taken back. Trials have no gradient, and a backward pass through what was read of them
    raises ReattendError. Counted as "logits" under `label`.
    """

    count: int
    sites: SiteTable
    read: Callable[[Call], Tensor]
    score: Callable[[Trials], Tensor]
    label: str = ""

    def __post_init__(self) -> None:
        if self.count < 1 or len(self.sites) != 1:
            raise ReattendError("a lookahead tries at least one token and reads one site")


Step = Edits | Observe | Capture | Project | ReadProjection | Guide | Spans | Probe | Branch | Exit | Lookahead


@dataclass
class Plan:
    """The steps of one recipe on one model, with the name they are counted under."""

    recipe: str
    steps: list[Step] = field(default_factory=list)
    memory_key: object = field(default_factory=object)
