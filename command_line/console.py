"""What commands print: JSON, and errors and warnings as one line on stderr."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from typing import Any

import typer

from ..interventions.errors import ReattendError, ReattendWarning

state = {"debug": False}


def guarded(function: Callable[..., None]) -> Callable[..., None]:
    """The command with its errors as one line on stderr: bad input exits with 2, anything unforeseen with 1."""

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
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

    return command


def _fail(error: Exception, code: int, cause: Exception | None = None) -> None:
    if state["debug"]:
        raise cause or error
    typer.echo(f"error: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(code)


def _warn(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, ReattendWarning):
        typer.echo(f"warning: {message}", err=True)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))
