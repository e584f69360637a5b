"""instaboost: other passages in every row."""

from example import NOT_CAUSAL, PASSAGES, WORDS_BESIDE_IMAGES, Example

EXAMPLES = {
    "": Example("llm", {"multiplier": 20}, {"text": PASSAGES}, off={"multiplier": 1}, operations=(2, 8)),
    "images": Example(
        "lvlm",
        {"multiplier": 20, "occurrence": -1},
        {"text": WORDS_BESIDE_IMAGES},
        off={"multiplier": 1},
        text_too=True,
        refused=NOT_CAUSAL,
    ),
}
