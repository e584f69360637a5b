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


Model = Annotated[str, typer.Argument(help="hub id, folder, or smollm2 (from its package, no network)", show_default=False)]
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
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("recipe", "for", "year", "what it does"):
        table.add_column(column, no_wrap=column != "what it does")
    for name, info in found.items():
        does = info.does if info.status == "ready" else f"({info.status}) {info.does}"
        table.add_row(name, ", ".join(info.kinds), str(info.year), does)
    Console().print(table)


@command
def show(
    name: Annotated[str, typer.Argument(help="a recipe", show_default=False)], as_json: Json = False, debug: Debug = False
) -> None:
    """Show one recipe: what it does, its source, its parameters."""
    from .recipes import recipe_class

    cls = recipe_class(name)
    schema = cls.model_json_schema(mode="serialization")
    parameters = []
    for key, field in cls.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        parameters.append(
            {
                "name": key,
                "required": field.is_required(),
                "default": default,
                "help": field.description or "",
                "schema": schema.get("properties", {}).get(key, {}),
            }
        )
    if as_json:
        _print_json({"name": cls.slug, **cls.info.as_dict(), "version": cls.version, "parameters": parameters})
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    info, console = cls.info, Console()
    console.print(Text(cls.slug, style="bold").append(f"  {info.does}", style="not bold"))
    source = f"{info.paper}, {info.year}, https://arxiv.org/abs/{info.arxiv}"
    code = (
        f"official code {info.code}" + (f" ({info.licence})" if info.licence else "") if info.code else "no official code known"
    )
    console.print(Text(f"{source}\n{code}\nfor {', '.join(info.kinds)}; cost: {info.cost}; status: {info.status}", style="dim"))
    if info.profiling:
        console.print(Text(f"profiling: {info.profiling}", style="dim"))
    table = Table("parameter", "default", "", box=None, pad_edge=False, header_style="dim")
    for p in parameters:
        table.add_row(Text(p["name"], style="cyan"), Text("required" if p["required"] else repr(p["default"])), Text(p["help"]))
    console.print(table)


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
    from .comparison.compare import progress_bar
    from .comparison.inputs import job_for
    from .recipes import apply

    chosen = _recipes(recipe, set_)
    pipe, given = _prepare(model, text, image, raw, max_new_tokens, steps, sample, device, dtype)
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

    chosen = _recipes(recipe, set_)
    pipe, given = _prepare(model, text, image, raw, max_new_tokens, steps, sample, device, dtype)
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
    out: Annotated[str, typer.Option("--out", "-o", help="the .safetensors file to write", show_default=False)],
    set_: Settings = [],  # noqa: B006
    device: Device = "",
    dtype: Dtype = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Let a recipe learn what it needs about a model, and keep it in a file."""
    from .comparison.loading import load
    from .recipes import Recipe, recipe_class

    cls = recipe_class(recipe)
    if cls.profile.__func__ is Recipe.profile.__func__:  # type: ignore[attr-defined]
        raise ReattendError(f"recipe {cls.slug!r} has no profiling step")
    options = {key.partition(".")[2] or key: value for key, value in _settings(set_).items()}
    pipe = load(model, device=device or None, dtype=dtype or None)
    tokenizer = getattr(pipe, "processor", None) or getattr(pipe, "tokenizer", None)
    learned = cls.profile(getattr(pipe, "model", pipe), tokenizer, **options)
    file = learned.save(out)
    if as_json:
        tensors = {name: list(t.shape) for name, t in learned.tensors.items()}
        _print_json(
            {"file": str(file), "recipe": learned.recipe, "model": learned.model, "tensors": tensors, "facts": learned.facts}
        )
    else:
        typer.echo(f"profile: {file}")


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


def _settings(pairs: list[str]) -> dict[str, Any]:
    """{"key": value} from key=value strings; values are read as YAML."""
    import yaml

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ReattendError(f"--set takes key=value, got {pair!r}")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ReattendError(f"--set {key.strip()}: {value!r} is not a YAML value") from None
    return found


def _recipes(names: list[str], pairs: list[str]) -> list[Any]:
    """Recipe objects with their --set parameters. Raises ReattendError before any model is loaded."""
    from .recipes import load_recipe, recipe

    if not names:
        raise ReattendError("name at least one recipe with --recipe; `reattend list` shows them")
    settings = _settings(pairs)
    chosen = []
    for name in names:
        is_file = name.endswith((".yaml", ".yml"))
        mine = {}
        for key in list(settings):
            owner, dot, field = key.partition(".")
            if (dot and owner == name) or (not dot and len(names) == 1):
                mine[field if dot else key] = settings.pop(key)
        if is_file and mine:
            raise ReattendError(f"--set goes with a recipe's name; change the parameters of {name} in the file")
        chosen.append(load_recipe(name) if is_file else recipe(name, **mine))
    if settings:
        key = next(iter(settings))
        raise ReattendError(f"--set {key}: with several recipes write name.key=value, the name one of: {', '.join(names)}")
    return chosen


def _prepare(
    model: str, text: str, image: str, raw: bool, tokens: int, steps: int, sample: bool, device: str, dtype: str
) -> tuple[Any, dict[str, Any]]:
    """(pipeline, arguments for a job): text as a chat message where the model has a template."""
    from .comparison.loading import load

    if text.startswith("@"):
        if not Path(text[1:]).is_file():
            raise ReattendError(f"no text file at {text[1:]!r}")
        text = Path(text[1:]).read_text(encoding="utf-8")
    if image and not Path(image).is_file():
        raise ReattendError(f"no picture at {image!r}")
    if not text and not image:
        raise ReattendError("give an input with --text (or --prompt), --image or both")
    pipe = load(model, device=device or None, dtype=dtype or None)
    picture = None
    if image:
        from PIL import Image as Pictures

        picture = Pictures.open(image).convert("RGB")
    asked: Any = text or None
    options: dict[str, Any] = {}
    task = getattr(pipe, "task", None)
    if task in ("text-generation", "image-text-to-text"):
        options = {"max_new_tokens": tokens, "do_sample": sample}
        processor = getattr(pipe, "processor", None) or pipe.tokenizer
        if task == "text-generation" and not raw and getattr(processor, "chat_template", None):
            asked = [{"role": "user", "content": text}]
    elif task is None and steps:
        options = {"num_inference_steps": steps}
    given = {"text": asked, "prompt": None, "image": picture, "inputs": None, "tokenizer": None, "options": options}
    return pipe, given


def main() -> None:
    """Entry point."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
