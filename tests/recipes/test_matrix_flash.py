"""Every method that steers text on flash attention's own function: the logits are those that it gives on SDPA.

Left out are Gemma 3 with images, which see each other under SDPA and not under flash attention, whatever acts, and branches that hide words
from layers with windows, where flash attention counts the words that are left.
"""

from __future__ import annotations

import pytest
import torch
from flash_kernels import installed, under
from matrix_models import Case, cases

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.filterwarnings("ignore:var. no first token is a sink"),
    pytest.mark.filterwarnings("ignore:the borders of the segments"),
]


@pytest.mark.parametrize(("name", "model", "kind"), cases("flash", llm=["Llama", "Mistral"], lvlm=["llava"]))
def test_flash_attention_is_as_sdpa(name: str, model: str, kind: str) -> None:
    case = Case(name, model, kind)
    if model == "Mistral" and case.slug in ("pine", "spa"):
        return  # the one has no windows, the other's branch has others
    with installed("flash_attention_2"):
        under(case.model, "flash_attention_2")
        try:
            if case.refused("flash"):
                return
            before = case.logits()
            with case.apply():
                tokens, found = case.generate()
            assert torch.equal(case.logits(), before)
        finally:
            under(case.model, "sdpa")
    with case.apply():
        wanted = case.generate()
    assert torch.equal(tokens, wanted[0])
    torch.testing.assert_close(found, wanted[1], atol=1e-5, rtol=1e-4)
