"""The forms that results take: JSON values, pictures as files and as data URIs, templates and pages."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..interventions import ReattendError
from ..recipes.kit.checks import check_output, writing


def write_picture(drawn: Any, path: str | os.PathLike, *, overwrite: bool) -> Path:
    """Writes a PIL picture as a PNG file."""
    path = check_output(path, "path", overwrite=overwrite)
    if path.suffix.lower() != ".png":
        raise ReattendError(f"path: {str(path)!r} must end in .png")
    with writing(path, "path"):
        drawn.save(path)
    return path


def write_html(make: Callable[[], str], path: str | os.PathLike, *, overwrite: bool) -> Path:
    """Writes the page that `make` gives, which is not made before the path is known to be right."""
    path = check_output(path, "path", overwrite=overwrite)
    text = make()
    with writing(path, "path"):
        # a lone surrogate, as half a letter of a broken tokenizer, has no UTF-8
        path.write_text(text, encoding="utf-8", errors="replace")
    return path


def from_template(name: str, filters: Mapping[str, Callable] | None = None, **values: Any) -> str:
    """A template of this folder, filled in; every text is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    return environment.get_template(name).render(**values)


def png(picture: Any) -> str:
    """A PIL picture as a data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
