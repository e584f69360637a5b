"""The command line: `reattend` and `python -m reattend`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from . import __version__
from .command_line.console import guarded, state
from .command_line.listing import list_, show, sites
from .command_line.measuring import analyse, eval_, profile
from .command_line.running import compare, demo, run

app = typer.Typer(
    name="reattend",
    help="Make a pretrained model look somewhere else, without training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (list_, show, sites, run, compare, profile, eval_, analyse, demo):
    app.command(name=_command.__name__.rstrip("_"))(guarded(_command))


def _version(value: bool) -> None:
    if value:
        typer.echo(f"reattend {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="print the version", callback=_version, is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    state["debug"] = debug or state["debug"]


def main() -> None:
    """Entry point."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
