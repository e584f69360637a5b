"""`edit`: an intervention of the user's own, as a session like any recipe's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..interventions import Edit, ReattendError, Site
from .doors.edits import Edits, Intervention
from .doors.spans import Spans
from .plan import Plan
from .session import Session, attach
from .sites.discovery import original_of
from .sites.discovery import sites as sites_of
from .sites.table import SiteTable

Selector = SiteTable | Callable[[SiteTable], SiteTable]


def edit(
    model: Any,
    intervention: Intervention | Edit | Sequence[Edit],
    *,
    sites: Selector | None = None,
    passages: Mapping[str, str | Sequence[str]] | None = None,
    label: str = "",
    isolated: bool = False,
    tokenizer: Any = None,
) -> Session:
    """Starts a session of your own: `with reattend.edit(model, lambda call: Gain(columns=call.columns("bos"), factor=0.5)): ...`.

    intervention: a function from a `Call` to an edit, a list of edits, or None where it leaves the call alone; or edits that are the
    same at every call. sites: a table (`reattend.sites(model).layers(8, 15)`) or a function that takes the whole table and returns a
    part of it; default all sites that can be edited, among them linear attention (Sana) where edits are given that are all of outputs.
    passages: {role: passage or passages of the prompt}, which the intervention finds as `call.columns(role)`. label: its name in
    `session.stats`, default the function's. isolated, tokenizer: as for `reattend.apply`.
    Raises ReattendError or UnsupportedError before anything runs, and for what the intervention returns at the first call.
    """
    model = original_of(model)
    label = label or getattr(intervention, "__name__", "edit").replace("<lambda>", "edit")
    make, outputs = _intervention(intervention)
    names = None if sites is None else [site.name for site in _chosen(model, sites)]
    spans = [Spans(role, texts=[_texts(role, found)]) for role, found in (passages or {}).items()]

    def plans(model: Any) -> list[Plan]:
        table = sites_of(model)
        chosen = table.where(lambda site: _fits(site, outputs) if names is None else site.name in names)
        return [Plan(label, [*spans, Edits(chosen, make, label, outputs)])]

    if tokenizer is None:
        tokenizer = getattr(model, "processor", None) or getattr(model, "tokenizer", None)
    return attach(model, plans(model), isolated=isolated, tokenizer=tokenizer, again=plans)


def _fits(site: Site, outputs: bool) -> bool:
    return site.supported or (outputs and site.route == "linear")


def _intervention(given: Any) -> tuple[Intervention, bool]:
    """The function, and whether it is known to edit outputs alone."""
    if callable(given):
        function: Any = given  # what it returns is looked at call by call
        return function, False
    edits = [given] if isinstance(given, Edit) else list(given) if isinstance(given, (list, tuple)) else []
    if not edits or not all(isinstance(item, Edit) for item in edits):
        raise ReattendError(
            f"intervention must be a function from a call to edits, or edits as Gain(columns=[0], factor=0.5), got {given!r:.80}"
        )
    return lambda call: edits, all(edit.level == "output" for edit in edits)


def _chosen(model: Any, selector: Selector) -> SiteTable:
    table = sites_of(model)
    chosen = selector if isinstance(selector, SiteTable) else selector(table) if callable(selector) else None
    if not isinstance(chosen, SiteTable):
        raise ReattendError(
            "sites must be a table as reattend.sites(model).layers(8, 15), or a function from the whole table to such a part, "
            f"got {selector!r:.80}" + ("" if chosen is None else f", which returned {chosen!r:.80}")
        )
    strange = next((site.name for site in chosen if site.name not in table.modules), None)
    if strange is not None:
        raise ReattendError(
            f"sites holds {strange!r}, which is no attention site of this {table.model_name}: was the table made for another?"
        )
    return chosen


def _texts(role: str, found: Any) -> list[str]:
    texts = [found] if isinstance(found, str) else list(found) if isinstance(found, (list, tuple)) else []
    if not texts:
        raise ReattendError(f"passages[{role!r}] must be a text of the prompt or a list of such texts, got {found!r:.80}")
    return texts
