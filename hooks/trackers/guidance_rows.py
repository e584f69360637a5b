"""Which rows of a denoiser's batch are conditional under classifier-free guidance: what the user says, what a pipeline says.

A pipeline says whether it guides; how its batch is laid out then is known of its code (`pipelines`). In a loop of the user's own
nobody says it but the user (`rows`), and what is assumed otherwise stands in a warning.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...interventions import ReattendError
from .pipelines import Guidance, Layout, repeats

NAMES = ("conditional", "unconditional", "neither")
# arguments of denoisers that hold what an image is made from; a pass's two halves differ in them and in nothing else
CONDITIONING = ("encoder_", "class_labels", "pooled_", "added_cond_kwargs", "clip_", "text_", "prompt_", "cap_feats")

_said: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("reattend_rows", default=None)


@contextlib.contextmanager
def rows(*names: str) -> Iterator[None]:
    """Says which rows of a denoiser's batch are conditional, for calls of this thread or task inside the `with`.

    names: what the equal parts of the batch are, in order: "conditional" (the prompt's), "unconditional" (the negative prompt's) or
    "neither". One name stands for the whole batch, as in a loop that calls the denoiser once for each half; such a loop calls the
    conditional half first where a guide acts. What is said here goes before what a pipeline says.

    >>> with reattend.rows("conditional"):
    ...     positive = unet(latents, t, encoder_hidden_states=prompt).sample
    >>> with reattend.rows("unconditional"):
    ...     negative = unet(latents, t, encoder_hidden_states=nothing).sample

    Raises ReattendError for other names.
    """
    if not names or any(name not in NAMES for name in names):
        raise ReattendError(
            f'rows() takes "conditional", "unconditional" and "neither", one for each part of the batch, got {names}'
        )
    token = _said.set(tuple("" if name == "neither" else name for name in names))
    try:
        yield
    finally:
        _said.reset(token)


def said_rows(batch: int) -> Layout | None:
    """What `rows` says of a batch. Raises ReattendError for a batch that has no such parts."""
    layout = _said.get()
    if layout is not None and batch % len(layout):
        raise ReattendError(f"reattend.rows names {len(layout)} equal parts, but the denoiser's batch has {batch} rows")
    return layout


def layout_of_pipeline(
    guidance: Guidance, said: bool | None, perturbed: bool, hidden: Tensor | list[Tensor], given: Mapping[str, Any]
) -> Layout | None:
    """The parts of the batch of a pipeline that guides in one call; None where they are not known.

    said: whether the running call guides, where that is known. perturbed: one more part is at the end, as in PAG pipelines.
    """
    if said is None:
        # some pipelines keep it to themselves: the same latents several times, with different texts, are the parts
        layout, text = guidance.layout(hidden, perturbed), given.get("encoder_hidden_states")
        said = layout is not None and (not isinstance(text, Tensor) or not repeats(text, len(layout)))
    if said:
        return guidance.layout(hidden, perturbed)
    return ("conditional", "") if perturbed and repeats(hidden, 2) else None if perturbed else ("conditional",)


def branches_of(layout: Layout | None, hidden: Tensor | list[Tensor] | None) -> dict[str, Tensor]:
    """{name: bool [batch]} of a batch whose equal parts have these names ("" = neither half)."""
    if layout is None or hidden is None:
        return {}
    part, device = len(hidden) // len(layout), hidden[0].device
    return {
        name: torch.tensor([other == name for other in layout], device=device).repeat_interleave(part)
        for name in ("conditional", "unconditional")
        if name in layout
    } or {"conditional": torch.zeros(len(hidden), dtype=torch.bool, device=device)}


def conditioning(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a pass's image is made from: texts, labels, pooled and further embeddings."""
    return {name: value for name, value in given.items() if name.startswith(CONDITIONING) and value is not None}


def halves_differ(value: Any) -> bool:
    """Whether some tensor in what a pass is made from has two halves that are not the same."""
    if isinstance(value, Tensor):
        return value.dim() > 0 and value.shape[0] % 2 == 0 and not repeats(value, 2)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return any(halves_differ(part) for part in parts)


def same(a: Any, b: Any, *, look: bool = False) -> bool:
    """Whether two arguments are one tensor; look: or tensors that are equal."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride():
            return True
        return look and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], look=look) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, look=look) for x, y in zip(a, b, strict=True))
    return False
