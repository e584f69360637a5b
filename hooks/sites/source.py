"""What a function's code says: the one place where source or bytecode is read, for facts that no attribute and no signature tells."""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import textwrap
from collections.abc import Callable
from types import CodeType


class Source:
    """The function inside all wrappers; empty for one without Python code."""

    def __init__(self, function: Callable) -> None:
        self._function = inspect.unwrap(function)
        code = getattr(self._function, "__code__", None)
        self._code = code if isinstance(code, CodeType) else None

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Global and attribute names that the code uses, nested functions included."""
        names: set[str] = set()
        todo = [] if self._code is None else [self._code]
        while todo:
            current = todo.pop()
            names.update(current.co_names)
            todo.extend(c for c in current.co_consts if isinstance(c, CodeType))
        return frozenset(names)

    @functools.cached_property
    def order(self) -> tuple[str, ...]:
        """The names of its own code, and the texts among its constants, as they come."""
        code = () if self._code is None else dis.get_instructions(self._code)
        return tuple(i.argval for i in code if isinstance(i.argval, str))

    @functools.cached_property
    def tree(self) -> ast.AST:
        """Its syntax tree; an empty one where no source lies beside the code."""
        try:
            return ast.parse(textwrap.dedent(inspect.getsource(self._function)))
        except (OSError, TypeError, SyntaxError):
            return ast.Module([], [])


@functools.lru_cache(maxsize=4096)
def source_of(function: Callable) -> Source:
    """The code of a function, read once."""
    return Source(function)
