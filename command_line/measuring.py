"""`reattend profile`, `eval`, `analyse`: what can be learned and measured of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..interventions.errors import ReattendError
from .console import print_json
from .options import MODEL_HELP, Debug, Device, Dtype, Force, Json, Model, Recipes, Seed, Settings


def profile(
    recipe: Annotated[str, typer.Argument(help="a recipe that learns about a model", show_default=False)],
    model: Model,
    out: Annotated[
        str, typer.Option("--out", "-o", help="the .safetensors file to write; without it, kept for recipes that look for it")
    ] = "",
    force: Force = False,
    set_: Settings = [],  # noqa: B006
    device: Device = "",
    dtype: Dtype = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Let a recipe learn what it needs about a model, and keep it in a file."""
    from ..comparison.arguments import settings_of
    from ..comparison.loading import load
    from ..hooks import sites as sites_of
    from ..recipes import Recipe, cached_profile, recipe_class
    from ..recipes.kit.checks import check_output
    from ..recipes.kit.profile import cached_path

    cls = recipe_class(recipe)
    if cls.profile.__func__ is Recipe.profile.__func__:  # type: ignore[attr-defined]
        raise ReattendError(f"recipe {cls.slug!r} has no profiling step")
    if out:
        check_output(out, "--out", overwrite=force, remedy="--force")
    options = {key.partition(".")[2] or key: value for key, value in settings_of(set_).items()}
    pipe = load(model, device=device or None, dtype=dtype or None)
    processor = getattr(pipe, "processor", None) or getattr(pipe, "tokenizer", None)
    inner = getattr(pipe, "model", pipe)
    if out:
        learned = cls.profile(inner, processor, **options)
        file = learned.save(out)
    else:
        learned, file = cached_profile(cls, inner, processor, refresh=True, **options), cached_path(cls.slug, sites_of(inner))
    if as_json:
        tensors = {name: list(t.shape) for name, t in learned.tensors.items()}
        print_json(
            {"file": str(file), "recipe": learned.recipe, "model": learned.model, "tensors": tensors, "facts": learned.facts}
        )
    else:
        typer.echo(f"profile: {file}")


def eval_(
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP, show_default=False)] = "",
    suite: Annotated[
        list[str],
        typer.Option("--suite", "-s", help="suites, as pope,chair:noise=1.1; without it they are listed", show_default=False),
    ] = [],  # noqa: B006
    recipes: Annotated[
        list[str], typer.Option("--recipes", "-r", help="variants, as none,var:move=0.2,vhr+var; none = the plain model")
    ] = ["none"],  # noqa: B006
    set_: Annotated[
        list[str], typer.Option("--set", help="parameter of a recipe or suite, as var.move=0.6", show_default=False)
    ] = [],  # noqa: B006
    count: Annotated[int, typer.Option("--count", "-n", help="scenes or texts per suite")] = 200,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option("--batch", help="items at once; 0 = the suite's own", show_default=False)] = 0,
    resamples: Annotated[int, typer.Option("--resamples", help="resamples of the intervals")] = 2000,
    out: Annotated[
        str, typer.Option("--out", "-o", help="folder for answers and results; a second run goes on there")
    ] = "reattend-eval",
    device: Device = "",
    dtype: Dtype = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a model on suites of questions, plain and under recipes; also under `accelerate launch -m reattend eval ...`."""
    from ..evaluation import evaluate, list_suites
    from ..evaluation.arguments import prepare
    from ..evaluation.processes import Team

    if not suite:
        listed = list_suites()
        print_json(listed) if as_json else typer.echo("\n".join(f"{name:14} {does}" for name, does in listed.items()))
        return
    if not model:
        raise ReattendError("name a model with --model")
    suites, variants = prepare(suite, recipes, set_)
    from ..comparison.loading import load

    team = Team.current()
    pipe = load(model, device=device or team.device, dtype=dtype or None)
    size = {"count": count, "seed": seed, "batch": batch or None, "resamples": resamples}
    result = evaluate(pipe, suites, variants, out=out, name=model, **size)
    if not team.main:
        return
    if as_json:
        print_json(result.as_dict())
    else:
        result.print()
        typer.echo(f"results: {Path(out) / 'results.json'}")
    if result.kept is not None:
        typer.echo(f"earlier results, of other settings: {result.kept}", err=True)


def analyse(
    model: Model,
    text: Annotated[
        list[str], typer.Option("--text", "-t", help="a text to read, or @file; repeat for several", show_default=False)
    ] = [],  # noqa: B006
    file: Annotated[
        str, typer.Option("--file", "-f", help="a file of texts with empty lines between them", show_default=False)
    ] = "",
    length: Annotated[int, typer.Option("--length", help="tokens of each text that are read")] = 64,
    epsilon: Annotated[float, typer.Option("--epsilon", help="mean weight from which a position is a sink")] = 0.3,
    stack: Annotated[str, typer.Option("--stack", help="which layers; `reattend sites` lists the stacks")] = "decoder",
    recipe: Recipes = [],  # noqa: B006
    set_: Settings = [],  # noqa: B006
    device: Device = "",
    dtype: Dtype = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Look inside a model: attention sinks, massive activations, rhythm; with --recipe, the model under it."""
    from contextlib import nullcontext

    from ..analysis import analyse as analyse_
    from ..comparison.arguments import recipes_of, texts_of
    from ..comparison.loading import load
    from ..recipes import apply

    texts = texts_of(text, file)
    chosen = recipes_of(recipe, set_) if recipe or set_ else []
    pipe = load(model, device=device or None, dtype=dtype or None)
    with apply(pipe, *chosen) if chosen else nullcontext():
        found = analyse_(pipe, texts or None, length=length, epsilon=epsilon, stack=stack)
    if as_json:
        print_json(found.as_dict())
    else:
        found.print()
