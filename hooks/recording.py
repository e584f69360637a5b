"""Capture without the matrix: what the attention of each site looks like after all edits, as a few numbers per call.

Kept per site and step: the mass on each token role, the entropy, the heaviest columns, and the full maps of the few rows that were
asked for. Rows are read in chunks, so that memory grows with the number of keys and not with its square.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..interventions import Call, Edit, ReattendError, Reorder, TokenMap, row_weights
from ..interventions.engine.census import at_positions, keeps_positions
from ..interventions.engine.kernels import rows_per_chunk
from .doors.capture import Capture
from .doors.spans import Spans
from .plan import Plan
from .session import Session
from .sites.discovery import sites
from .sites.table import SiteTable

# From the least to the most specific: a token that has several roles counts for the last one. The user's spans come after these.
ROLE_ORDER = ("prompt", "generated", "text", "assistant", "user", "system", "image", "bos")
# Rows that a call without an obvious "current" row (an encoder, a denoiser) is judged by, unless the caller says otherwise.
SAMPLED_ROWS = 256


@dataclass
class Reading:
    """One call, batch kept, on the CPU. Means over the rows that were read. Weights of an edit that takes values away (vsf) are negative:
    so are their mass and their places in maps, rows do not add up to 1, and the entropy is that of their sizes.

    mass: {role: [B, H]}; the roles are disjoint and add up to the rows' sum. entropy [B, H] in nats. columns [B, k] long: absolute positions of
    the heaviest columns, mean over heads, with their `weights` [B, k]. maps: {absolute row: [B, H, Tk]} for the rows asked for.
    spread [B, n]: the weight of every position, mean over heads, where it was asked for and columns still stand for single tokens.
    """

    phase: str
    step: int
    rows: int
    mass: dict[str, Tensor]
    entropy: Tensor
    columns: Tensor
    weights: Tensor
    maps: dict[int, Tensor] = field(default_factory=dict)
    spread: Tensor | None = None


class Recording:
    """Collects a `Reading` per site and call: `with capture(model) as recording: pipe(...)`.

    readings: {site name: [Reading, ...]}. dropped: calls beyond `max_steps` per site, which were not read. tokens: the token map of the
    last call that had one.
    """

    def __init__(
        self, table: SiteTable, rows: str | int, top: int, maps: Iterable[int], max_steps: int, spread: bool = False
    ) -> None:
        if rows not in ("auto", "last", "all") and not (isinstance(rows, int) and rows > 0):
            raise ReattendError(f"rows must be 'auto', 'last', 'all' or a positive number, got {rows!r}")
        if top < 0 or max_steps < 1:
            raise ReattendError(f"top must be 0 or more and max_steps 1 or more, got {top} and {max_steps}")
        self.table, self.rows, self.top, self.max_steps = table, rows, top, max_steps
        self.maps = sorted(set(maps))
        self.spread = spread
        self.tokens: TokenMap | None = None
        self.readings: dict[str, list[Reading]] = {}
        self.dropped = 0
        self._session: Session | None = None

    def __repr__(self) -> str:
        mass = ", ".join(f"{role} {value:.2f}" for role, value in self.mass_by_role().items())
        dropped = f", {self.dropped} calls not read" if self.dropped else ""
        return f"<Recording of {len(self.table)} sites, {self.calls} calls read{dropped}{'; mass: ' + mass if mass else ''}>"

    def steps(self) -> list[Capture]:
        """The plan steps with which a session feeds this recording."""
        return [Capture(self.table, self.read)]

    def __enter__(self) -> Recording:
        assert self._session is not None, "made by capture()"
        self._session.attach()
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._session is not None
        self._session.remove()

    def read(self, call: Call, edits: Sequence[Edit]) -> None:
        assert call.site is not None
        kept = self.readings.setdefault(call.site.name, [])
        if len(kept) >= self.max_steps:
            self.dropped += 1
            return
        self.tokens = call.tokens or self.tokens
        index, chosen = self._rows(call)
        kept.append(_reading(call, edits, index, chosen, self.top, self._wanted_maps(call), self.spread))

    def _rows(self, call: Call) -> tuple[Tensor, Tensor]:
        """(index [R] of rows to read, bool [B, R] which of them count for each sequence): padding never counts."""
        device, queries = call.query.device, call.num_queries
        real = torch.ones(call.batch, queries, dtype=torch.bool, device=device)
        if call.tokens is not None and "padding" in call.tokens:
            real = ~call.query_rows("padding")
        how = self.rows
        if how == "auto":
            how = "last" if call.site is not None and call.site.causal else SAMPLED_ROWS
        if how == "last":
            places = torch.arange(1, queries + 1, device=device)
            last = (real * places).argmax(dim=1)
            index = last.unique()
            return index, (index[None] == last[:, None]) & real[:, index]
        count = queries if how == "all" else min(int(how), queries)
        index = torch.linspace(0, queries - 1, count, device=device).round().long()
        return index, real[:, index]

    def _wanted_maps(self, call: Call) -> list[int]:
        start = call.total - call.num_queries
        return [place for place in self.maps if start <= place < call.total]

    # -- what was seen, in a few numbers -----------------------------------------------------------------------------

    @property
    def calls(self) -> int:
        return sum(len(r) for r in self.readings.values())

    def mass_by_role(self, phase: str | None = None) -> dict[str, float]:
        """Mean over sites, steps, heads and batch of the attention mass on each token role; empty where tokens are not known."""
        return _mean_mass([r for each in self.readings.values() for r in each if phase in (None, r.phase)])

    def mass_by_layer(self, stack: str = "decoder") -> dict[int, dict[str, float]]:
        """{layer: {role: mass}} of the self-attention sites of one stack."""
        chosen = [s for s in self.table if s.stack == stack and s.name in self.readings]
        return {s.layer: _mean_mass(self.readings[s.name]) for s in chosen}

    def spread_by_layer(self, length: int, stack: str = "decoder") -> dict[int, Tensor]:
        """{layer: [length]}: weight of each of the first positions of the first sequence, mean over steps, heads and rows.

        Needs `capture(spread=True)`; layers whose columns were merged are left out.
        """
        found = {}
        for site in self.table:
            spreads = [r.spread[0, :length] for r in self.readings.get(site.name, []) if r.spread is not None]
            spreads = [s for s in spreads if s.numel() == length]
            if site.stack == stack and spreads:
                found[site.layer] = torch.stack(spreads).mean(dim=0)
        return found

    def entropy(self) -> float | None:
        """Mean entropy of the rows that were read, in nats."""
        values = [float(r.entropy.mean()) for each in self.readings.values() for r in each]
        return sum(values) / len(values) if values else None

    def top_columns(self, batch_row: int = 0) -> list[tuple[int, float]]:
        """[(absolute position, mean weight)] of the columns that most often stood out, heaviest first."""
        total: dict[int, float] = {}
        for each in self.readings.values():
            for r in each:
                for place, weight in zip(r.columns[batch_row].tolist(), r.weights[batch_row].tolist(), strict=True):
                    total[place] = total.get(place, 0.0) + weight
        ranked = sorted(total.items(), key=lambda item: -item[1])[: self.top]
        return [(place, weight / max(1, self.calls)) for place, weight in ranked]


def capture(
    model: Any,
    *,
    where: SiteTable | None = None,
    rows: str | int = "auto",
    top: int = 8,
    maps: Iterable[int] = (),
    max_steps: int = 256,
    spread: bool = False,
    isolated: bool = False,
    tokenizer: Any = None,
    spans: Sequence[Spans] = (),
) -> Recording:
    """Reads a model's attention while the returned context manager is open, after the edits of whatever recipes are at work.

    where: the sites to read, default all that can be. rows: which query rows stand for a call: "last" (the one that predicts the next
    token), "all", a number of evenly spaced ones, or "auto" (last in causal decoders, 256 elsewhere). maps: absolute positions of
    rows whose full maps are kept. spread: also keep the weight of every column, mean over heads and rows. tokenizer: of a bare model,
    for roles that its chat template marks. spans: passages to tell apart as roles of their own. Outputs stay bit-identical. Raises
    ReattendError for a model without readable attention.
    """
    if where is not None and not isinstance(where, SiteTable):
        raise ReattendError(
            f"where must be a table of sites, as reattend.sites(model).layers(2, 5) gives it, got {where!r:.80}"
        )
    table = sites(model).where(lambda s: s.supported) if where is None else where
    if not len(table):
        raise ReattendError(table.missing or f"no attention site of this {type(model).__name__} can be read")
    recording = Recording(table, rows, top, maps, max_steps, spread)
    tokenizer = tokenizer or getattr(model, "processor", None) or getattr(model, "tokenizer", None)

    def plans(_: Any) -> list[Plan]:
        return [Plan("capture", [*spans, *recording.steps()])]

    recording._session = Session(model, plans(model), isolated=isolated, tokenizer=tokenizer, again=plans)
    return recording


def _reading(
    call: Call, edits: Sequence[Edit], index: Tensor, chosen: Tensor, top: int, maps: list[int], spread: bool = False
) -> Reading:
    names, membership = _membership(call, edits)
    batch, heads = call.batch, call.num_heads
    counts = chosen.sum(dim=1).clamp_min(1)
    mass = entropy = column_sum = None
    step = rows_per_chunk(batch, heads, call.num_keys, call.query.device)
    for start in range(0, index.numel(), step):
        weights = row_weights(call, edits, index[start : start + step])
        share = (chosen[:, start : start + step].to(weights.dtype) / counts[:, None])[:, None, :, None]
        part_entropy = (torch.special.entr(weights.abs()) * share).sum(dim=(2, 3))
        per_column = (weights * share).sum(dim=2)  # [B, H, Tk]
        entropy = part_entropy if entropy is None else entropy + part_entropy
        column_sum = per_column if column_sum is None else column_sum + per_column
    assert entropy is not None and column_sum is not None
    if membership is not None:
        if column_sum.shape[2] > membership.shape[1]:  # columns that an edit appended
            names = [*names, "appended"]
            membership = pad(membership, (0, column_sum.shape[2] - membership.shape[1]), value=len(names) - 1)
        one_hot = torch.nn.functional.one_hot(membership, len(names)).to(column_sum.dtype)
        mass = torch.einsum("bhk,bkr->bhr", column_sum, one_hot).cpu()
        present = membership.flatten().bincount(minlength=len(names)).cpu()
        result = {name: mass[:, :, i] for i, name in enumerate(names) if present[i]}
        if call.sinks is not None:
            result["learned sink"] = (1 - column_sum.sum(dim=2)).cpu()
    else:
        result = {}
    places = None
    if spread and keeps_positions(edits):
        places = pad(at_positions(column_sum.mean(dim=1), edits, call.num_keys), (call.key_start, 0)).float().cpu()
    kept = min(top, call.num_keys)
    heaviest = column_sum.mean(dim=1)[:, : call.num_keys].topk(kept, dim=1)
    step_maps = {}
    for place in maps:
        row = torch.tensor([place - (call.total - call.num_queries)], device=call.query.device)
        step_maps[place] = row_weights(call, edits, row)[:, :, 0].float().cpu()
    return Reading(
        call.clock.phase,
        call.clock.step,
        index.numel(),
        result,
        entropy.cpu(),
        (heaviest.indices + call.key_start).cpu(),
        heaviest.values.cpu(),
        step_maps,
        places,
    )


def _membership(call: Call, edits: Sequence[Edit]) -> tuple[list[str], Tensor | None]:
    """(role names, long [B, Tk] the role of each column); None where the call knows no tokens, or its columns stand for others."""
    if call.tokens is None or not keeps_positions(edits):
        return [], None
    known = list(call.tokens.roles)
    spans = [name for name in known if name not in ROLE_ORDER and name != "padding"]
    names = ["other", *(n for n in ROLE_ORDER if n in call.tokens), *spans, *(["padding"] if "padding" in known else [])]
    membership = torch.zeros(call.batch, call.num_keys, dtype=torch.long, device=call.query.device)
    for number, name in enumerate(names[1:], start=1):
        membership[call.columns(name)] = number
    for edit in edits:
        if isinstance(edit, Reorder):
            membership = membership.gather(1, edit.order.to(membership.device).view(-1, call.num_keys).expand(call.batch, -1))
    return names, membership


def _mean_mass(readings: Sequence[Reading]) -> dict[str, float]:
    """Mean mass per role; a role that a call does not have counts as 0 there."""
    known = [r for r in readings if r.mass]
    total: dict[str, float] = {}
    for reading in known:
        for role, mass in reading.mass.items():
            total[role] = total.get(role, 0.0) + float(mass.mean())
    return {role: value / len(known) for role, value in total.items()}
