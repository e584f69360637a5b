"""The table of a model's attention sites, and what recipes say of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from torch import nn

from ...interventions import ReattendError, Site
from .canvas import Canvas
from .denoisers import STACKS

# what stacks and kinds are called, on whatever model
NAMES = {
    "stack": {
        "decoder", "encoder", "vision", "vision.pool", "text_encoder", "mask_decoder", "audio", "connector", "vae", "controlnet",
        *STACKS,
    },
    "kind": {"self", "cross", "joint", "temporal"},
}  # fmt: skip


class SiteTable(Sequence):
    """The attention sites of a model, in execution order of their stacks; prints as a table and can be narrowed down.

    missing: why nothing is in the table, "" where something is or where it was made empty. canvas: how large a denoiser's own pictures are.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        modules: dict[str, nn.Module],
        model_name: str = "model",
        config: Any = None,
        missing: str = "",
        canvas: Canvas | None = None,
    ) -> None:
        self.sites = list(sites)
        self.missing = missing if not self.sites else ""
        self.modules = modules
        self.model_name = model_name
        self.config = config
        self.canvas = canvas

    @overload
    def __getitem__(self, index: int) -> Site: ...

    @overload
    def __getitem__(self, index: slice) -> SiteTable: ...

    def __getitem__(self, index: int | slice) -> Site | SiteTable:
        return self.sites[index] if isinstance(index, int) else self._with(self.sites[index])

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __add__(self, other: SiteTable) -> SiteTable:
        return SiteTable(
            [*self.sites, *other.sites], {**self.modules, **other.modules}, self.model_name, self.config, canvas=self.canvas
        )

    def _with(self, sites: Sequence[Site], asked: str = "") -> SiteTable:
        missing = self.missing or (
            f"{self.model_name} has no attention site in {asked}; {self._what_there_is()}" if asked else ""
        )
        return SiteTable(sites, self.modules, self.model_name, self.config, missing, self.canvas)

    def _what_there_is(self) -> str:
        parts: dict[tuple[str, str], list[int]] = {}
        for site in self.sites:
            parts.setdefault((site.stack, site.kind), []).append(site.layer)
        found = [f"{stack!r} ({kind}, layers {min(n)} to {max(n)})" for (stack, kind), n in parts.items()]
        return f"it has {', '.join(found)}" if found else "it has none at all"

    def _check(self, what: str, given: Sequence[Any]) -> None:
        """Raises ReattendError for a stack or kind that is on no model."""
        own = {getattr(site, what) for site in self.sites}
        for name in given:
            if name not in NAMES[what] | own and not any(str(known).startswith(f"{name}.") for known in own):
                raise ReattendError(
                    f"{what}({name!r:.60}): there is no such {what}; {self.missing or self._what_there_is()}; on other models there "
                    f"are {', '.join(sorted(NAMES[what]))}"
                )

    def where(self, condition: Callable[[Site], bool]) -> SiteTable:
        return self._with([s for s in self.sites if condition(s)])

    def stack(self, *names: str) -> SiteTable:
        """Sites of these stacks; "denoiser" also takes "denoiser.double" and the like. Raises ReattendError for a name on no model."""
        self._check("stack", names)
        inside = [s for s in self.sites if any(s.stack == n or s.stack.startswith(n + ".") for n in names)]
        return self._with(inside, f"stack {' or '.join(map(repr, names))}")

    def kind(self, *kinds: str) -> SiteTable:
        """Sites of these kinds: "self", "cross", "joint", "temporal". Raises ReattendError for any other."""
        self._check("kind", kinds)
        return self._with([s for s in self.sites if s.kind in kinds], f"kind {' or '.join(map(repr, kinds))}")

    def layers(self, first: int = 0, last: int | None = None) -> SiteTable:
        """Layers first..last inclusive; negative numbers count from the end of each stack, None = the last one.

        For a list of layers there is `only`.
        """
        for name, value in (("first", first), ("last", last)):
            if isinstance(value, bool) or not isinstance(value, int | None) or (name == "first" and value is None):
                raise ReattendError(
                    f"layers(first, last) takes the first and the last layer of a range as whole numbers, got {name}={value!r:.60}; "
                    "for a list of layers use only([...])"
                )
        size = {s.stack: 1 + max(o.layer for o in self.sites if o.stack == s.stack) for s in self.sites}

        def inside(site: Site) -> bool:
            n = size[site.stack]
            low = first + n if first < 0 else first
            high = n - 1 if last is None else last + n if last < 0 else last
            return low <= site.layer <= high

        asked = f"layers {first} to {'the last' if last is None else last}"
        return self._with([s for s in self.sites if inside(s)], asked)

    def only(self, layers: Iterable[int]) -> SiteTable:
        """The sites of these layers, by number from 0; for a range there is `layers`."""
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            raise ReattendError(f"only([...]) takes a list of layers, got {layers!r:.60}; for a range use layers(first, last)")
        wanted = list(layers)
        return self._with([s for s in self.sites if s.layer in wanted], f"layers {wanted!r:.60}")

    @property
    def num_layers(self) -> int:
        return len({(s.stack, s.layer) for s in self.sites})

    @property
    def problems(self) -> list[Site]:
        return [s for s in self.sites if s.problem]

    @property
    def refusal(self) -> str:
        """Why sites of the table cannot be intercepted, with the name of the first one; "" where all can."""
        return self.refused()

    def refused(self, outputs: bool = False) -> str:
        """The same; outputs: where only outputs are to be edited, and only values read, which linear attention has too."""
        bad = [site for site in self.problems if not (outputs and site.route == "linear")]
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        return f"{bad[0].name}{more} cannot be intercepted: {bad[0].problem}" if bad else ""

    def module(self, site: Site) -> nn.Module:
        return self.modules[site.name]

    def rows(self) -> list[dict[str, Any]]:
        """One dict per site, for JSON."""
        keys = ("name", "layer", "stack", "kind", "num_heads", "num_kv_heads", "head_dim", "causal", "route", "problem")
        return [{k: getattr(s, k) for k in keys} for s in self.sites]

    def __str__(self) -> str:
        if not self.sites:
            return f"{self.model_name}: no attention site" + (f" ({self.missing})" if self.missing else "")
        head = ("site", "stack", "layer", "kind", "heads", "kv", "dim", "causal", "problem" if self.problems else "")
        lines: list[tuple[str, ...]] = [head]
        for s in self.sites:
            known = [("?" if v is None else str(v)) for v in (s.num_heads, s.num_kv_heads, s.head_dim)]
            lines.append((s.name, s.stack, str(s.layer), s.kind, *known, "yes" if s.causal else "no", s.problem or ""))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines]
        return "\n".join([f"{self.model_name}: {len(self)} attention sites", *text])

    __repr__ = __str__


@dataclass(frozen=True)
class Support:
    """Whether a recipe fits a model; `reason` says why not, or what to know."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok
