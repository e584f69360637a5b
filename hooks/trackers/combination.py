"""How the running pipeline is going to combine the two halves of classifier-free guidance after this pass: u + s (c - u).

No attribute tells it for all pipelines: s is `guidance_scale` or `true_cfg_scale`, a local variable or an attribute, may be changed in
the loop, and some write c + g (c - u), which is s = 1 + g. So the formula is read from the code of the method that is running, and its
names are looked up where that stands. Where that finds no formula, or nothing certain, the combination is not known.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from torch import Tensor

# keywords that tell a call of a denoiser from one that cuts its output into parts
OF_A_DENOISER = {"return_dict", "timestep", "encoder_hidden_states"}
# what cuts a half out of the output, and changes nothing of what it predicts
CUTS = {"chunk", "split", "unbind", "float", "to", "squeeze", "unsqueeze", "permute", "view", "reshape"}
# what the conditions before a formula may be made of: nothing that runs anything
PLAIN = (
    ast.Expression, ast.Name, ast.Attribute, ast.Load, ast.Constant, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.Compare, ast.Is,
    ast.IsNot, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
)  # fmt: skip


@dataclass(frozen=True)
class Combination:
    """scale: the s of u + s (c - u); 1 where this pass is combined with nothing. to_come: the half that a later call of this step gives,
    "conditional", "unconditional", or "" where this pass is the last. take: what takes the shift of a step and adds it to the combination,
    where neither half is to have it: a third prediction is combined with them.
    """

    scale: float
    to_come: str = ""
    take: Callable[[Tensor], None] | None = None


# tests that lead to a line, each with whether it must hold
Conditions = tuple[tuple[ast.expr, bool], ...]


@dataclass(frozen=True)
class Formula:
    """One formula in a method's code, with lines as they are counted in its file: s is `scale`, plus `more`; the halves by their names."""

    line: int
    scale: ast.expr
    more: float
    conditions: Conditions
    conditional: str
    unconditional: str


@dataclass(frozen=True)
class Assignment:
    """A line that sets names. predicts: to what a denoiser returns. cuts: to a part of that, with the same values."""

    line: int
    names: frozenset[str]
    conditions: Conditions
    predicts: bool
    cuts: bool


@dataclass(frozen=True)
class Method:
    """What is read of one method."""

    formulas: tuple[Formula, ...] = ()
    assignments: tuple[Assignment, ...] = ()


def combination_of(pipeline: Any) -> Combination | None:
    """How this pipeline, whose call is on this thread's stack, combines the pass that is under way; None where that is not known."""
    if pipeline is None:
        return None
    guider = getattr(pipeline, "guider", None)
    if isinstance(getattr(guider, "_step", None), int):
        return _of_guider(guider)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self" and frame.f_locals.get("self") is pipeline:
            method = method_of(code)
            if method.formulas:
                return _now(method, frame)
        frame = frame.f_back
    return None


def _of_guider(guider: Any) -> Combination | None:
    """What a modular pipeline's guider says: one of ours itself; diffusers' others than the plain one combine in ways of their own."""
    own: Callable[[], Combination | None] | None = getattr(guider, "combination", None)
    if own is not None:
        return own()
    if type(guider).__name__ != "ClassifierFreeGuidance":
        return None
    if guider.num_conditions == 1:
        return Combination(1.0)
    scale = guider.guidance_scale + (1.0 if guider.use_original_formulation else 0.0)
    return Combination(float(scale), "unconditional" if guider.is_conditional else "")


def _now(method: Method, frame: FrameType) -> Combination | None:
    """What comes of the formulas after the line that runs."""
    here, names = frame.f_lineno, frame.f_locals
    found: set[Combination] = set()
    for formula in method.formulas:
        if formula.line < here:
            continue
        lines = [line for line in method.assignments if here < line.line < formula.line]
        unsure = {name for line in lines for name in line.names}
        lines = [line for line in lines if _holds(line.conditions, names, unsure) is not False]
        between = {name for line in lines for name in line.names}
        holds = _holds(formula.conditions, names, between)
        if holds is None:
            return None
        if not holds:
            continue
        scale = _value(formula.scale, names, between)
        halves = {"conditional": formula.conditional, "unconditional": formula.unconditional}
        changed = any(line.names & set(halves.values()) and not line.cuts for line in lines)
        if changed or isinstance(scale, bool) or not isinstance(scale, (int, float)):
            return None
        later = {name for line in lines if line.predicts for name in line.names}
        to_come = [half for half, name in halves.items() if name in later]
        if len(to_come) == 2:
            return None
        found.add(Combination(float(scale) + formula.more, "".join(to_come)))
    if not found:
        return Combination(1.0)
    return found.pop() if len(found) == 1 else None


def _holds(conditions: Conditions, names: dict[str, Any], between: set[str]) -> bool | None:
    """Whether a line is going to run; None where that is not known."""
    values = [(_value(test, names, between), wanted) for test, wanted in conditions]
    if any(isinstance(value, bool) and value != wanted for value, wanted in values):
        return False
    return None if any(not isinstance(value, bool) for value, _ in values) else True


def _value(node: ast.expr, names: dict[str, Any], between: set[str]) -> Any:
    """What an expression of the pipeline's is now and will be at the formula; None where that cannot be said."""
    if not all(isinstance(part, PLAIN) for part in ast.walk(node)) or _set_in(node) & between:
        return None
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        return getattr(_value(node.value, names, between), node.attr, None)
    if isinstance(node, ast.UnaryOp):
        inner = _value(node.operand, names, between)
        return not inner if isinstance(inner, bool) else None
    if isinstance(node, ast.BoolOp):
        return _all_or_any(node, names, between)
    return _compared(node, names, between) if isinstance(node, ast.Compare) and len(node.ops) == 1 else None


def _all_or_any(node: ast.BoolOp, names: dict[str, Any], between: set[str]) -> bool | None:
    values = [_value(part, names, between) for part in node.values]
    ends = not isinstance(node.op, ast.And)
    if any(value is ends for value in values):
        return ends
    return None if any(not isinstance(value, bool) for value in values) else not ends


def _compared(node: ast.Compare, names: dict[str, Any], between: set[str]) -> bool | None:
    left, right, how = _value(node.left, names, between), _value(node.comparators[0], names, between), node.ops[0]
    if isinstance(how, (ast.Is, ast.IsNot)):
        # an expression that says nothing and the value None are one here: only a plain name is sure to be what it is
        name = node.left.id if isinstance(node.left, ast.Name) else ""
        sure = name in names and name not in between and isinstance(node.comparators[0], ast.Constant)
        return (left is right) == isinstance(how, ast.Is) if sure else None
    if not all(isinstance(value, (int, float, str)) for value in (left, right)) or isinstance(left, str) != isinstance(
        right, str
    ):
        return None
    if isinstance(how, (ast.Eq, ast.NotEq)):
        return (left == right) == isinstance(how, ast.Eq)
    if isinstance(how, (ast.Lt, ast.LtE)):
        return left < right or (isinstance(how, ast.LtE) and left == right)
    return left > right or (isinstance(how, ast.GtE) and left == right)


def _set_in(node: ast.AST) -> set[str]:
    """The variables and attributes that an expression reads; a property and its underlined attribute are one."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return names | {part.attr.lstrip("_") for part in ast.walk(node) if isinstance(part, ast.Attribute)}


# -- what a method's code says -------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def method_of(code: CodeType) -> Method:
    """The formulas of a method of a pipeline; none where its source is not there."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return Method()
    ast.increment_lineno(tree, code.co_firstlineno - 1)
    parts = list(_parts(tree, ()))
    formulas = tuple(f for part, conditions in parts if (f := _formula(part, conditions)) is not None)
    return Method(formulas, tuple(a for part, conditions in parts if (a := _assignment(part, conditions)) is not None))


def _parts(node: ast.AST, conditions: Conditions) -> Iterator[tuple[ast.AST, Conditions]]:
    """All parts of a piece of code, with the tests that lead to them."""
    yield node, conditions
    if isinstance(node, ast.If):
        for wanted, parts in ((True, node.body), (False, node.orelse)):
            for part in parts:
                yield from _parts(part, (*conditions, (node.test, wanted)))
        return
    for part in ast.iter_child_nodes(node):
        yield from _parts(part, conditions)


def _assignment(node: ast.AST, conditions: Conditions) -> Assignment | None:
    if not isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) or node.value is None:
        return None
    names = frozenset(name for target in getattr(node, "targets", None) or [node.target] for name in _targets(target))  # type: ignore[union-attr]
    cuts = not isinstance(node, ast.AugAssign) and _cuts(node.value)
    return Assignment(node.lineno, names, conditions, any(_predicts(part) for part in ast.walk(node.value)), cuts)


def _predicts(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and bool(OF_A_DENOISER & {keyword.arg for keyword in node.keywords})


def _cuts(node: ast.expr) -> bool:
    if isinstance(node, (ast.Subscript, ast.Attribute)):
        return _cuts(node.value)
    if isinstance(node, ast.Call) and not _predicts(node):
        return isinstance(node.func, ast.Attribute) and node.func.attr in CUTS and _cuts(node.func.value)
    # both halves change their sign together (HiDream)
    return isinstance(node, (ast.Name, ast.Call)) or (isinstance(node, ast.UnaryOp) and _cuts(node.operand))


def _targets(target: ast.expr) -> list[str]:
    if isinstance(target, (ast.Tuple, ast.List)):
        return [name for part in target.elts for name in _targets(part)]
    if isinstance(target, ast.Name):
        return [target.id]
    return [target.attr.lstrip("_")] if isinstance(target, ast.Attribute) else []


def _formula(node: ast.AST, conditions: Conditions) -> Formula | None:
    """base + scale * (conditional - unconditional), where base is one of the two."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add):
        return None
    for base, product in ((node.left, node.right), (node.right, node.left)):
        if not isinstance(base, ast.Name) or not isinstance(product, ast.BinOp) or not isinstance(product.op, ast.Mult):
            continue
        for scale, difference in ((product.left, product.right), (product.right, product.left)):
            if not isinstance(difference, ast.BinOp) or not isinstance(difference.op, ast.Sub) or not _is_scale(scale):
                continue
            positive, negative = difference.left, difference.right
            if isinstance(positive, ast.Name) and isinstance(negative, ast.Name) and base.id in (positive.id, negative.id):
                more = 1.0 if base.id == positive.id else 0.0
                return Formula(node.lineno, scale, more, conditions, positive.id, negative.id)
    return None


def _is_scale(node: ast.expr) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return "guidance" in name or "cfg" in name
