"""Plain attention: the fused kernel with its log-sum-exp where the device has one, and exact chunks of rows everywhere.

Masks follow torch: bool True = visible, or additive. Statistics are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

from ..edits.base import repeat_heads
from . import accelerators
from .of_masks import of_mask

# Up to this many query rows a call counts as decode: its rows are materialised, which costs what the kernel would.
FEW_ROWS = 4
# Values of one temporary [B, H, R, Tk] when rows are materialised in chunks on a CPU: 4 Mi float32 = 16 MiB.
CHUNK_VALUES = 1 << 22
# The same on an accelerator, where each operation of a chunk costs a launch whatever its size: this share of the memory it has, so that
# the three or four temporaries that live at a time take a sixteenth. Of all of it and not of what is free: where rows are cut, and so the
# last bits of sums over them, must not change from run to run. At least 256 MiB of float32, also where the memory is not known.
SHARE_OF_MEMORY = 64
LEAST_VALUES = 1 << 26
# Before torch 2.9, which is the floor, the CPU kernel with log-sum-exp takes each query head for a key head and reads past the end
# of shared ones without an error. By version and not by a trial: the trial would read there too.
CPU_KERNEL_SHARES_HEADS = TorchVersion(torch.__version__) >= TorchVersion("2.9")


def statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether what is computed from any of these is to be differentiated."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def is_accelerator(device: torch.device) -> bool:
    """Whether operations pay by the launch, so that many small ones cost more than what they compute, and a question about a value waits."""
    return device.type != "cpu"


def chunk_values(device: torch.device) -> int:
    """How many float32 one temporary of a chunk of rows may hold on a device."""
    return _values_of_memory(device) if is_accelerator(device) else CHUNK_VALUES


@functools.lru_cache(maxsize=64)
def _values_of_memory(device: torch.device) -> int:
    try:
        memory = torch.get_device_module(device).get_device_properties(device).total_memory
    except (RuntimeError, AttributeError, AssertionError):
        return LEAST_VALUES
    return max(LEAST_VALUES, memory // (4 * SHARE_OF_MEMORY))


def rows_per_chunk(batch: int, heads: int, keys: int, device: torch.device) -> int:
    return max(16, chunk_values(device) // max(1, batch * heads * keys))


def grouped_matmul(query: Tensor, key: Tensor) -> Tensor:
    """query [B, H, R, D] x key [B, Hkv, Tk, D] -> [B, H, R, Tk] without repeating keys: heads that share a key head are stacked as rows."""
    batch, heads, rows, dim = query.shape
    of_keys, shared, keys, _ = key.shape
    if of_keys != batch:
        return query @ repeat_heads(key, heads).transpose(2, 3)
    # what `matmul` comes to, in half of its operations
    stacked = query.reshape(batch * shared, heads // shared * rows, dim)
    return torch.bmm(stacked, key.flatten(0, 1).transpose(1, 2)).view(batch, heads, rows, keys)


def grouped_values(weights: Tensor, value: Tensor) -> Tensor:
    """weights [B, H, R, Tk] x value [B, Hkv, Tk, Dv] -> [B, H, R, Dv], key heads shared as in `grouped_matmul`."""
    batch, heads, rows, keys = weights.shape
    of_values, shared, _, dim = value.shape
    if of_values != batch:
        return weights @ repeat_heads(value, heads)
    stacked = weights.reshape(batch * shared, heads // shared * rows, keys)
    return torch.bmm(stacked, value.flatten(0, 1)).view(batch, heads, rows, dim)


def visible_rows(mask: Tensor | None, is_causal: bool, index: Tensor, num_queries: int, num_keys: int) -> Tensor | None:
    """Bool, broadcastable to [B, H, R, Tk]: what the rows `index` may see; None when everything is visible."""
    visible = None
    if mask is not None:
        part = mask if mask.shape[2] == 1 else mask[:, :, index]
        visible = part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
    if is_causal:
        columns = torch.arange(num_keys, device=index.device)
        causal = (columns[None] <= index[:, None] + (num_keys - num_queries))[None, None]
        visible = causal if visible is None else visible & causal
    return visible


def score_rows(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float, softcap: float | None, index: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(scores, visible) of the query rows `index` (ascending, each once): scores [B, H, R, Tk] in statistics dtype, hidden pairs at -inf."""
    dtype = statistics_dtype(query)
    part = query if index.shape[0] == query.shape[2] else query[:, :, index]
    scores = grouped_matmul(part.to(dtype) * scale, key.to(dtype))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + (mask if mask.shape[2] == 1 else mask[:, :, index]).to(dtype)
    visible = visible_rows(mask, is_causal, index, query.shape[2], key.shape[2])
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores, visible


def softmax_rows(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over keys; learned sink logits [H] take their share of the denominator. Rows without a visible key become uniform."""
    scores = scores.clamp_min(torch.finfo(scores.dtype).min)  # a row at -inf would give NaN
    if sinks is None:
        return scores.softmax(dim=-1)
    logit = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, logit], dim=3).softmax(dim=-1)[..., :-1]


@dataclass(slots=True, eq=False)
class Attention:
    """Plain attention as a kernel is asked for it. scale: the factor on q k; softcap, sinks [H] and is_causal as in `Call`.

    piece: its sizes come once, so that a kernel which makes a plan for every size would make one for nothing.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float
    softcap: float | None
    sinks: Tensor | None
    piece: bool = False

    def aligned(self) -> tuple[Tensor | None, bool]:
        """(mask, is_causal) as torch's kernels take them: their causal flag holds from the first key on, and beside no mask."""
        if not self.is_causal or (self.mask is None and self.query.shape[2] == self.key.shape[2]):
            return self.mask, self.is_causal
        sizes = self.query.shape[2], self.key.shape[2]
        if self.mask is None:
            return _with_causal(None, *sizes, self.query.device), False
        return of_mask(self.mask, ("causal", *sizes), lambda: _with_causal(self.mask, *sizes, self.query.device)), False


@dataclass(frozen=True)
class Kernel:
    """One way to compute plain attention.

    fits: whether it can, from types, shapes and device. run: (output [B, H, Tq, Dv], log-sum-exp [B, H, Tq] or None); None where torch
    says that the device has no kernel for it, or that another one of the list is the right one.
    """

    name: str
    fits: Callable[[Attention], bool]
    run: Callable[[Attention], tuple[Tensor, Tensor | None] | None]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    need_lse: bool = False,
    piece: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention output [B, H, Tq, Dv] and, on request, the log-sum-exp [B, H, Tq] of each row's scores over the keys (sink logits included).

    piece: these are rows or keys of a call, in sizes that come once.
    """
    scale = float(query.shape[-1] ** -0.5) if scale is None else scale
    asked = Attention(query, key, value, mask, is_causal, scale, softcap, sinks, piece)
    # learned sinks are joined by the log-sum-exp
    for kernel in STATISTICS if need_lse or sinks is not None else OUTPUTS:
        if kernel.fits(asked):
            found = kernel.run(asked)
            if found is not None:
                return found
    raise AssertionError("the last kernel of each list takes everything")


def _with_causal(mask: Tensor | None, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)[None, None]
    if mask is None:
        return causal
    return mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, float("-inf"))


def pack_row(query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
    """One query row and shared key heads: the heads of a group become rows of their key head, so keys are read once."""
    batch, heads, rows, dim = query.shape
    shared = key.shape[1]
    if rows != 1 or heads == shared:
        return None
    packed = query.reshape(batch, shared, heads // shared, dim)
    if mask is not None and mask.shape[1] > 1:
        mask = mask.reshape(mask.shape[0], shared, heads // shared, mask.shape[3])
    return packed, mask


def _sdpa(x: Attention) -> tuple[Tensor, None]:
    query, key, value = x.query, x.key, x.value
    mask, is_causal = x.aligned()
    if mask is not None and mask.dtype != torch.bool:
        mask = _as_added(mask, query.dtype)
    packed = pack_row(query, key, mask)
    if packed is not None:
        output = F.scaled_dot_product_attention(packed[0], key, value, attn_mask=packed[1], scale=x.scale)
        return output.reshape(*query.shape[:3], value.shape[3]), None
    shared = query.shape[1] != key.shape[1]
    if shared and query.device.type == "cuda" and accelerators.choose(query, key, value, mask, is_causal, False, False).repeats:
        key, value, shared = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1]), False
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=x.scale, enable_gqa=shared
    )
    return output, None


def _additive(x: Attention) -> tuple[Tensor | None, bool]:
    """`Attention.aligned` with a mask that is added, in the query's dtype, as kernels take it that are called directly."""
    mask, is_causal = x.aligned()
    if mask is not None:
        mask = _as_added(mask, x.query.dtype)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    return mask, is_causal


def _as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added, once for all calls that are given the same one."""
    if mask.dtype == dtype:
        return mask

    def make() -> Tensor:
        if mask.dtype != torch.bool:
            return mask.to(dtype)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))

    return of_mask(mask, dtype, make)


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    """Called directly, kernels take the last axis to be contiguous without checking it."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _cuda_with_gradient(x: Attention) -> tuple[Tensor, None] | None:
    query, key, value = _contiguous(x.query, x.key, x.value)
    mask, is_causal = _additive(x)
    output = accelerators.with_gradient(query, key, value, mask, is_causal, x.scale)
    return None if output is None else (output, None)


def _gives_lse(x: Attention) -> bool:
    """Whether torch's own kernels can be called so that they also return the log-sum-exp."""
    # it carries no gradient, and called directly they give none to a mask
    gradient = needs_gradient(x.query, x.key, x.value, x.mask)
    return x.softcap is None and not gradient and x.query.shape[-1] == x.value.shape[-1]


LseKernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float], tuple[Tensor, Tensor] | None]


def _with_lse(x: Attention, kernel: LseKernel) -> tuple[Tensor, Tensor] | None:
    """The same kernel that torch's SDPA picks, called so that it also returns the log-sum-exp."""
    mask, is_causal = _additive(x)
    query, key, value = _contiguous(x.query, x.key, x.value)
    packed = pack_row(query, key, mask)
    q, bias = (query, mask) if packed is None else packed
    found = kernel(q, key, value, bias, is_causal, x.scale)
    if found is None:
        return None
    output, lse = found[0].reshape(*query.shape[:3], value.shape[3]), found[1].reshape(query.shape[:3])
    if x.sinks is None:
        return output, lse
    joint = torch.logaddexp(lse, x.sinks.to(lse.dtype).view(1, -1, 1))
    return output * (lse - joint).exp()[..., None].to(output.dtype), joint


def _cpu_with_lse(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float):
    if not CPU_KERNEL_SHARES_HEADS:
        key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale
    )


def _cuda_with_lse(x: Attention) -> tuple[Tensor, Tensor] | None:
    unplanned = x.piece or x.query.shape[2] <= FEW_ROWS
    return _with_lse(x, functools.partial(accelerators.with_lse, unplanned=unplanned))


def _in_chunks(x: Attention) -> tuple[Tensor, Tensor]:
    """Exact attention with lse in O(chunk * Tk) memory, for soft-capped scores and devices without a kernel that returns the lse."""
    query = x.query
    dtype = statistics_dtype(query)
    outputs, statistics = [], []
    step = rows_per_chunk(query.shape[0], query.shape[1], x.key.shape[2], query.device)
    for start in range(0, query.shape[2], step):
        index = torch.arange(start, min(start + step, query.shape[2]), device=query.device)
        scores, _ = score_rows(query, x.key, x.mask, x.is_causal, x.scale, x.softcap, index)
        lse = torch.logsumexp(scores, dim=-1)
        if x.sinks is not None:
            lse = torch.logaddexp(lse, x.sinks.to(dtype).view(1, -1, 1))
        lse = lse.masked_fill(lse == float("-inf"), 0.0)
        weights = (scores - lse[..., None]).exp_()
        outputs.append(grouped_values(weights, x.value.to(dtype)).to(query.dtype))
        statistics.append(lse)
    return torch.cat(outputs, dim=2), torch.cat(statistics, dim=2)


# Which kernel gives an output, and which one a log-sum-exp with it: the first that fits.
OUTPUTS = [
    Kernel(
        "CUDA's with a gradient",
        lambda x: x.query.device.type == "cuda" and x.softcap is None and needs_gradient(x.query, x.key, x.value, x.mask),
        _cuda_with_gradient,
    ),
    Kernel("sdpa", lambda x: x.softcap is None, _sdpa),
    Kernel("chunks of rows", lambda x: True, _in_chunks),
]
STATISTICS = [
    Kernel("flash on CPUs", lambda x: x.query.device.type == "cpu" and _gives_lse(x), lambda x: _with_lse(x, _cpu_with_lse)),
    Kernel("CUDA's own choice", lambda x: x.query.device.type == "cuda" and _gives_lse(x), _cuda_with_lse),
    Kernel("chunks of rows", lambda x: True, _in_chunks),
]
