"""What `streaming` does to SmolLM2's predictions: mean negative log-likelihood of a text's later tokens, with and without sinks.

    python benchmarks/effect_streaming.py

The text is this repository's licence, about 2,300 tokens; the tokens after the first 1,024 count, so windows are full.
"""

from __future__ import annotations

from pathlib import Path

import reattend
import torch
from reattend.comparison.loading import packaged_smollm2

TEXT = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")
SETTINGS = [
    ("window 256 and 4 sinks", dict(window=252, sinks=4)),
    ("window 256, no sinks", dict(window=256, sinks=0)),
    ("window 512 and 4 sinks (half the context)", dict(window=508, sinks=4)),
    ("window 512, no sinks", dict(window=512, sinks=0)),
    ("window 1024 and 4 sinks (default size)", dict(window=1020, sinks=4)),
]


def loss(model, ids: torch.Tensor) -> tuple[float, float]:
    """Mean negative log-likelihood of tokens 1024.., and its standard error."""
    with torch.no_grad():
        logits = model(ids).logits[0, 1023:-1]
    each = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1024:], reduction="none")
    return each.mean().item(), (each.std() / each.numel() ** 0.5).item()


def main() -> None:
    model, tokenizer = packaged_smollm2()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, :2048]
    print(f"{ids.shape[1]} tokens; mean loss in nats per token +- standard error")
    print(f"| setting | loss |\n|---|---|\n| untouched | {'{:.3f} +- {:.3f}'.format(*loss(model, ids))} |")
    for name, parameters in SETTINGS:
        with reattend.apply(model, "streaming", **parameters):
            print(f"| {name} | {'{:.3f} +- {:.3f}'.format(*loss(model, ids))} |", flush=True)


if __name__ == "__main__":
    main()
