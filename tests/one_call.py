"""One small call of attention with shared key heads, for tests of single edits: by both executors, and by which way."""

from __future__ import annotations

from collections import Counter

import torch
from reattend.interventions import Call, Edit, fused, reference

B, H, KV, T, D = 2, 4, 2, 20, 8


def call(queries: int = T, causal: bool = True, dtype: torch.dtype = torch.float32, **options) -> Call:
    torch.manual_seed(0)
    query, key, value = (torch.randn(B, h, n, D, dtype=dtype) for h, n in ((H, queries), (KV, T), (KV, T)))
    return Call(query, key, value, is_causal=causal, **options)


def both(here: Call, edits: list[Edit]) -> torch.Tensor:
    found = fused(here, edits)
    torch.testing.assert_close(found, reference(here, edits), atol=1e-5, rtol=1e-5)
    return found


def way(here: Call, edits: list[Edit]) -> list[str]:
    here.ways = Counter()
    fused(here, edits)
    return list(here.ways)
