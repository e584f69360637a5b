"""Facts of a comparison that every report holds: the model, its recipes, versions and machine; and the bar while it runs."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..hooks import running
from ..hooks.sites.discovery import components, pretrained_root
from ..recipes import Recipe
from ..version import __version__
from .job import Job, Tick


@contextmanager
def progress_bar(wanted: bool | None, total: int, words: str) -> Iterator[Tick]:
    """A bar on stderr that goes away when done; silent where nobody watches."""
    if wanted is False or (wanted is None and not sys.stderr.isatty()):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(words), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def session_notes(model: Any) -> list[str]:
    """What a reader must know where recipes act on the model already: both runs have them, and a report names only its own."""
    names = list(dict.fromkeys(repr(plan.recipe) for session in running(model) for plan in session.plans))
    if not names:
        return []
    return [f"This ran inside a session of {' and '.join(names)}: 'untouched' and 'before' mean the model under it."]


def reading_notes(recipes: Sequence[Recipe]) -> list[str]:
    """What a reader must know of recipes that change nothing: that this is so, and where their result is."""
    slugs = list(dict.fromkeys(item.slug for item in recipes if item.info.reads))
    return [
        f"Recipe {slug!r} reads and changes nothing; in Python, what it found is on the recipe: recipe.found." for slug in slugs
    ]


def model_facts(model: Any, job: Job, num_sites: int) -> dict[str, Any]:
    module = job.module
    config = getattr(pretrained_root(module), "config", None)
    # of a diffusers pipeline the whole, not the denoiser's folder inside it
    named = [getattr(model, "name_or_path", ""), getattr(config, "_name_or_path", "")]
    name = model_name(
        str(next((n for n in (named if job.kind == "image" else named[::-1]) if n), "")), tuple(components(model))
    )
    first = next(module.parameters(), None)
    return {
        "class": type(model).__name__ if job.kind == "image" else type(module).__name__,
        "name": name,
        "parameters": sum(p.numel() for p in module.parameters()),
        "dtype": str(first.dtype).removeprefix("torch.") if first is not None else "",
        "device": str(job.device),
        "attention": str(getattr(config, "_attn_implementation", None) or "native"),
        "sites": num_sites,
    }


def model_name(name: str, inner: tuple[str, ...] = ()) -> str:
    """The name of a model for a reader: a hub id as it is, of a folder of this machine its last part only.

    inner: names of folders inside of a model's, which a component's path ends in.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..", "~")]
    if len(parts) > 2 and parts[-1] in inner:
        parts = parts[:-1]
    if cached := [part for part in parts if part.startswith("models--")]:  # a snapshot in the hub's cache
        return cached[-1].removeprefix("models--").replace("--", "/")
    folder = name.startswith(("/", ".", "~")) or "\\" in name or len(parts) != 2 or Path(name).is_dir()
    return parts[-1] if parts and folder else name


def recipe_facts(item: Recipe) -> dict[str, Any]:
    """Name, parameters and source of a recipe, as JSON values."""
    from pydantic_core import to_jsonable_python

    parameters = {}
    for name in type(item).model_fields:
        value = getattr(item, name)
        parameters[name] = to_jsonable_python(value, fallback=lambda v: f"{type(v).__name__}")
    chosen = sorted(item.model_fields_set)
    return {"name": item.slug, "parameters": parameters, "chosen": chosen, **item.info.as_dict()}


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they matter to the numbers."""
    found = {"reattend": __version__, "torch": torch.__version__}
    for name in ("transformers", "diffusers"):
        if name in sys.modules:
            found[name] = sys.modules[name].__version__
    found["python"] = platform.python_version()
    found["machine"] = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
    return found


def _cpu() -> str:
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
