"""`reattend list`, `show`, `sites`: what there is, without running a model."""

from __future__ import annotations

from typing import Annotated

import typer

from ..interventions.errors import ReattendError
from .console import print_json
from .options import Debug, Json, Model


def list_(
    family: Annotated[str, typer.Option("--family", help="only this family of methods", show_default=False)] = "",
    kind: Annotated[
        str, typer.Option("--kind", help="only methods for llm, lvlm, diffusion, vision, speech", show_default=False)
    ] = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the recipes."""
    from ..recipes import list_recipes

    found = list_recipes()
    families = sorted({f for info in found.values() for f in info.families})
    kinds = sorted({k for info in found.values() for k in info.kinds})
    for name, value, known in (("--family", family, families), ("--kind", kind, kinds)):
        if value and value not in known:
            raise ReattendError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    found = list_recipes(family or None, kind or None)
    if as_json:
        print_json([{"name": name, **info.as_dict()} for name, info in found.items()])
        return
    from ..comparison.catalogue import print_list

    print_list(found)


def show(
    name: Annotated[str, typer.Argument(help="a recipe", show_default=False)], as_json: Json = False, debug: Debug = False
) -> None:
    """Show one recipe: what it does, its source, its parameters."""
    from ..comparison.catalogue import parameters_of, print_recipe
    from ..recipes import recipe_class

    cls = recipe_class(name)
    if as_json:
        print_json({"name": cls.slug, **cls.info.as_dict(), "version": cls.version, "parameters": parameters_of(cls)})
    else:
        print_recipe(cls)


def sites(model: Model, as_json: Json = False, debug: Debug = False) -> None:
    """List a model's attention sites; reads its config only, no weights."""
    from ..comparison.loading import skeleton
    from ..hooks import sites as find

    table = find(skeleton(model))
    print_json({"model": table.model_name, "sites": table.rows()}) if as_json else typer.echo(str(table))
