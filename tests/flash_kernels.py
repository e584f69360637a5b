"""Flash kernels that stand in for those of a package: transformers' own wrapper calls them, and they compute in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask


class Kernels:
    """flash_attn_func and flash_attn_varlen_func as their documentation has them: causality from the lower right, windows inclusive."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def one(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """q [T, H, D], k and v [S, Hkv, D] of one sequence."""
        shared = q.shape[1] // k.shape[1]
        q, k, v = q.double(), k.double().repeat_interleave(shared, 1), v.double().repeat_interleave(shared, 1)
        scale, cap = options["softmax_scale"], options["softcap"]
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = cap * (scores / cap).tanh() if cap else scores
        distance = torch.arange(k.shape[0]) - torch.arange(k.shape[0] - q.shape[0], k.shape[0])[:, None]
        left, right = options["window_size"]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        hidden |= (distance > 0) if options["causal"] else hidden
        hidden |= (distance < -left) if left >= 0 else hidden
        hidden |= (distance > right) if right >= 0 else hidden
        scores = scores.masked_fill(hidden, float("-inf"))
        sinks = options["s_aux"]
        if sinks is not None:
            scores = torch.cat([scores, sinks.double().view(-1, 1, 1).expand(-1, q.shape[0], 1)], -1)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : k.shape[0]], v)

    def func(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, s_aux=None):
        options = {
            "softmax_scale": softmax_scale,
            "causal": causal,
            "window_size": window_size,
            "softcap": softcap,
            "s_aux": s_aux,
        }
        self.calls.append(options)
        return torch.stack([self.one(*parts, **options) for parts in zip(q, k, v, strict=True)]).to(q.dtype)

    def varlen(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, s_aux=None,
    ):  # fmt: skip
        options = {
            "softmax_scale": softmax_scale,
            "causal": causal,
            "window_size": window_size,
            "softcap": softcap,
            "s_aux": s_aux,
        }
        self.calls.append(options | {"varlen": True})
        rows, columns = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        spans = zip(rows, rows[1:], columns, columns[1:], strict=False)
        return torch.cat([self.one(q[a:b], k[c:d], v[c:d], **options) for a, b, c, d in spans]).to(q.dtype)


@contextmanager
def installed(name: str) -> Iterator[Kernels]:
    """Loaded as transformers loads implementation `name`; any other that it were asked for meanwhile would fail."""
    found = Kernels()
    with pytest.MonkeyPatch.context() as patch:
        for attribute, value in {
            "_loaded_implementation": name, "_flash_fn": found.func, "_flash_varlen_fn": found.varlen, "_pad_fn": flash._pad_input,
            "_unpad_fn": flash._unpad_input, "_process_flash_kwargs_fn": flash._lazy_define_process_function(found.varlen),
        }.items():  # fmt: skip
            patch.setattr(flash, attribute, value)
        patch.setitem(AttentionInterface._global_mapping, name, flash_attention_forward)
        patch.setitem(AttentionMaskInterface._global_mapping, name, flash_attention_mask)
        yield found


def under(model: Any, name: str) -> Any:
    """The model with an implementation set, without asking for its package."""
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config._attn_implementation_internal = name
    return model
