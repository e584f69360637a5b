"""Roles of the columns of a denoiser's text, put on the tokens of its calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...interventions import TokenMap


@dataclass(frozen=True, eq=False)
class Marks:
    """Roles of the columns of a pass's text: by name bool [rows of the text, columns], on the CPU. texts: {row of the batch: what each text
    encoder wrote there}, of rows whose words were read."""

    roles: Mapping[str, Tensor]
    texts: Mapping[int, Sequence[Any]] = field(default_factory=dict)


def mark(tokens: TokenMap, marks: Marks, mask: Tensor | None, sample: int | None, site: str) -> None:
    """Gives the map of a call the roles of the text's columns, on those of its tokens that are text, in their order.

    mask: bool [rows, columns], False = padding, which some maps leave out. sample: the row whose call it is, in models that make one per
    sample. Where the text in the call is not that of the pass, the roles are left unknown.
    """
    if tokens.unknown:
        return
    text = tokens.roles.get("text")
    if text is None or not bool(text.any()):
        return  # who asks there for words is told that there is no text

    def rows(of_all: Tensor) -> Tensor:
        if sample is not None:
            return of_all[sample : sample + 1]
        # frames may be folded into the batch
        return of_all.repeat_interleave(max(1, tokens.batch // len(of_all)), dim=0)

    roles = {role: rows(marked) for role, marked in marks.roles.items()}
    real = None if mask is None else rows(mask.cpu())
    found = {role: torch.zeros_like(text) for role in roles}
    for row in range(tokens.batch):
        positions = text[row].nonzero()[:, 0]
        if not len(positions):
            continue
        for role, marked in roles.items():
            own = marked[row] if row < len(marked) else marked.new_zeros(0)
            if real is not None and len(own) > len(positions):
                own = own[real[row]]
            if len(own) != len(positions):
                tokens.unknown = f"{site} has {len(positions)} text tokens, and the text of the pass {marked.shape[1]} columns"
                return
            found[role][row, positions] = own.to(text.device)
    tokens.roles.update(found)
