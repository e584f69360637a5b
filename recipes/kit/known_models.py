"""Published constants belong to published models: how a recipe knows one again, also when it was fine-tuned or renamed."""

from __future__ import annotations

from dataclasses import dataclass

from ...hooks import SiteTable


@dataclass(frozen=True)
class KnownModel:
    """A published model by the shape of its language model, which fine-tuning keeps.

    text_types: model types of the text config. vocabulary: sizes of the vocabulary that occur (None: any). kind: model type of the
    whole model (None: any).
    """

    name: str
    text_types: tuple[str, ...]
    hidden: int
    layers: int
    intermediate: int
    vocabulary: range | None = None
    kind: str | None = None

    def matches(self, table: SiteTable) -> bool:
        text = table.config.get_text_config()
        shape = (text.hidden_size, text.num_hidden_layers, getattr(text, "intermediate_size", None))
        return (
            shape == (self.hidden, self.layers, self.intermediate)
            and text.model_type in self.text_types
            and (self.vocabulary is None or text.vocab_size in self.vocabulary)
            and (self.kind is None or table.config.model_type == self.kind)
        )
