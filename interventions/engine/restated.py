"""One edit of known columns as plain tensors: what `op.columns` is asked for. Made once per edit, without a question to the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..edits import Edit, Gain, Lift, Mix, ScoreEdit, ScoreGain, Transfer
from ..edits.base import Columns, column_mask
from ..families.sinks import GiveBack

# Kinds of edits that add to scores, and kinds that name more sets of columns than one.
BIASES = ("bias", "score gain")
SEVERAL = ("gain over a set", "give back")


@dataclass(frozen=True)
class Restated:
    """Arguments of `op.columns` of the same names, by the kind of edit:

    "gain", "gain alone", "gain over a set": class 1 is gained, 2 is what rows are renormalised over, 3 both.
    "lift", "exact lift": class 1 is lifted; second: largest factor, third: least share.
    "transfer": from class 1 to class 2. "identity": no columns, each row's own value.
    "give back" (see `GiveBack`): from classes 1 and 3 to class 2, where class 3 holds at most the limit and second times the image,
    which is 2 and 3, and the image holds third or more.
    "bias": marks are added to scores. "score gain": marks times the scores' sizes are.
    """

    kind: str
    rest: int = 0
    marks: Tensor | None = None
    index: Tensor | None = None
    count: Tensor | None = None
    amounts: Tensor | None = None
    rows: Tensor | None = None
    number: float = 0.0
    second: float = 0.0
    third: float = 0.0


def kind_of(edit: Edit) -> str:
    """The kind of edit that it is restated as; "" for edits that are not."""
    if isinstance(edit, Gain):
        return "gain alone" if edit.renormalise is None else "gain" if isinstance(edit.renormalise, str) else "gain over a set"
    if isinstance(edit, Lift):
        return "exact lift" if edit.exact else "lift"
    if isinstance(edit, Transfer):
        return "transfer" if edit.how == "proportional" else ""
    if isinstance(edit, GiveBack):
        return "give back"
    if isinstance(edit, Mix):
        return "identity" if isinstance(edit.target, str) and edit.target == "identity" else ""
    if isinstance(edit, ScoreGain):
        return "score gain"
    return "bias" if isinstance(edit, ScoreEdit) and edit.per_key is not None else ""


def restated(edit: Edit, keys: int, key_heads: int, device: torch.device) -> Restated:
    """An edit that has a kind, for a call with so many keys (without appended ones) and key heads."""
    if isinstance(edit, GiveBack):
        return _of_sinks(edit, key_heads, device)
    if edit.lasts is None or edit.rows is not None:
        return edit.remember_size("restated", (keys, key_heads, device), lambda: _restate(edit, keys, key_heads, device))
    key = ("restated", key_heads, device)
    if key not in edit.lasts:
        with torch.inference_mode(False):  # kept longer than the pass that makes it
            edit.lasts[key] = _restate(edit, keys, key_heads, device)
    return edit.lasts[key]


def of_bias(bias: Tensor, key_heads: int, rows: Tensor | None = None, kind: str = "bias") -> Restated:
    """Key biases, or factors of a `ScoreGain` [B or 1, H or 1, n]."""
    bias = bias.float()
    index, count = listed(bias != 0, key_heads)
    return Restated(kind, 0, bias, index, count, rows=rows)


def _restate(edit: Edit, keys: int, key_heads: int, device: torch.device) -> Restated:
    kind, rows = kind_of(edit), None if edit.rows is None else edit.rows.to(device)
    if isinstance(edit, ScoreGain):
        return of_bias(edit.factor.to(device), key_heads, rows, kind)
    if isinstance(edit, ScoreEdit):
        assert edit.per_key is not None
        return of_bias(edit.per_key.to(device), key_heads, rows)

    def mask(columns: Columns) -> Tensor:
        return column_mask(columns, keys, device)

    rest, second, third = 0, 0.0, 0.0
    if isinstance(edit, Mix):
        amount, marks = edit.strength, None
    elif isinstance(edit, Transfer):
        amount, source = edit.strength, mask(edit.source)
        if edit.target is None:
            marks, rest = 2 - source.to(torch.int8), 2
        else:
            marks = torch.where(source, 1, 2 * mask(edit.target).to(torch.int8))
    elif isinstance(edit, Lift):
        amount, marks, second, third = edit.share, mask(edit.columns).to(torch.int8), edit.largest, edit.least
    else:
        assert isinstance(edit, Gain)
        amount, marks = edit.factor, mask(edit.columns).to(torch.int8)
        if isinstance(edit.renormalise, Tensor):
            marks = marks + 2 * mask(edit.renormalise).to(torch.int8)
    index, count = (None, None) if marks is None else listed(marks != rest, key_heads)
    amounts = amount.to(device) if isinstance(amount, Tensor) else None
    number = 0.0 if isinstance(amount, Tensor) else float(amount)
    return Restated(kind, rest, marks, index, count, amounts, rows, number, second, third)


def _of_sinks(edit: GiveBack, key_heads: int, device: torch.device) -> Restated:
    """What was found holds for all steps of an answer, the edit for one."""

    def make() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sinks, _, _, image = edit.found.groups[:, :, edit.key_start :].to(device).unbind(dim=1)
        marks = (sinks + 2 * image).to(torch.int8)[:, None]
        limit = edit.found.limit(edit.rho, sinks)
        return (marks, *listed(marks > 0, key_heads), limit)

    known = edit.found.remember(("restated", edit.key_start, edit.rho, device), make)
    rows = None if edit.rows is None else edit.rows.to(device)
    return Restated("give back", 0, *known, rows, edit.move, edit.rho, edit.summ)


def listed(mask: Tensor, key_heads: int) -> tuple[Tensor, Tensor]:
    """(columns [B, Hkv or 1, n], those that any head of the key head names first and in order; how many these are [B, Hkv or 1]).

    The number stays on the device, for a kernel to read.
    """
    if mask.shape[1] > 1:
        mask = mask.unflatten(1, (key_heads, -1)).any(dim=2)
    return mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True), mask.sum(dim=-1)
