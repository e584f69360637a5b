"""The way of accelerators for one edit of known columns: attention with its log-sum-exp, then one kernel, and no question to the device."""

from __future__ import annotations

from torch import Tensor

from ..edits import Edit
from .kernels import is_accelerator, needs_gradient
from .op import DTYPES, LARGEST_HEAD, columns, has_triton
from .restated import BIASES, Restated, kind_of, of_bias, restated
from .tasks import Group


def is_known(group: Group) -> bool:
    """Whether the edits are one that the kernel knows, or key biases on many rows: few rows take these as an additive row."""
    edit, x = _edit(group), group.x
    if not _is_served(group):
        return False
    if edit is None:
        known = bool(group.biases) and not group.few and not group.scores and not group.weights
    else:
        kind = kind_of(edit)
        known = (
            bool(kind)
            and not (kind in ("identity", "give back") and x.offset is None)
            and not (kind in BIASES and group.biases)
        )
    edits = (*group.biases, *group.scores, *group.weights)
    tensors = (tensor for own in edits for _, tensor in own.tensors())
    return known and not needs_gradient(x.query, x.key, x.value, x.mask, group.sinks, *tensors)


def _is_served(group: Group) -> bool:
    """Whether the op is the better way on the device: where it has no kernel it materialises rows, which is right for few."""
    x = group.x
    if not is_accelerator(x.query.device) or x.query.dtype not in DTYPES:
        return False
    largest = max(x.query.shape[3], x.value.shape[3])
    return group.few or x.query.device.type != "cuda" or (largest <= LARGEST_HEAD and has_triton(x.query.device))


def _edit(group: Group) -> Edit | None:
    """The only edit besides key biases of all rows."""
    edits = (*group.scores, *group.weights)
    return edits[0] if len(edits) == 1 else None


def restate(group: Group) -> Restated:
    x, edit = group.x, _edit(group)
    keys, key_heads, device = x.key.shape[2] - x.appended, x.key.shape[1], x.query.device
    if edit is None and len(group.biases) == 1:
        edit = group.biases[0]
    if edit is not None:
        return restated(edit, keys, key_heads, device)
    bias = group.bias()
    assert bias is not None
    return of_bias(bias.to(device), key_heads)


def run(group: Group, found: Restated) -> Tensor:
    x, call = group.x, group.call
    added = None if found.kind in BIASES else group.bias()
    output, lse = group.kernel(added, found.kind != "identity")
    return columns(
        x.query, x.key, x.value, output, lse, x.mask, x.is_causal, call.scaling, call.softcap, group.sinks, added, found.marks,
        found.index, found.count, found.amounts, found.rows, found.kind, found.rest, found.number, found.second, found.third,
        x.offset or 0,
    )  # fmt: skip
