"""The command line: `reattend` and `python -m reattend`."""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .interventions.errors import ReattendError, ReattendWarning

app = typer.Typer(
    name="reattend",
    help="Make a pretrained model look somewhere else, without training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_state = {"debug": False}


def _debug(value: bool) -> bool:
    _state["debug"] = value or _state["debug"]
    return value


MODEL_HELP = "hub id, folder, zoo:NAME, or smollm2 (the last two need no network)"
Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="print JSON and nothing else")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error", callback=_debug, is_eager=True)]
Recipes = Annotated[
    list[str], typer.Option("--recipe", "-r", help="recipe name or file.yaml; repeat to combine", show_default=False)
]
Settings = Annotated[
    list[str], typer.Option("--set", help="parameter as key=value, with several recipes name.key=value", show_default=False)
]
Text = Annotated[str, typer.Option("--text", "--prompt", "-t", help="the input text, or @file", show_default=False)]
Image = Annotated[str, typer.Option("--image", "-i", help="an input picture", show_default=False)]
Raw = Annotated[bool, typer.Option("--raw", help="give the text as it is, without the model's chat template")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="how much text at most")]
Steps = Annotated[int, typer.Option("--steps", min=0, help="denoising steps; 0 = the pipeline's own", show_default=False)]
Sample = Annotated[bool, typer.Option("--sample", help="sample with the seed instead of taking the likeliest token")]
Seed = Annotated[int, typer.Option("--seed", help="random seed")]
Device = Annotated[
    str, typer.Option("--device", help="cpu, cuda:0, ...; default: the first GPU, or the CPU", show_default=False)
]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, float16, bfloat16; default: as stored", show_default=False)]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Registers a command; its errors become one line on stderr: bad input exits with 2, anything unforeseen with 1."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", ReattendWarning)
                warnings.showwarning = _warn
                function(*args, **kwargs)
        except ReattendError as error:
            _fail(error, 2)
        except (typer.Exit, typer.Abort, KeyboardInterrupt):
            raise
        except Exception as error:
            name = type(error).__name__
            _fail(RuntimeError(f"{name}: {' '.join(str(error).split())} (run again with --debug for the traceback)"), 1, error)

    return app.command(name=function.__name__.rstrip("_"))(guarded)


def _fail(error: Exception, code: int, cause: Exception | None = None) -> None:
    if _state["debug"]:
        raise cause or error
    typer.echo(f"error: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(code)


def _warn(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, ReattendWarning):
        typer.echo(f"warning: {message}", err=True)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"reattend {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="print the version", callback=_version, is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    _state["debug"] = debug or _state["debug"]


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


@command
def list_(
    family: Annotated[str, typer.Option("--family", help="only this family of methods", show_default=False)] = "",
    kind: Annotated[
        str, typer.Option("--kind", help="only methods for llm, lvlm, diffusion, vision, speech", show_default=False)
    ] = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the recipes."""
    from .recipes import list_recipes

    found = list_recipes()
    families = sorted({f for info in found.values() for f in info.families})
    kinds = sorted({k for info in found.values() for k in info.kinds})
    for name, value, known in (("--family", family, families), ("--kind", kind, kinds)):
        if value and value not in known:
            raise ReattendError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    found = list_recipes(family or None, kind or None)
    if as_json:
        _print_json([{"name": name, **info.as_dict()} for name, info in found.items()])
        return
    from .comparison.catalogue import print_list

    print_list(found)


@command
def show(
    name: Annotated[str, typer.Argument(help="a recipe", show_default=False)], as_json: Json = False, debug: Debug = False
) -> None:
    """Show one recipe: what it does, its source, its parameters."""
    from .comparison.catalogue import parameters_of, print_recipe
    from .recipes import recipe_class

    cls = recipe_class(name)
    if as_json:
        _print_json({"name": cls.slug, **cls.info.as_dict(), "version": cls.version, "parameters": parameters_of(cls)})
    else:
        print_recipe(cls)


@command
def sites(model: Model, as_json: Json = False, debug: Debug = False) -> None:
    """List a model's attention sites; reads its config only, no weights."""
    from .comparison.loading import skeleton
    from .hooks import sites as find

    table = find(skeleton(model))
    _print_json({"model": table.model_name, "sites": table.rows()}) if as_json else typer.echo(str(table))


@command
def run(
    model: Model,
    recipe: Recipes = [],  # noqa: B006
    set_: Settings = [],  # noqa: B006
    text: Text = "",
    image: Image = "",
    max_new_tokens: Tokens = 64,
    steps: Steps = 0,
    sample: Sample = False,
    raw: Raw = False,
    seed: Seed = 0,
    device: Device = "",
    dtype: Dtype = "",
    out: Annotated[
        str, typer.Option("--out", "-o", help="where to write a generated picture", show_default=False)
    ] = "reattend.png",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a model under recipes."""
    from .comparison.arguments import prepare, recipes_of
    from .comparison.compare import progress_bar
    from .comparison.inputs import job_for
    from .recipes import apply

    chosen = recipes_of(recipe, set_)
    pipe, given = prepare(model, text, image, raw, max_new_tokens, steps, sample, device, dtype)
    job = job_for(pipe, seed=seed, **given)
    with apply(pipe, *chosen, tokenizer=job.tokenizer) as session, progress_bar(None, job.ticks, "running") as tick:
        result = job.run(tick)
        stats = session.stats
    output = job.show(result)
    if job.kind == "image":
        files = []
        for place, picture in enumerate(output):
            file = Path(out) if len(output) == 1 else Path(out).with_stem(f"{Path(out).stem}-{place}")
            picture.save(file)
            files.append(str(file))
        output = files
    if as_json:
        _print_json({"model": model, "recipes": [c.as_dict() for c in chosen], "seed": seed, "output": output, "stats": stats})
    elif job.kind == "prediction":
        typer.echo("\n".join(f"{share:8.3%}  {label}" for label, share in output))
    else:
        typer.echo(output if isinstance(output, str) else "\n".join(output))


@command
def compare(
    model: Model,
    recipe: Recipes = [],  # noqa: B006
    set_: Settings = [],  # noqa: B006
    text: Text = "",
    image: Image = "",
    max_new_tokens: Tokens = 64,
    steps: Steps = 0,
    sample: Sample = False,
    raw: Raw = False,
    seed: Seed = 0,
    device: Device = "",
    dtype: Dtype = "",
    html: Annotated[str, typer.Option("--html", help="also write the report as one HTML file", show_default=False)] = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a model without and with recipes on the same input, and show what changed."""
    from .comparison import compare as compare_
    from .comparison.arguments import prepare, recipes_of

    chosen = recipes_of(recipe, set_)
    pipe, given = prepare(model, text, image, raw, max_new_tokens, steps, sample, device, dtype)
    options = given.pop("options")
    given.pop("tokenizer")
    report = compare_(pipe, *chosen, seed=seed, **given, **options)
    file = report.html(html) if html else None
    if as_json:
        typer.echo(report.json())
    else:
        report.print()
        if file:
            typer.echo(f"report: {file}")


@command
def profile(
    recipe: Annotated[str, typer.Argument(help="a recipe that learns about a model", show_default=False)],
    model: Model,
    out: Annotated[
        str, typer.Option("--out", "-o", help="the .safetensors file to write; without it, kept for recipes that look for it")
    ] = "",
    set_: Settings = [],  # noqa: B006
    device: Device = "",
    dtype: Dtype = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Let a recipe learn what it needs about a model, and keep it in a file."""
    from .comparison.arguments import settings_of
    from .comparison.loading import load
    from .hooks import sites as sites_of
    from .recipes import Recipe, cached_profile, recipe_class
    from .recipes.profile import cached_path

    cls = recipe_class(recipe)
    if cls.profile.__func__ is Recipe.profile.__func__:  # type: ignore[attr-defined]
        raise ReattendError(f"recipe {cls.slug!r} has no profiling step")
    options = {key.partition(".")[2] or key: value for key, value in settings_of(set_).items()}
    pipe = load(model, device=device or None, dtype=dtype or None)
    tokenizer = getattr(pipe, "processor", None) or getattr(pipe, "tokenizer", None)
    inner = getattr(pipe, "model", pipe)
    if out:
        learned = cls.profile(inner, tokenizer, **options)
        file = learned.save(out)
    else:
        learned, file = cached_profile(cls, inner, tokenizer, refresh=True, **options), cached_path(cls.slug, sites_of(inner))
    if as_json:
        tensors = {name: list(t.shape) for name, t in learned.tensors.items()}
        _print_json(
            {"file": str(file), "recipe": learned.recipe, "model": learned.model, "tensors": tensors, "facts": learned.facts}
        )
    else:
        typer.echo(f"profile: {file}")


@command
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
    from .evaluation import evaluate, list_suites
    from .evaluation.arguments import prepare
    from .evaluation.processes import Team

    if not suite:
        listed = list_suites()
        _print_json(listed) if as_json else typer.echo("\n".join(f"{name:14} {does}" for name, does in listed.items()))
        return
    if not model:
        raise ReattendError("name a model with --model")
    suites, variants = prepare(suite, recipes, set_)
    from .comparison.loading import load

    team = Team.current()
    pipe = load(model, device=device or team.device, dtype=dtype or None)
    size = {"count": count, "seed": seed, "batch": batch or None, "resamples": resamples}
    result = evaluate(pipe, suites, variants, out=out, name=model, **size)
    if not team.main:
        return
    if as_json:
        _print_json(result.as_dict())
    else:
        result.print()
        typer.echo(f"results: {Path(out) / 'results.json'}")


@command
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

    from .analysis import analyse as analyse_
    from .comparison.arguments import recipes_of, texts_of
    from .comparison.loading import load
    from .recipes import apply

    texts = texts_of(text, file)
    chosen = recipes_of(recipe, set_) if recipe or set_ else []
    pipe = load(model, device=device or None, dtype=dtype or None)
    with apply(pipe, *chosen) if chosen else nullcontext():
        found = analyse_(pipe, texts or None, length=length, epsilon=epsilon, stack=stack)
    if as_json:
        _print_json(found.as_dict())
    else:
        found.print()


@command
def demo(
    out: Annotated[str, typer.Option("--out", "-o", help="folder for the report")] = "reattend-demo",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare recipes on a small language model, offline; writes report.html."""
    from .comparison.demo import demo as run_demo

    reports, file = run_demo(Path(out), quiet=as_json)
    if as_json:
        _print_json({"report": str(file), "comparisons": [r.as_dict() for r in reports]})


def main() -> None:
    """Entry point."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
