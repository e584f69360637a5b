"""The options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import state


def _debug(value: bool) -> bool:
    state["debug"] = value or state["debug"]
    return value


MODEL_HELP = "hub id, folder, zoo:NAME, smollm2 or gemma3-270m (the last three need no network)"
Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="print JSON and nothing else")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error", callback=_debug, is_eager=True)]
Recipes = Annotated[
    list[str],
    typer.Option(
        "--recipe", "-r", help="recipe name, name:key=value or file.yaml; repeat, or A+B, to combine", show_default=False
    ),
]
Variants = Annotated[
    list[str],
    typer.Option(
        "--recipe",
        "-r",
        help="recipe name, name:key=value or file.yaml; A+B composes; repeat for one report with a column per variant",
        show_default=False,
    ),
]
Settings = Annotated[
    list[str], typer.Option("--set", help="parameter as key=value, with several recipes name.key=value", show_default=False)
]
Sweep = Annotated[
    list[str],
    typer.Option("--sweep", help="one variant per value, as alpha=0.55,0.3,0.09, beside one --recipe", show_default=False),
]
Text = Annotated[
    list[str],
    typer.Option(
        "--text", "--prompt", "-t", help="the input text, or @file; repeat for several pictures at once", show_default=False
    ),
]
Image = Annotated[str, typer.Option("--image", "-i", help="an input picture", show_default=False)]
Raw = Annotated[bool, typer.Option("--raw", help="give the text as it is, without the model's chat template")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, max=2**20, help="how much text at most")]
Steps = Annotated[int, typer.Option("--steps", min=0, help="denoising steps; 0 = the pipeline's own", show_default=False)]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", help="guidance scale of the pipeline; default: the pipeline's own", show_default=False),
]
Height = Annotated[
    int, typer.Option("--height", min=0, help="height of the picture in pixels; 0 = the pipeline's own", show_default=False)
]
Width = Annotated[
    int, typer.Option("--width", min=0, help="width of the picture in pixels; 0 = the pipeline's own", show_default=False)
]
Sample = Annotated[bool, typer.Option("--sample", help="sample with the seed instead of taking the likeliest token")]
Seed = Annotated[int, typer.Option("--seed", help="random seed")]
Force = Annotated[bool, typer.Option("--force", help="overwrite files that are there already")]
Device = Annotated[
    str, typer.Option("--device", help="cpu, cuda:0, ...; default: the first GPU, or the CPU", show_default=False)
]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, float16, bfloat16; default: as stored", show_default=False)]
