"""The recipes as `reattend list` and `reattend show` print them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..recipes import Info, Recipe
from ..recipes.kit.base import COSTS, Problem
from ..recipes.kit.registry import NOTHING, measured


def print_list(found: Mapping[str, Info]) -> None:
    """By problem: what is a remedy for it, what that did when it was measured, what it costs and needs."""
    console, width = Console(), max(map(len, found), default=0)
    for problem in (*get_args(Problem), None):
        chosen = {name: info for name, info in found.items() if (problem in info.problems if problem else not info.problems)}
        if not chosen:
            continue
        console.print(Text(f"{problem or 'other'}", style="bold"))
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, min_width=width + 2)
        table.add_column(overflow="fold")
        for name, info in chosen.items():
            does = Text(info.does if info.status == "ready" else f"({info.status}) {info.does}")
            table.add_row(Text(f"  {name}", style="cyan"), does.append(f"\n{_facts(name, info)}", style="dim"))
        console.print(table)
    console.print(
        Text(
            f"Cost is measured, as a multiple of the untouched model's time, or a word: {_meaning(COSTS)}. Figures are of small models; "
            "docs/results.md tells the rest. `reattend show NAME`: parameters, paper.",
            style="dim",
        )
    )


def _facts(name: str, info: Info) -> str:
    """For which models, the effect that was measured, cost and profiling, in a line."""
    known = measured().get(name, NOTHING)
    profiling = (
        "profiling optional"
        if info.profiling.startswith("optional")
        else "needs profiling"
        if info.profiling
        else "no profiling"
    )
    did = f"measured: {known['did'][0]}" if known["did"] else "not measured"
    return f"{', '.join(info.kinds)}; {did}; cost: {known['cost'] or info.cost}; {profiling}"


def _meaning(words: Mapping[str, str]) -> str:
    """What words of cost mean; one alone needs no name."""
    return next(iter(words.values())) if len(words) == 1 else "; ".join(f"{word} = {text}" for word, text in words.items())


def parameters_of(cls: type[Recipe]) -> list[dict[str, Any]]:
    """Name, default, help and JSON schema of each parameter."""
    schema = cls.model_json_schema(mode="serialization").get("properties", {})
    return [
        {
            "name": name,
            "required": field.is_required(),
            "default": None if field.is_required() else field.get_default(call_default_factory=True),
            "help": field.description or "",
            "schema": schema.get(name, {}),
        }
        for name, field in cls.model_fields.items()
    ]


def print_recipe(cls: type[Recipe]) -> None:
    """What a recipe does, where it comes from, and its parameters."""
    info, console = cls.info, Console()
    console.print(Text(cls.slug, style="bold").append(f"  {info.does}", style="not bold"))
    code = f"official code: {info.code or 'none known'}" + (f" ({info.licence})" if info.licence else "")
    lines = [
        f"{info.paper}, {info.year}, https://arxiv.org/abs/{info.arxiv}",
        code,
        f"for {', '.join(info.kinds)}; cost: {info.cost} ({_meaning(info.costs)}); status: {info.status}",
        *([f"profiling: {info.profiling}"] if info.profiling else []),
    ]
    console.print(Text("\n".join(lines), style="dim"))
    known = measured().get(cls.slug, NOTHING)
    first = ", ".join(f"{k}={v!r}" for k, v in info.try_first.items()) or "the defaults"
    swept = "; ".join(f"{k} {', '.join(map(repr, values))}" for k, values in info.sweep.items())
    told = [f"when {problem}" for problem in info.problems]
    told += [f"try first: {first}" + (f"; then compare: {swept}" if swept else "")]
    told += [f"measured: {text}" for text in known["did"]] + ([f"costs: {known['cost']}"] if known["cost"] else [])
    console.print(Text("\n".join(told)))
    table = Table("parameter", "default", "", box=None, pad_edge=False, header_style="dim")
    for p in parameters_of(cls):
        table.add_row(Text(p["name"], style="cyan"), Text("required" if p["required"] else repr(p["default"])), Text(p["help"]))
    console.print(table)
