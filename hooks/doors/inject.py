"""The inject door: what enters a layer or a block is written anew, for chosen rows of the batch.

Gives: a function of what enters (hidden states, further inputs such as the text stream of a joint block, clock, tokens, memory) that
returns other hidden states, at decoder layers, layers of encoders and blocks of denoisers, or at an attention module itself. Rows are
named by branch (a guide's, "conditional", "unconditional") or by number; all others go in as they are and keep their bits. Rows of the
batch may be read from one another, so one half can feed the other.

Costs: one `torch.where` over the input for each block and pass where rows are named, none where all are; what the function itself computes;
under torch.inference_mode a copy of the hidden states, without which a change in place would not show.
Nothing is kept. In passes in which the rows do not occur nothing is computed.

Refuses: a site whose layer is in no list of layers (its attention module can be written at instead); a branch's name on a model that is no
denoiser, or in a pass of which nobody knows what its rows are; named rows in blocks that take their tokens along the first axis; rows
that are not there; new values of another shape; a function that changes its inputs in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...interventions import Clock, ReattendError, Site, TokenMap, UnsupportedError
from ..handles import Handles, Holder
from ..host import Host
from ..passes import Forward
from ..plan import Facts, Plan, Step
from ..sites.discovery import layer_module
from ..sites.table import SiteTable
from ..tokens.states import counted, parameters_of, rows_of, tokens_of, version_of

Written = Tensor | Mapping[str, Tensor] | None


@dataclass
class Entering:
    """What enters a layer, a block or an attention module.

    hidden [B, T, width]: its first argument, for the whole batch. given: every tensor among its arguments, by the module's own names
    (the text stream of a joint block is "encoder_hidden_states"). rows: bool [B], those that will be written; None = all. site: the one
    that was selected; clock and memory as in a Call.
    """

    hidden: Tensor
    given: Mapping[str, Tensor]
    rows: Tensor | None
    site: Site
    clock: Clock
    memory: dict[Any, Any]
    find: Callable[[], TokenMap | None] = field(repr=False)

    @property
    def text(self) -> Tensor | None:
        """[B, T text, width]: the block's stream of text, or the text that it reads; None where it takes none."""
        return self.given.get("encoder_hidden_states")

    @property
    def tokens(self) -> TokenMap | None:
        """The map of the tokens in `hidden`; None where it is not known which they are."""
        return self.find()

    def places(self, role: str) -> Tensor:
        """Bool [B, T]: which tokens of `hidden` carry a role ("image", "text", ...). Raises ReattendError where that is not known."""
        tokens, width = self.tokens, self.hidden.shape[1]
        if tokens is None:
            raise ReattendError(f"which tokens enter the layer of {self.site.name} is not known, so none of them is {role!r}")
        return tokens.positions(role, tokens.length - width, tokens.length, self.hidden.device)


@dataclass
class Inject(Step):
    """write(Entering) -> other hidden states, {argument's name: its new value}, or None, before the layer that holds each of `sites` runs.

    New values have the shape of the old ones; of them the named rows are taken. rows: the name of a branch of a denoiser's batch,
    numbers of the user's rows (a guide's copy of a row counts as that row, and so do its beams), or None for all. at: the layer or block
    (once, however many of its sites are selected), or each site's attention module. label: its name in the session's counters; None: it
    is not counted.
    Raises ReattendError for rows that name nothing.
    """

    sites: SiteTable
    write: Callable[[Entering], Written]
    rows: str | Sequence[int] | None = None
    at: Literal["layer", "attention"] = "layer"
    label: str | None = ""

    def __post_init__(self) -> None:
        if self.at not in ("layer", "attention"):
            raise ReattendError(f'Inject: at must be "layer" or "attention", got {self.at!r:.60}')
        if self.rows is None:
            return
        listed = isinstance(self.rows, (Sequence, Set)) and len(self.rows)
        numbers = list(self.rows) if listed and not isinstance(self.rows, str) else []
        if not listed or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
            raise ReattendError(
                f"Inject: rows must be the name of a branch, a list of batch rows from 0, or None for all, got {self.rows!r:.60}"
            )

    def check(self, facts: Facts) -> str:
        if not len(self.sites):
            return self.sites.missing or "its plan selects no attention site of this model"
        if isinstance(self.rows, str) and not facts.denoisers:
            return f"Inject: rows={self.rows!r} names a branch of a denoiser's batch, and this model has none: give row numbers"
        try:
            self._modules(facts.model)
        except UnsupportedError as error:
            return f'{error}; Inject(at="attention") writes at the attention module itself'
        return ""

    def _modules(self, model: Any) -> dict[nn.Module, Site]:
        """The modules that are written at, each with the first of its sites."""
        chosen: dict[nn.Module, Site] = {}
        for site in self.sites:
            module = layer_module(model, site.name) if self.at == "layer" else self.sites.module(site)
            chosen.setdefault(module, site)
        return chosen

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        handles = session.handles()
        if self.label is not None:
            session.counter(self.label or plan.recipe)
        for module, site in self._modules(session.model).items():
            handles.before(module, self._at(site, host, session, plan), kwargs=True)
        return handles

    def _at(self, site: Site, host: Host, session: Holder, plan: Plan) -> Callable[..., Any]:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if session not in host.active():
                return None
            forward, names = host.current(), parameters_of(module)
            given = {name: v for name, v in (*zip(names, args, strict=False), *kwargs.items()) if isinstance(v, Tensor)}
            hidden = given.get(names[0]) if names else None
            if hidden is None:
                raise UnsupportedError(
                    f"{type(module).__name__} of {site.name} is called without hidden states: none can be written"
                )
            rows = self._rows(forward, hidden, site)
            if rows is None and self.rows is not None:
                return None

            def find() -> TokenMap | None:
                attention = self.sites.module(site)
                return tokens_of(forward, site, attention, hidden, beside="encoder_hidden_states" in given)

            given.update({name: counted(value) for name, value in given.items() if name in (names[0], "encoder_hidden_states")})
            seen = Entering(given[names[0]], given, rows, site, forward.clock, forward.memory(plan.memory_key), find)
            written = self._written(seen, names[0])
            if forward.probe is not None:
                forward.probe.read(self, self.sites.module(site))
            if not written:
                return None
            if self.label is not None:
                session.counter(self.label or plan.recipe)[site.name] += 1
            args = tuple(written.get(name, value) for name, value in zip(names, args, strict=False)) + args[len(names) :]
            return args, {name: written.get(name, value) for name, value in kwargs.items()}

        return enter

    def _rows(self, forward: Forward, hidden: Tensor, site: Site) -> Tensor | None:
        """Bool [B]: the named rows; None where the pass has none of them."""
        batch, clock = hidden.shape[0], forward.clock
        if self.rows is None:
            return None
        source = rows_of(forward, site, hidden).to(hidden.device)
        if isinstance(self.rows, str):
            if not clock.branches:
                raise UnsupportedError(
                    f"which rows are {self.rows!r} at {site.name} is not known; say it around the call: with reattend.rows(...)"
                )
            rows = clock.rows(self.rows, batch)
            return None if rows is None else rows.to(hidden.device)
        if clock.source is None and max(self.rows) > int(source[-1]):
            raise ReattendError(
                f"Inject: batch row {max(self.rows)} does not exist at {site.name}: there are rows 0 to {int(source[-1])}"
            )
        return torch.isin(source, torch.tensor(list(self.rows), device=hidden.device))

    def _written(self, seen: Entering, first: str) -> dict[str, Tensor]:
        """{argument: its value with the named rows written anew}. Raises ReattendError for values that do not fit."""
        versions = {name: version_of(value) for name, value in seen.given.items()}
        new = self.write(seen)
        if any(version_of(value) != versions[name] for name, value in seen.given.items()):
            raise ReattendError(
                f"Inject at {seen.site.name}: its function changed an input in place; return a new tensor instead"
            )
        changes = {first: new} if isinstance(new, Tensor) else {} if new is None else new
        if not isinstance(changes, Mapping) or not all(isinstance(value, Tensor) for value in changes.values()):
            raise ReattendError(
                f"Inject at {seen.site.name}: its function must return hidden states, {{argument's name: its new value}} or None, "
                f"got {new!r:.60}"
            )
        written: dict[str, Tensor] = {}
        for name, value in changes.items():
            old = seen.given.get(name)
            if old is None:
                raise ReattendError(
                    f"Inject at {seen.site.name}: there is no tensor {name!r} among what enters; there is {', '.join(seen.given)}"
                )
            if value.shape != old.shape or (seen.rows is not None and old.shape[0] != seen.rows.shape[0]):
                raise ReattendError(
                    f"Inject at {seen.site.name}: {name} must keep its shape {tuple(old.shape)}, got {tuple(value.shape)}"
                )
            value = value.to(old.device, old.dtype)
            rows = seen.rows
            written[name] = value if rows is None else torch.where(rows.view(-1, *[1] * (old.dim() - 1)), value, old)
        return written
