"""`reattend run`, `compare`, `demo`: a model under recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..interventions.errors import ReattendError
from .console import print_json
from .options import (
    Debug,
    Device,
    Dtype,
    Force,
    Guidance,
    Height,
    Image,
    Json,
    Model,
    Raw,
    Recipes,
    Sample,
    Seed,
    Settings,
    Steps,
    Sweep,
    Text,
    Tokens,
    Variants,
    Width,
)


def run(
    model: Model,
    recipe: Recipes = [],  # noqa: B006
    set_: Settings = [],  # noqa: B006
    text: Text = [],  # noqa: B006
    image: Image = "",
    max_new_tokens: Tokens = 64,
    steps: Steps = 0,
    guidance: Guidance = None,
    height: Height = 0,
    width: Width = 0,
    sample: Sample = False,
    raw: Raw = False,
    seed: Seed = 0,
    device: Device = "",
    dtype: Dtype = "",
    out: Annotated[
        str, typer.Option("--out", "-o", help="where to write a generated picture", show_default=False)
    ] = "reattend.png",
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a model under recipes."""
    from PIL import Image as Pictures

    from ..comparison.arguments import prepare, recipes_of
    from ..comparison.facts import progress_bar, reading_notes
    from ..comparison.inputs import job_for
    from ..recipes import apply
    from ..recipes.kit.checks import check_output, whole_number, writing

    chosen = recipes_of(recipe, set_)
    drawing = {"steps": steps, "guidance": guidance, "height": height, "width": width}
    pipe, given = prepare(model, text, image, raw, max_new_tokens, drawing, sample, device, dtype)
    job = job_for(pipe, seed=whole_number(seed, "--seed"), recipes=chosen, **given)
    if job.kind == "image":
        place = check_output(out, "--out", overwrite=force, remedy="--force", folders=False)
        if place.suffix.lower() not in Pictures.registered_extensions():
            raise ReattendError(f"--out: {out!r} names no kind of picture; end it with .png")
    with apply(pipe, *chosen, tokenizer=job.tokenizer) as session, progress_bar(None, job.ticks, "running") as tick:
        result = job.run(tick)
        stats = session.stats
    for note in reading_notes(chosen):
        typer.echo(f"note: {note}", err=True)
    output = job.show(result)
    if job.kind == "image":
        files = []
        for place, picture in enumerate(output):
            file = Path(out) if len(output) == 1 else Path(out).with_stem(f"{Path(out).stem}-{place}")
            with writing(file, "--out", folders=False):
                picture.save(file)
            files.append(str(file))
        output = files
    if as_json:
        print_json({"model": model, "recipes": [c.as_dict() for c in chosen], "seed": seed, "output": output, "stats": stats})
    elif job.kind == "prediction":
        typer.echo("\n".join(f"{share:8.3%}  {label}" for label, share in output))
    else:
        typer.echo(output if isinstance(output, str) else "\n".join(output))


def compare(
    model: Model,
    recipe: Variants = [],  # noqa: B006
    set_: Settings = [],  # noqa: B006
    sweep: Sweep = [],  # noqa: B006
    text: Text = [],  # noqa: B006
    image: Image = "",
    max_new_tokens: Tokens = 64,
    steps: Steps = 0,
    guidance: Guidance = None,
    height: Height = 0,
    width: Width = 0,
    sample: Sample = False,
    raw: Raw = False,
    seed: Seed = 0,
    device: Device = "",
    dtype: Dtype = "",
    html: Annotated[str, typer.Option("--html", help="also write the report as one HTML file", show_default=False)] = "",
    png: Annotated[
        str, typer.Option("--png", help="also write the pictures of all variants as one grid", show_default=False)
    ] = "",
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a model without and with recipes on the same input, and show what changed.

    One --recipe is compared with the untouched model. Several, or --sweep, give one report with a column per variant. Recipes that shall
    act together are one variant, written A+B.
    """
    from ..comparison import compare as compare_
    from ..comparison.arguments import prepare, variants_of
    from ..recipes.kit.checks import check_output, whole_number

    seed = whole_number(seed, "--seed")
    variants = variants_of(recipe, set_, sweep)
    if html:
        check_output(html, "--html", overwrite=force, remedy="--force")
    if png and check_output(png, "--png", overwrite=force, remedy="--force").suffix.lower() != ".png":
        raise ReattendError(f"--png: {png!r} must end in .png")
    drawing = {"steps": steps, "guidance": guidance, "height": height, "width": width}
    pipe, given = prepare(model, text, image, raw, max_new_tokens, drawing, sample, device, dtype)
    options = given.pop("options")
    given.pop("tokenizer")
    if png and not isinstance(getattr(pipe, "components", None), dict):
        raise ReattendError(f"--png draws pictures, and {model} makes none: --html shows texts")
    report: Any
    if len(variants) == 1 and not sweep and not png:
        report = compare_(pipe, *variants[0], seed=seed, **given, **options)
    else:
        if len(recipe) > 1:
            typer.echo(f"{len(variants)} variants, each beside the untouched model; A+B lets recipes act together", err=True)
        report = compare_(pipe, variants, seed=seed, **given, **options)
    file = report.html(html) if html else None
    drawn = report.png(png) if png else None
    if as_json:
        typer.echo(report.json())
    else:
        report.print()
        if file:
            typer.echo(f"report: {file}")
        if drawn:
            typer.echo(f"pictures: {drawn}")


def demo(
    out: Annotated[str, typer.Option("--out", "-o", help="folder for the report")] = "reattend-demo",
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare recipes on a small language model, offline; writes report.html."""
    from ..comparison.demo import demo as run_demo

    reports, file = run_demo(Path(out), quiet=as_json, overwrite=force)
    if as_json:
        print_json({"report": str(file), "comparisons": [r.as_dict() for r in reports]})
