"""CUDA's attention kernels with their log-sum-exp: torch is asked which one its SDPA would take, and that one is called.

The answer honours the user's switches, priorities and determinism, the card and torch's version. Kernels are called by their names in
the dispatcher, so what is registered in their place (`torch.nn.attention.activate_flash_attention_impl`) serves here too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend

from ..edits.base import repeat_heads
from .of_masks import of_mask

aten = torch.ops.aten

MATH, FLASH, EFFICIENT, CUDNN = (
    int(backend.value)
    for backend in (
        SDPBackend.MATH,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
    )
)
# What cuDNN is given for minus infinity, as in torch's own SDPA: it is held by half precision, and a row that sees nothing stays finite.
LOWEST = -65504.0
# So many answers are kept; every length of a growing cache has its own.
MOST_ANSWERS = 4096


@dataclass(frozen=True)
class Choice:
    """answer: of torch for the call as it is. kernel: the one that is called, MATH for none. repeats: with a key head for every head."""

    answer: int
    kernel: int
    repeats: bool


def kernel_for(answer: int, unplanned: bool, gradient: bool, able: Callable[[int], bool]) -> int:
    """The kernel that is called where torch answers `answer`; MATH where none of these is.

    cuDNN is not called for sizes that come once (unplanned), because it makes a plan for every size, which takes it tens of
    milliseconds, nor where a gradient is wanted (its backward has given NaN). able: whether torch could take a kernel.
    """
    if answer == CUDNN and (unplanned or gradient):
        others = (EFFICIENT,) if gradient else (FLASH, EFFICIENT)
        return next((kernel for kernel in others if able(kernel)), MATH)
    return answer if answer in (FLASH, EFFICIENT, CUDNN) else MATH


def choose(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, unplanned: bool, gradient: bool
) -> Choice:
    """The kernel for a call like this one: torch is asked once for each size, layout and state of the user's settings.

    Inside a compiled region, where nothing can be asked, there is none.
    """
    if torch.compiler.is_compiling():
        return Choice(MATH, MATH, False)
    gradients = torch.is_grad_enabled()
    call = (
        query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride(), query.dtype, query.device,
        None if mask is None else (mask.shape, mask.stride(), mask.dtype),
        is_causal, unplanned, gradient,
        gradients and tuple(t is not None and t.requires_grad for t in (query, key, value, mask)),
        # what a user can change about the answer of torch
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(), *torch._C._get_sdp_priority_order(),
    )  # fmt: skip
    known = _answers.get(call)
    if known is None:
        if len(_answers) >= MOST_ANSWERS:
            _answers.clear()
        known = _answers[call] = _ask(query, key, value, mask, is_causal, unplanned, gradient)
    return known


_answers: dict[tuple, Choice] = {}


def _ask(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, unplanned: bool, gradient: bool
) -> Choice:
    def answer_for(q: Tensor, bias: Tensor | None, grouped: bool) -> int:
        choice = torch._fused_sdp_choice  # pyright: ignore[reportPrivateImportUsage]
        return int(choice(q, key, value, bias, 0.0, is_causal, enable_gqa=grouped))

    def can_use(q: Tensor, bias: Tensor | None, grouped: bool) -> Callable[[int], bool]:
        params = cuda.SDPAParams(q, key, value, bias, 0.0, is_causal, grouped)
        return lambda kernel: (cuda.can_use_flash_attention if kernel == FLASH else cuda.can_use_efficient_attention)(params)

    shared, grouped = key.shape[1], query.shape[1] != key.shape[1]
    answer = answer_for(query, mask, grouped)
    kernel = kernel_for(answer, unplanned, gradient, can_use(query, mask, grouped))
    if not grouped or kernel != MATH:
        return Choice(answer, kernel, grouped and kernel == EFFICIENT)
    # no kernel takes these groups, as none but cuDNN does beside a mask. It depends on key heads alone whether one takes repeated ones,
    # so that nothing need be repeated to ask
    wide, bias = query[:, :shared], mask if mask is None or mask.shape[1] == 1 else mask[:, :shared]
    kernel = kernel_for(answer_for(wide, bias, False), unplanned, gradient, can_use(wide, bias, False))
    return Choice(answer, kernel, kernel != MATH)


def with_lse(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float, unplanned: bool
) -> tuple[Tensor, Tensor] | None:
    """(output [B, H, Tq, Dv], natural log-sum-exp [B, H, Tq]), which carries no gradient, by the kernel of `choose`; None where it is none.

    bias: additive, in the query's dtype. The last axis of every tensor is contiguous.
    """
    return _call(choose(query, key, value, bias, is_causal, unplanned, False), query, key, value, bias, is_causal, scale)


def with_gradient(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> Tensor | None:
    """The output with its gradient, bias included, where torch's SDPA would take a kernel whose gradient is not to be relied on."""
    choice = choose(query, key, value, bias, is_causal, False, True)
    if choice.answer != CUDNN:
        return None
    found = _call(choice, query, key, value, bias, is_causal, scale)
    return None if found is None else found[0]


def _call(
    choice: Choice, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor] | None:
    if choice.kernel == MATH:
        return None
    if choice.repeats:
        key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    output, lse = _KERNELS[choice.kernel](query, key, value, bias, is_causal, scale)
    return output, lse.reshape(*query.shape[:2], -1)[..., : query.shape[2]]


def _flash(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float):
    assert bias is None
    dim = value.shape[3]
    if dim % 8:
        query, key, value = (F.pad(t, (0, -dim % 8)) for t in (query, key, value))
    output, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, scale=scale)
    return output[..., :dim] if dim % 8 else output, lse


def _with_wide_rows(bias: Tensor) -> Tensor:
    keys = bias.shape[-1]
    return F.pad(bias, (0, -keys % 8))[..., :keys]


def _efficient(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float):
    if bias is not None:
        # the kernel wants rows of the bias to start at multiples of 16 bytes
        keys = key.shape[2]
        steps = [step for step, size in zip(bias.stride()[:3], bias.shape[:3]) if size > 1]
        if any(n % 8 for n in (keys, bias.storage_offset(), *steps)):
            bias = of_mask(bias, "rows at 16 bytes", functools.partial(_with_wide_rows, bias))
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], -1)
    output, lse, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, 0.0, is_causal, scale=scale)
    return output, lse


def _cudnn(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float):
    bias = None if bias is None else bias.clamp_min(LOWEST)
    output, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        query, key, value, bias, True, 0.0, is_causal, False, scale=scale
    )
    return output, lse


_KERNELS = {FLASH: _flash, EFFICIENT: _efficient, CUDNN: _cudnn}
