"""The recipes as `reattend list` and `reattend show` print them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..recipes import Info, Recipe


def print_list(found: Mapping[str, Info]) -> None:
    """One line per recipe."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("recipe", "for", "year", "what it does"):
        table.add_column(column, no_wrap=column != "what it does")
    for name, info in found.items():
        does = info.does if info.status == "ready" else f"({info.status}) {info.does}"
        table.add_row(Text(name, style="cyan"), ", ".join(info.kinds), str(info.year), Text(does))
    Console().print(table)


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
        f"for {', '.join(info.kinds)}; cost: {info.cost}; status: {info.status}",
        *([f"profiling: {info.profiling}"] if info.profiling else []),
    ]
    console.print(Text("\n".join(lines), style="dim"))
    table = Table("parameter", "default", "", box=None, pad_edge=False, header_style="dim")
    for p in parameters_of(cls):
        table.add_row(Text(p["name"], style="cyan"), Text("required" if p["required"] else repr(p["default"])), Text(p["help"]))
    console.print(table)
