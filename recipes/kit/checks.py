"""What users give: values of the kind that is meant and files that can be read or written, or one ReattendError that names the argument.

It says what would be right. What is written is checked before any work is done.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ...interventions import ReattendError

# more than any text that a person writes, and little enough to be read at once
LARGEST = 64 * 2**20
MOST_VALUES = 100_000
DEEPEST = 40
# a picture as a text, as recipes keep it
INLINE = "data:image/png;base64,"
# of a mask that is written out for people
MOST_PLACES = 64
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 100
_repr.maxlong = 40


def shown(value: Any) -> str:
    """A value as it was given, cut short where it is long."""
    return _repr.repr(value)


def abridged(value: Any) -> Any:
    """A parameter's value for people: what would fill pages, pictures and masks that it holds, by their kind and what tells them apart."""
    if isinstance(value, str) and value.startswith(INLINE):
        return f"picture {_print(value)}"
    if isinstance(value, (list, tuple)):
        if is_mask(value) and len(value) * len(value[0]) > MOST_PLACES:
            return f"mask {_print(''.join(value))} of {len(value[0])} x {len(value)}"
        return type(value)(map(abridged, value)) if type(value) in (list, tuple) else value
    return {key: abridged(one) for key, one in value.items()} if isinstance(value, dict) else value


def is_mask(value: Any) -> bool:
    """Whether a list is a mask as recipes keep it: rows of "0" and "1", all of one length."""
    rows = bool(value) and all(isinstance(row, str) for row in value)
    return rows and bool(value[0]) and all(len(row) == len(value[0]) and not set(row) - {"0", "1"} for row in value)


def _print(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def whole_number(value: Any, what: str, least: int | None = None) -> int:
    """The value, if it is an integer that fits into 64 bits and is at least so large."""
    plain = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if not plain or (least is not None and value < least):
        raise ReattendError(
            f"{what} must be a whole number{'' if least is None else f' of at least {least}'}, got {shown(value)}"
        )
    return value


def number(value: Any, what: str) -> float:
    """The value, if it is a number and not NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (isinstance(value, int) and abs(value) >= 2**63):
        raise ReattendError(f"{what} must be a number, got {shown(value)}")
    if math.isnan(value):
        raise ReattendError(f"{what} must be a number, got NaN")
    return value


def truth(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise ReattendError(f"{what} must be True or False, got {shown(value)}")
    return value


def text(value: Any, what: str) -> str:
    """The value, if it is a text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise ReattendError(f"{what} must be a text, got {shown(value)}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ReattendError(f"{what} holds half of a letter (a lone surrogate), which no tokenizer reads: decode it as UTF-8")
    return value


def tokenizer(value: Any) -> Any:
    """The value, if it can be a tokenizer or processor, or is None."""
    if value is not None and (isinstance(value, type) or not callable(value) or not hasattr(value, "decode")):
        raise ReattendError(f"tokenizer must be the model's tokenizer or processor, got {shown(value)}")
    return value


def as_path(value: Any, what: str) -> Path:
    """A path from what a user gave. what: the argument's name, for the message."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise ReattendError(f"{what} must be a path, got {value!r:.80}")
    text = os.fspath(value)
    if not text.strip() or "\0" in text:
        raise ReattendError(f"{what} must be a path, got {text!r:.80}")
    return Path(text)


def existing_file(value: Any, what: str) -> Path:
    """The path of a file that is there. Raises ReattendError for anything else."""
    path = as_path(value, what)
    try:
        if path.is_dir():
            raise ReattendError(f"{what}: {str(path)!r} is a folder; name a file")
        if not path.is_file():
            raise ReattendError(f"no {what} at {str(path)!r}")
    except OSError as error:  # a name that is too long, a folder that may not be searched
        raise ReattendError(f"no {what} at {str(path)[:200]!r}: {error.strerror}") from None
    return path


def read_text(value: Any, what: str) -> str:
    """The text of a UTF-8 file. what: what it is, as in "no text file at 'x'"."""
    path = existing_file(value, what)
    try:
        if path.stat().st_size > LARGEST:
            raise ReattendError(f"{what}: {str(path)!r} holds more than {LARGEST // 2**20} MiB")
        data = path.read_bytes()
    except OSError as error:
        raise ReattendError(f"{what}: cannot read {str(path)!r}: {error.strerror}") from None
    try:
        if b"\0" in data:
            raise ValueError("a zero byte")
        return data.decode("utf-8-sig")
    except ValueError:
        wide = data[:2] in (b"\xff\xfe", b"\xfe\xff") or data[1:2] == b"\0" or data[:1] == b"\0" != data[1:2]
        hint = "it looks like UTF-16: save it as UTF-8" if wide else "save it as UTF-8, or name another file"
        raise ReattendError(f"{what}: {str(path)!r} is not UTF-8 text; {hint}") from None


def read_picture(value: Any, what: str, mode: str | None = "RGB") -> Any:
    """The picture of a file, the right way up and of this mode (None: its own). what: what it is, as in "no picture at 'x'"."""
    from PIL import Image, ImageOps

    path = existing_file(value, what)
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            return picture if mode is None else picture.convert(mode)
    except Exception as error:  # Pillow's readers raise nearly everything for broken files
        raise ReattendError(f"{what}: {str(path)!r} cannot be read as a picture: {' '.join(str(error).split()):.200}") from None


def read_json(text: str, what: str) -> Any:
    """The value of a JSON text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ReattendError(f"{what} is not valid JSON: {reason:.200}") from None


def read_yaml(text: str, what: str) -> Any:
    """The value of a YAML text: data only, of a size that a person writes, no key named twice."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ReattendError(f"{what} is not valid YAML: {reason:.300}") from None


class _Loader(yaml.SafeLoader):
    """Counts values as they would be written out, so that aliases of aliases are refused before they are built."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.sizes: dict[int, int] = {}
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias = self.check_event(yaml.AliasEvent)
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        if is_alias and id(node) not in self.sizes:
            raise ValueError("a value refers to itself")
        if id(node) not in self.sizes:
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            inner = [part for item in parts for part in (item if isinstance(item, tuple) else (item,))]
            self.sizes[id(node)] = 1 + sum(self.sizes[id(part)] for part in inner)
            if self.sizes[id(node)] > MOST_VALUES:
                raise ValueError(f"with its aliases written out it holds more than {MOST_VALUES} values")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        double = next((value for place, (tag, value) in enumerate(seen) if (tag, value) in seen[:place]), None)
        if double is not None:
            raise ValueError(f"it names {double!r} twice")
        return super().construct_mapping(node, deep)


def check_output(
    value: Any, what: str, *, overwrite: bool = True, remedy: str = "overwrite=True", folders: bool = True
) -> Path:
    """The path of a file that can be written. what: the argument's name. folders: whether missing folders will be made.

    Raises ReattendError where it cannot be, and for a file that is there already unless overwrite; remedy: how to overwrite it.
    """
    path = as_path(value, what)
    try:
        if path.is_dir():
            raise ReattendError(f"{what}: {str(path)!r} is a folder; name a file")
        if path.exists() and not overwrite:
            raise ReattendError(f"{what}: {str(path)!r} exists already; name another file, or overwrite it with {remedy}")
        _check_folder(path.parent, what, folders)
        if path.exists() and not os.access(path, os.W_OK):
            raise ReattendError(f"{what}: {str(path)!r} may not be written")
    except OSError as error:
        raise ReattendError(f"{what}: cannot write {str(path)[:200]!r}: {error.strerror}") from None
    return path


def check_folder(value: Any, what: str) -> Path:
    """The path of a folder that can be written into, or be made. Raises ReattendError where it cannot."""
    path = as_path(value, what)
    try:
        _check_folder(path, what, True)
    except OSError as error:
        raise ReattendError(f"{what}: cannot write into {str(path)[:200]!r}: {error.strerror}") from None
    return path


def _check_folder(path: Path, what: str, make: bool) -> None:
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ReattendError(f"{what}: {str(there)!r} is a file, so nothing can be written into it; name a folder")
    if there != path and not make:
        raise ReattendError(f"{what}: there is no folder {str(path)!r}; make it first, or name another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ReattendError(f"{what}: the folder {str(there)!r} may not be written")


@contextmanager
def writing(path: Path, what: str, folders: bool = True) -> Iterator[None]:
    """Around the writing of a file: makes its folder, and turns what the system refuses into a ReattendError."""
    try:
        if folders:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ReattendError(f"{what}: cannot write {str(path)[:200]!r}: {error.strerror or error}") from None
