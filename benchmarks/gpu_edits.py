"""Right or wrong on a device: every edit against a float64 reference on the CPU."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from gpu_parts import Part, Table, said
from reattend.interventions import Call, ReattendError, fused, reference
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# what a right answer may differ by, of the largest output: rounding of weights and outputs in each dtype
ROUNDING = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
HEADS, KEYS, BATCH = 4, 70, 2
MOST_SHOWN = 40


class Condition(NamedTuple):
    """A call. shape: "prefill", "one row", "chunk" (rows after others). mask: "causal", "none", "holes" (a tensor)."""

    dim: int
    kv: int
    shape: str
    mask: str
    heads: tuple[int, ...] | None

    @property
    def queries(self) -> int:
        return {"prefill": KEYS, "one row": 1, "chunk": 13}[self.shape]

    def __str__(self) -> str:
        heads = "all heads" if self.heads is None else f"heads {list(self.heads)}"
        return f"head size {self.dim}, {HEADS} heads on {self.kv}, {self.shape}, {self.mask}, {heads}"


CONDITIONS = [
    Condition(*each)
    for each in itertools.product(
        (64, 80, 128, 256), (2, 4), ("prefill", "one row", "chunk"), ("causal", "holes", "none"), (None, (1, 3))
    )
    if (each[2], each[3]) != ("one row", "causal")
]


class Wrong(NamedTuple):
    """error: the largest difference over what is allowed; a text where the device raised."""

    name: str
    dtype: torch.dtype
    condition: Condition
    error: float | str


def every_edit() -> Any:
    """The list of edits that the tests share. Raises ImportError where the tests do not lie beside this folder."""
    import methods  # noqa: F401  (puts the tests' modules on the path)

    return __import__("every_edit")


def cases() -> Iterator[tuple[str, torch.dtype, Condition]]:
    """All of them, each edit in each dtype once before any of them a second time: what is reached in little time says something about all."""
    known = every_edit()
    names = list(known.examples(known.a_call(9)))
    for turn in range(len(CONDITIONS)):
        for i, name in enumerate(names):
            for j, dtype in enumerate(DTYPES):
                # 29 shares no factor with the number of conditions, so each of them is met
                yield name, dtype, CONDITIONS[(29 * turn + 11 * i + 5 * j) % len(CONDITIONS)]


def ask(name: str, dtype: torch.dtype, condition: Condition, device: torch.device) -> Wrong | str | None:
    """None where the device is right, "" where the edit does not apply to such a call."""
    known = every_edit()
    torch.manual_seed(sum(map(ord, name)))
    call = call_of(condition, dtype)
    try:
        heads = None if condition.heads is None or name in known.WHOLE else list(condition.heads)
        edit = known.examples(call, heads)[name]()
        exact = reference(elsewhere(call, double=True), [elsewhere(edit, double=True)])
        rounded = reference(call, [edit]).double()
    except ReattendError:
        return ""
    except Exception as error:
        return Wrong(name, dtype, condition, f"on the CPU: {said(error)}")
    scale = max(1.0, float(exact.abs().max()))
    allowed = ROUNDING[dtype] * scale + 4 * float((rounded - exact).abs().max())
    try:
        got = fused(elsewhere(call, device), [elsewhere(edit, device)]).cpu().double()
    except Exception as error:
        return Wrong(name, dtype, condition, said(error))
    if not bool(got.isfinite().all()):
        return Wrong(name, dtype, condition, "not finite")
    error = float((got - exact).abs().max()) / allowed
    return Wrong(name, dtype, condition, error) if error > 1 else None


def call_of(condition: Condition, dtype: torch.dtype) -> Call:
    queries = condition.queries
    query = torch.randn(BATCH, HEADS, queries, condition.dim).to(dtype)
    key, value = (torch.randn(BATCH, condition.kv, KEYS, condition.dim).to(dtype) for _ in range(2))
    mask = None
    if condition.mask == "holes":
        mask = (torch.rand(BATCH, 1, queries, KEYS) > 0.25) & torch.ones(queries, KEYS, dtype=torch.bool).tril(KEYS - queries)
        mask[..., 0] = True
    return Call(query, key, value, mask, condition.mask == "causal")


def elsewhere(thing: Any, device: torch.device | str = "cpu", double: bool = False) -> Any:
    """A call, an edit or a pattern with its tensors on another device, or in float64."""
    if isinstance(thing, Tensor):
        moved = thing.to(device)
        return moved.double() if double and moved.is_floating_point() else moved
    if isinstance(thing, (list, tuple)) and not hasattr(thing, "_fields"):
        return type(thing)(elsewhere(item, device, double) for item in thing)
    if not dataclasses.is_dataclass(thing) or isinstance(thing, type):
        return thing
    made = copy.copy(thing)
    # what follows from its tensors is found anew
    getattr(made, "__dict__", {}).pop("_remembered", None)
    for field in dataclasses.fields(made):
        object.__setattr__(made, field.name, elsewhere(getattr(thing, field.name), device, double))
    return made


def measure(part: Part) -> None:
    table = part.table("Edits against a float64 reference on the CPU", ["right", "asked"])
    try:
        every = list(cases())
    except ImportError as error:
        part.say(f"The tests' list of edits is not beside this folder ({said(error)}): edits were not tried.")
        return
    if part.dry:
        every = every[:: len(every) // 60]
    counts: dict[str, list[int]] = {}
    wrong: list[Wrong] = []
    worst = Table("What is not right", ["dtype", "call", "error / allowed"])
    asked = 0
    for name, dtype, condition in every:
        if part.left <= 0:
            break
        found = ask(name, dtype, condition, part.device.device)
        asked += 1
        if found == "":
            continue
        row = counts.setdefault(str(dtype).removeprefix("torch."), [0, 0])
        row[1] += 1
        row[0] += found is None
        if isinstance(found, Wrong):
            wrong.append(found)
            show_wrong(part, worst, len(wrong), found)
            show(part, table, counts)
            part.device.wait()
        if asked % 100 == 0:
            show(part, table, counts)
    show(part, table, counts)
    right, tried = (sum(row[i] for row in counts.values()) for i in (0, 1))
    part.figure("edits right", right)
    part.figure("edits tried", tried)
    part.say(
        f"{right} of {tried} are right, of {len({name for name, _, _ in every[:asked]})} edits; {len(every) - asked} of {len(every)} "
        "combinations of edit, dtype, head size, key heads, rows, mask and heads were not reached."
    )
    if len(wrong) > MOST_SHOWN:
        part.say(f"and {len(wrong) - MOST_SHOWN} more, of: {', '.join(sorted({one.name for one in wrong[MOST_SHOWN:]}))}")


def show_wrong(part: Part, table: Table, number: int, one: Wrong) -> None:
    if number == 1:
        part.blocks.append(table)
    if number <= MOST_SHOWN:
        error = one.error if isinstance(one.error, str) else f"{one.error:.3g}"
        cells = {"dtype": str(one.dtype).removeprefix("torch."), "call": str(one.condition), "error / allowed": error}
        part.set(table, f"{number}: {one.name}", cells)


def show(part: Part, table: Table, counts: dict[str, list[int]]) -> None:
    for dtype, (right, tried) in counts.items():
        part.set(table, dtype, {"right": str(right), "asked": str(tried)})
