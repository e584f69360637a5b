"""The nouns of reattend: where a call happens (Site), when (Clock), on which tokens (TokenMap), and its tensors (Call).

Everything here is plain data. `hooks` fills it in; `interventions` and `recipes` read it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .errors import ReattendError
from .memory import Memory
from .rotary import Rotary, Turned


@dataclass(frozen=True)
class Site:
    """One attention computation of a model.

    name: module path. layer: index inside its stack. stack: "decoder", "vision", "text_encoder", "denoiser", ...
    kind: "self" | "cross" | "joint" | "temporal". Head counts are those of the whole model; None where unknown before a run.
    """

    name: str
    layer: int
    stack: str
    kind: str
    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int | None
    causal: bool
    route: str = "attention_interface"
    problem: str | None = None

    @property
    def supported(self) -> bool:
        return self.problem is None


@dataclass(frozen=True)
class Clock:
    """When a call happens.

    phase: "prefill" | "decode" | "denoise" | "encode". step counts decode or denoising steps from 0; steps is their number
    if known. timestep: as the denoiser is given it; scheduled: the scheduler's own, which falls from 1000 (Flux is given thousandths of
    it, Lumina 2 what these leave of 1), None where no schedule is known, as on a bare denoiser. `branches` maps "conditional",
    "unconditional" and the names of guide branches to bool [batch] rows. source [batch] long: which of the user's rows each row was copied
    from, where a guide has added rows; None where all rows are the user's. unknown: why nobody knows which rows are conditional, "" where
    that is known or there is no such thing.
    """

    phase: str
    step: int = 0
    steps: int | None = None
    timestep: float | None = None
    scheduled: float | None = None
    branches: Mapping[str, Tensor] = field(default_factory=dict)
    source: Tensor | None = None
    unknown: str = ""

    def rows(self, branch: str, batch: int) -> Tensor | None:
        """Bool [batch] rows of a branch, repeated when a site folds frames or positions into the batch; None if absent.

        Raises ReattendError for the conditional and the unconditional rows where nobody knows which these are.
        """
        rows = self.branches.get(branch)
        if rows is None and self.unknown and branch in ("conditional", "unconditional"):
            raise ReattendError(self.unknown)
        if rows is None or rows.shape[0] == batch:
            return rows
        if batch % rows.shape[0]:
            raise ReattendError(f"a site's batch of {batch} is not a multiple of the model's batch of {rows.shape[0]}")
        return rows.repeat_interleave(batch // rows.shape[0])


# of calls that belong to no pass
OUTSIDE = Clock("encode")


@dataclass(frozen=True)
class TokenGrid:
    """Where the tokens of one image or video lie: `index` [frames, rows, cols] long, positions in row `row` of the batch.

    An image has one frame. role: which tokens these are, "image", "reference" (an image that the one being made looks at) or "patch".
    whole: rows and columns of the latents, of which a UNet's inner layers see fewer; None where the layer sees all of them.
    """

    row: int
    index: Tensor
    role: str = "image"
    whole: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.index.dim() != 3 or not self.index.numel():
            raise ReattendError(f"a grid's index must be [frames, rows, cols], none of them 0; got {tuple(self.index.shape)}")

    @classmethod
    def of_image(cls, row: int, index: Tensor, role: str = "image") -> TokenGrid:
        """The grid of one image from its index [rows, cols]."""
        return cls(row, index[None], role)

    @property
    def frames(self) -> int:
        return self.index.shape[0]

    @property
    def height(self) -> int:
        return self.index.shape[1]

    @property
    def width(self) -> int:
        return self.index.shape[2]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, height, width)."""
        return self.frames, self.height, self.width

    @property
    def image(self) -> Tensor:
        """[rows, cols]: the index of a grid that has one frame. Raises ReattendError for a video's."""
        if self.frames != 1:
            raise ReattendError(f"these tokens are {self.frames} frames of {self.height} x {self.width}, no single image")
        return self.index[0]


@dataclass
class TokenMap:
    """Named sets of token positions, bool [batch, length] each, over the whole sequence so far.

    Roles found on a model are "image", "bos", "padding", "prompt", "generated", with a chat template also "system", "user",
    "assistant"; on a denoiser "image", "text", "padding", "reference", "register", "frame"; a user's spans have their own names
    ("emphasis"). `length` grows with every decode step: roles are stored for the prompt and read as False (generated: True) beyond it.
    grids: the images and videos whose raster is known; gridless: why one is not, where that was found out. own: the column of the first
    query's own key, in a map of keys whose queries have a map of their own and are keys too. blind: only embeddings were given, so roles
    that are found by token id are unknown, which is not the same as absent. unknown: why roles could not be found at all, "" where they
    could. unread: how many of its tokens nobody saw pass by. virtual: how many at its start are learned vectors (prefix and prompt
    tuning), no tokens.
    """

    batch: int
    prompt_length: int
    length: int
    roles: dict[str, Tensor] = field(default_factory=dict)
    grids: list[TokenGrid] = field(default_factory=list)
    blind: bool = False
    unknown: str = ""
    gridless: str = ""
    own: int | None = None
    unread: int = 0
    virtual: int = 0
    # (role, device) -> what it is made of, and its positions there: devices are given them once, not at every layer and step
    _held: dict[tuple[str, torch.device], tuple[tuple, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __contains__(self, role: str) -> bool:
        return role in self.roles or role in ("prompt", "generated")

    def __repr__(self) -> str:
        counts = ", ".join(f"{role} {marked.sum(dim=1).tolist()}" for role, marked in self.roles.items())
        grids = ", ".join(" x ".join(map(str, grid.shape)) for grid in self.grids)
        said = self.unknown or counts or "no roles"
        return f"<TokenMap of {self.batch} rows, {self.length} tokens: {said}{f'; grids {grids}' if grids else ''}>"

    def anywhere(self, role: str) -> Tensor:
        """Bool [batch, 1]: the sequences that have the role, be it in a chunk of the prompt that is still to come."""
        if role not in self.roles:
            return self.positions(role, 0, self.prompt_length).any(dim=1, keepdim=True)
        return self.roles[role].any(dim=1, keepdim=True).cpu()

    def move(self, index: Tensor) -> None:
        """Rows come from these rows [new batch] now: rows of the cache were selected, repeated, or have changed places."""
        self.batch = len(index)
        self.roles = {role: marked[index.to(marked.device)] for role, marked in self.roles.items()}
        self.grids = [replace(g, row=i) for i, row in enumerate(index.tolist()) for g in self.grids if g.row == row]

    def positions(self, role: str, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """Bool [batch, stop - start]: which of the absolute positions start..stop-1 carry the role."""
        width = stop - start
        if role == "generated":
            places = torch.arange(start, stop, device=device)
            return ((places >= self.prompt_length) & (places < self.length)).expand(self.batch, width)
        if role == "padding" and role not in self.roles and not self.unknown:
            return torch.zeros(self.batch, width, dtype=torch.bool, device=device)  # pictures have none
        if role not in self and self.unknown:
            raise ReattendError(f"{role!r} tokens cannot be told apart: {self.unknown}")
        if role not in self and self.blind:
            raise ReattendError(f"{role!r} tokens cannot be found in inputs_embeds: pass input_ids instead")
        if role not in self:
            raise ReattendError(f"this input has no {role!r} tokens; it has: {', '.join(sorted(self.roles)) or 'none'}")
        found = self._on(role, torch.device(device))
        piece = found[:, start : min(stop, found.shape[1])]
        return torch.nn.functional.pad(piece, (0, width - piece.shape[1]))

    def _on(self, role: str, device: torch.device) -> Tensor:
        """Bool [batch, n]: a role that the prompt has, on a device. It is shared: not to be written to."""
        stored, padding = self.roles.get(role), self.roles.get("padding")
        source = (padding, self.prompt_length) if role == "prompt" else (stored,)
        known = self._held.get((role, device))
        if known is not None and known[0][0] is source[0] and known[0][1:] == source[1:]:
            return known[1]
        if role == "prompt":
            stored = torch.ones(self.batch, self.prompt_length, dtype=torch.bool)
            if padding is not None:
                beyond = self.prompt_length - padding.shape[1]
                stored = stored & ~torch.nn.functional.pad(padding.cpu(), (0, beyond))
        assert stored is not None
        if stored.device == device:
            return stored
        with torch.inference_mode(False):  # kept longer than the pass that makes it
            found = stored.to(device)
        self._held[role, device] = (source, found)
        return found


# the fields of a call that are stores
_STORES: dict[str, Callable[[], Any]] = {"memory": Memory, "attended": dict, "edits": list, "then": list}


@dataclass(eq=False, init=False)
class Call:
    """What one execution of a site sees, after RoPE and cache update.

    query [B, H, Tq, D]; key [B, Hkv, Tk, D]; value [B, Hkv, Tk, Dv]; mask None, bool (True = visible) or additive,
    broadcastable to [B, H, Tq, Tk]. is_causal aligns the last query with the last key. softcap: Gemma-2's tanh cap.
    sinks [H]: learned sink logits that join the softmax denominator (gpt-oss). tokens: the map of the keys, and of the queries too
    unless those are other tokens (cross attention between an image and a text): `query_tokens` is theirs. `memory` is the
    intervention's own store, one per sequence: what prefill learned, decode reads; its tensors have the batch axis first and follow the
    cache's rows (see `Memory`). Stores that nobody has filled are made when they are asked for: every layer of every step has a call.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    site: Site | None = None
    clock: Clock = OUTSIDE
    tokens: TokenMap | None = None
    query_tokens: TokenMap | None = None
    memory: MutableMapping = field(default_factory=Memory, repr=False)
    original: Callable[[], Tensor] | None = None
    original_is_sdpa: bool = True
    # the model's own function once more, giving its output with the log-sum-exp [B, H, Tq] of each row, or None where it has none
    original_with_lse: Callable[[], tuple[Tensor, Tensor] | None] | None = field(default=None, repr=False)
    # how the site turns q and k by position, looked up when `rotary` is asked for
    rotation: Callable[[], Rotary] | None = field(default=None, repr=False)
    # the same on a denoiser, where a step `Rotary` has seen it
    turning: Callable[[], Turned] | None = field(default=None, repr=False)
    # heads -> their untouched (output, log-sum-exp): what an intervention has computed already, the executor need not compute again
    attended: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    # what the recipes before the one that looks at this call have asked for here
    edits: list[Any] = field(default_factory=list, repr=False)
    # what is given the output [B, H, Tq, Dv] once it is there, to look at it
    then: list[Callable[[Tensor], None]] = field(default_factory=list, repr=False)
    # how many calls of the site came before it in one run of its module: an image prompt's come after the prompt's, or one for each sample
    number: int = field(default=0, repr=False)
    # name of a way -> how often the executor took it for this site, where somebody counts
    ways: Counter[str] | None = field(default=None, repr=False)

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, is_causal: bool = False,
        scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None, original_is_sdpa: bool = True,
        **more: Any,
    ) -> None:  # fmt: skip
        if mask is not None and mask.dim() != 4:
            raise ReattendError(f"mask must have 4 dimensions [batch, heads, queries, keys], got {tuple(mask.shape)}")
        self.query, self.key, self.value, self.mask = query, key, value, mask
        self.is_causal = is_causal and query.shape[2] > 1
        self.scale, self.softcap, self.sinks, self.original_is_sdpa = scale, softcap, sinks, original_is_sdpa
        if more:
            if unknown := more.keys() - self.__dataclass_fields__.keys():
                raise TypeError(f"a Call has no {', '.join(sorted(unknown))}")
            self.__dict__.update(more)

    def __getattr__(self, name: str) -> Any:
        # a class attribute is the default of all fields but those that have a store of their own
        make = _STORES.get(name)
        if make is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        store = self.__dict__[name] = make()
        return store

    @property
    def looks(self) -> Sequence[Callable[[Tensor], None]]:
        """`then`, where somebody has put something there."""
        return self.__dict__.get("then", ())

    @property
    def scaling(self) -> float:
        """The factor on q k: `scale`, or 1 / sqrt(D) where none was given."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def rotary(self) -> Rotary:
        """The site's RoPE. Raises UnsupportedError where its positions are not rotary, or not of a kind that is understood."""
        if self.rotation is None:
            raise ReattendError(f"the rotary positions of {self.site.name if self.site else 'this call'} are not known")
        return self.rotation()

    @property
    def turned(self) -> Turned:
        """How a denoiser's site has turned its queries and keys by their places. Raises ReattendError where no step `Rotary` acts at it,
        and UnsupportedError where its RoPE is not of a kind that is understood."""
        if self.turning is None:
            name = self.site.name if self.site else "this call"
            raise ReattendError(
                f"how {name} turns its queries and keys is not known: put the step Rotary(sites) before this one"
            )
        return self.turning()

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def num_heads(self) -> int:
        return self.query.shape[1]

    @property
    def num_queries(self) -> int:
        return self.query.shape[2]

    @property
    def num_keys(self) -> int:
        return self.key.shape[2]

    @property
    def total(self) -> int:
        """Length of the sequence so far: the absolute position after the last query."""
        return self.tokens.length if self.tokens is not None else self.num_keys

    @property
    def key_start(self) -> int:
        """Absolute position of key column 0: above 0 where a sliding-window cache has dropped the oldest keys.

        Columns are the sequence's tokens in its order, the last one its newest token: what a static cache's buffer holds besides is
        left out before anybody sees the call.
        """
        return max(0, self.total - self.num_keys)

    def keep_columns(self, filled: int) -> None:
        """Leaves out the key columns from `filled` on: those of a static cache's buffer that no token has filled yet.

        Without them a row's own column is as far from the last one as the row from the last row. A kernel that gets fewer columns may
        give other bits to heads that nobody edits: these then take the model's own call.
        """
        if filled >= self.num_keys:
            return
        self.key, self.value, self.original_is_sdpa = self.key[:, :, :filled], self.value[:, :, :filled], False
        if self.mask is not None and self.mask.shape[-1] > filled:
            self.mask = self.mask[..., :filled]

    def columns(self, role: str) -> Tensor:
        """Bool [B, Tk]: key columns of a token role. Raises ReattendError where the call has no token map."""
        return self._role(role, self.key_start, self.key_start + self.num_keys)

    def query_rows(self, role: str) -> Tensor:
        """Bool [B, Tq]: query rows of a token role."""
        if self.query_tokens is not None and role != "all":
            return self.query_tokens.positions(role, 0, self.num_queries, self.query.device)
        return self._role(role, self.total - self.num_queries, self.total)

    def _role(self, role: str, start: int, stop: int) -> Tensor:
        if self.tokens is None:
            where = f" at {self.site.name}" if self.site else ""
            if self.site is not None and self.site.stack not in ("decoder", "encoder"):
                raise ReattendError(f"no token map{where}: it is not known what the tokens of this {self.site.stack} stack are")
            raise ReattendError(
                f"no token map{where}: call the whole model with input_ids, so that {role!r} tokens can be found"
            )
        if role == "all":
            return torch.ones(self.batch, stop - start, dtype=torch.bool, device=self.query.device)
        return self.tokens.positions(role, start, stop, self.query.device)
