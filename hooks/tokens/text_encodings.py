"""What a pipeline's text encoders give while somebody listens: the states by which columns of a text are told."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, Protocol

from torch import Tensor, nn

from ..sites.discovery import components, original_of
from .text_columns import Encoded

ENCODINGS = 32


class Listening(Protocol):
    """Where hooks on modules are put on."""

    def before(self, module: nn.Module, function: Any, *, kwargs: bool = False) -> None: ...

    def after(self, module: nn.Module, function: Any) -> None: ...


def text_encoders(model: Any) -> dict[str, tuple[nn.Module, Any]]:
    """{name: (text encoder, its tokenizer)} of a pipeline."""
    model = original_of(model)
    if isinstance(model, nn.Module):
        return {}
    parts = getattr(model, "components", {})
    found = {}
    for name, encoder in components(model).items():
        if name.startswith("text_encoder"):
            given = parts.get(name.replace("text_encoder", "tokenizer")) or parts.get("processor")
            tokenizer = getattr(given, "tokenizer", given)
            if tokenizer is not None:
                found[name] = encoder, tokenizer
    return found


class TextEncodings:
    """The last passes of text encoders, {name: (text encoder, its tokenizer)}. encoded: oldest first."""

    def __init__(self, encoders: dict[str, tuple[nn.Module, Any]]) -> None:
        self.encoders = encoders
        self.tokenizers = {name: tokenizer for name, (_, tokenizer) in encoders.items()}
        self.encoded: deque[Encoded] = deque(maxlen=ENCODINGS)
        self.local = threading.local()

    def listen(self, hooks: Listening) -> None:
        for name, (encoder, _) in self.encoders.items():
            hooks.after(encoder, self._encoded_by(name))
            hooks.before(encoder, self._encodes, kwargs=True)
            for path, module in encoder.named_modules():
                # pipelines that skip layers (clip_skip) normalise an earlier state themselves
                if path.rsplit(".", 1)[-1] == "final_layer_norm" and "layers" not in path.split("."):
                    hooks.after(module, self._normalised)

    def _encodes(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        self.local.last, self.local.given = None, None
        if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point():
            real = mask.bool().cpu() if isinstance(mask, Tensor) and mask.shape == ids.shape else None
            self.local.given = ids.cpu(), real

    def _encoded_by(self, name: str) -> Any:
        def encoded(module: nn.Module, args: tuple, output: Any) -> None:
            given, self.local.given = getattr(self.local, "given", None), None
            if given is not None and output is not None:
                self.local.last = Encoded(name, *given)
                self.local.last.add(output)
                self.encoded.append(self.local.last)

        return encoded

    def _normalised(self, module: nn.Module, args: tuple, output: Any) -> None:
        last = getattr(self.local, "last", None)
        if last is not None and output is not None:
            last.add(output)
