"""spa: other passages in every row; it changes logits, once a pass."""

from example import NOT_CAUSAL, PASSAGES, WORDS_BESIDE_IMAGES, Example

EXAMPLES = {
    "": Example("llm", {"strength": 3.0}, {"text": PASSAGES}, off={"strength": 1}, layers=1),
    "images": Example(
        "lvlm",
        {"strength": 3.0, "occurrence": -1},
        {"text": WORDS_BESIDE_IMAGES},
        off={"strength": 1},
        layers=1,
        text_too=True,
        refused=NOT_CAUSAL,
    ),
}
