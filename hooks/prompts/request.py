"""A request as a recipe sees it before `generate` or a forward pass: what the model would be called with, and what that was made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...interventions import Memory, ReattendError, TokenMap


@dataclass
class Request:
    """arguments: those of the model's forward, by name. images, text: what they were made of, where the caller has said it.

    tokens: the map of its prompt. config: the model's. memory: the recipe's store for the sequence to come, the one that its interventions
    read as `call.memory`. look(arguments) -> Memory: one pass of the plain model over these arguments (none: the request's own), as far as
    the step's readers read it; what they keep in `memory` is what it returns. process(images, text) -> arguments: by the session's
    processor. Raises ReattendError for a session without one.
    """

    arguments: dict[str, Any]
    tokens: TokenMap
    config: Any
    look: Callable[..., Memory]
    processor: Any = None
    images: Any = None
    text: Any = None
    memory: Memory = field(default_factory=Memory)

    def process(self, images: Any = None, text: Any = None) -> dict[str, Any]:
        """What the model is called with for other images and text, on the device and in the number type of this request."""
        if self.processor is None:
            raise ReattendError("a request is changed by the model's processor: reattend.apply(..., tokenizer=processor)")
        given = {"text": self.text if text is None else text, "return_tensors": "pt", "padding": True}
        if images is not None:
            given["images"] = images
        return {name: self._as_before(value) for name, value in self.processor(**given).items()}

    def _as_before(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        like = next(x for x in self.arguments.values() if isinstance(x, Tensor))
        floats = next((x for x in self.arguments.values() if isinstance(x, Tensor) and x.is_floating_point()), None)
        return value.to(like.device, None if floats is None or not value.is_floating_point() else floats.dtype)


def changed_arguments(said: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The arguments that a function says instead of a request's. Raises ReattendError where they hold no prompt."""
    if not isinstance(said, Mapping) or not any(isinstance(said.get(name), Tensor) for name in keys):
        raise ReattendError(
            f"a request is changed to a mapping of all arguments of the model, with {' or '.join(keys)}; got {said!r:.80}"
        )
    return dict(said)
