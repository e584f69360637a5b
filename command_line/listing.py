"""`reattend list`, `show`, `sites`: what there is, without running a model."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..interventions.errors import ReattendError
from .console import print_json
from .options import Debug, Json, Model

if TYPE_CHECKING:
    from ..hooks import SiteTable

# kinds of models that there are recipes or suites for, and families of recipes: written out, so that help and completion import no torch;
# a test compares them
KINDS = ("diffusion", "llm", "lvlm", "vision")
FAMILIES = ("calibration", "decoding", "guidance", "heads", "reading", "reweighting", "sinks", "sparsity")


def _one_of(known: tuple[str, ...], name: str, help: str) -> typer.models.OptionInfo:
    """An option with these values, in help and completion; what is refused is the command's to say, in one line."""
    return typer.Option(
        name,
        help=help,
        metavar="|".join(known),
        autocompletion=lambda incomplete: [value for value in known if value.startswith(incomplete)],
        show_default=False,
    )


def list_(
    family: Annotated[str, _one_of(FAMILIES, "--family", "only this family of methods")] = "",
    kind: Annotated[str, _one_of(KINDS, "--kind", "only methods for this kind of model")] = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the recipes by the problem they are a remedy for."""
    from ..recipes import list_recipes
    from ..recipes.kit.registry import NOTHING, measured

    for name, value, known in (("--family", family, FAMILIES), ("--kind", kind, KINDS)):
        if value and value not in known:
            raise ReattendError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    found = list_recipes(family or None, kind or None)
    if as_json:
        print_json(
            [{"name": name, **info.as_dict(), "measured": measured().get(name, NOTHING)} for name, info in found.items()]
        )
        return
    from ..comparison.catalogue import print_list

    print_list(found)


def show(
    name: Annotated[str, typer.Argument(help="a recipe", show_default=False)], as_json: Json = False, debug: Debug = False
) -> None:
    """Show one recipe: what it does, its source, its parameters."""
    from ..comparison.catalogue import parameters_of, print_recipe
    from ..recipes import recipe_class
    from ..recipes.kit.registry import NOTHING, measured

    cls = recipe_class(name)
    if as_json:
        known = measured().get(cls.slug, NOTHING)
        print_json(
            {
                "name": cls.slug,
                **cls.info.as_dict(),
                "measured": known,
                "version": cls.version,
                "parameters": parameters_of(cls),
            }
        )
    else:
        print_recipe(cls)


def sites(model: Model, as_json: Json = False, debug: Debug = False) -> None:
    """List a model's attention sites; reads its config, no weights."""
    from ..comparison.loading import skeleton
    from ..hooks import sites as find

    table = find(skeleton(model))
    if as_json:
        print_json({"model": table.model_name, "sites": table.rows()})
    else:
        typer.echo(f"{table.model_name}: {len(table)} attention sites (read from its config, no weights loaded)")
        typer.echo("\n".join(sites_by_layers(table)))
        if numbered := layers_of_recipes(table):
            typer.echo(numbered)


def layers_of_recipes(table: SiteTable) -> str:
    """How recipes for pictures number a denoiser's layers, whose numbers begin anew in each stack of the table; "" for other models."""
    from ..recipes.kit.denoisers import image_layers

    found = []
    for stack, group in itertools.groupby(image_layers(table).items(), key=lambda item: item[1][0].stack):
        layers = [layer for layer, _ in group]
        found.append(f"{stack} {layers[0]}" + (f"-{layers[-1]}" if len(layers) > 1 else ""))
    return f"recipes for pictures number all self-attention in one row (layers=, heads=): {', '.join(found)}" if found else ""


def sites_by_layers(table: SiteTable) -> list[str]:
    """The sites in lines: layers that follow each other and are alike stand in one, as 0-5; names come last, for they are long."""

    def facts(site: Any) -> tuple[str, ...]:
        sizes = ("?" if v is None else str(v) for v in (site.num_heads, site.num_kv_heads, site.head_dim))
        return site.stack, site.kind, *sizes, "yes" if site.causal else "no", site.problem or ""

    def pattern(site: Any) -> str:
        return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", site.name)

    lines: list[tuple[str, ...]] = [("layers", "stack", "kind", "heads", "kv", "dim", "causal", "site", "")]
    for (name, (*known, problem)), group in itertools.groupby(table, key=lambda s: (pattern(s), facts(s))):
        alike = list(group)
        layers = str(alike[0].layer) if len(alike) == 1 else f"{alike[0].layer}-{alike[-1].layer}"
        lines.append((layers, *known, alike[0].name if len(alike) == 1 else name, problem))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
