"""What kernels are given for a mask is made once for all layers, and gone with the mask."""

from __future__ import annotations

import functools
import gc
import weakref
from collections import Counter

import pytest
import torch
from reattend.interventions.engine.kernels import attend
from reattend.interventions.engine.of_masks import of_mask
from torch.utils._python_dispatch import TorchDispatchMode


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.launches[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


MAKING = ("masked_fill_", "bitwise_not", "bitwise_and", "_to_copy", "zeros", "ones", "tril", "masked_fill")


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_once_for_all_layers_and_anew_once_it_is_written_to(dtype, causal):
    mask = torch.rand(2, 1, 4, 12) > 0.3
    mask[..., 0] = True
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, float("-inf"))
    made, outputs = [], []
    for layer in range(4):
        query, key, value = (torch.randn(2, 3, n, 8) for n in (4, 12, 12))
        if layer == 3:
            mask[:, :, :, 1] = mask[:, :, :, 0]
        with Counted() as seen:
            outputs.append(attend(query, key, value, mask, causal, need_lse=True)[0])
        made.append(sum(seen.launches[name] for name in MAKING))
        torch.testing.assert_close(outputs[-1], attend(query, key, value, mask.clone(), causal, need_lse=True)[0])
    assert made[0] > 0 and made[1:3] == [0, 0] and made[3] > 0


def test_gone_with_the_mask():
    mask = torch.rand(1, 1, 4, 4) > 0.5
    made = weakref.ref(of_mask(mask, "doubled", functools.partial(torch.add, mask, mask)))
    assert made() is not None
    del mask
    gc.collect()
    assert made() is None


def test_masks_whose_changes_cannot_be_seen():
    count = iter(range(10))
    with torch.inference_mode():
        unseen = torch.ones(1, 1, 2, 2)
    learned = torch.ones(1, 1, 2, 2, requires_grad=True)
    assert [of_mask(mask, "", lambda: next(count)) for mask in (unseen, unseen, learned, learned)] == [0, 1, 2, 3]
