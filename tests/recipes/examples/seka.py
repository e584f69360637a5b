"""seka: other passages in every row, with directions learned from two pairs of made-up sentences."""

from example import PASSAGES, WORDS_BESIDE_IMAGES, Example
from reattend.recipes import recipe_class


def profile(model, tokenizer):
    return recipe_class("seka").profile(model, tokenizer, pairs=2, experts=False)


OFF = {"gain": 0, "negative_gain": 0}
EXAMPLES = {
    "": Example(
        "llm", {"layers": "all", "gain": 2.0}, {"text": PASSAGES}, OFF, acts=["prefill"], profile=profile, operations=(2, 0)
    ),
    "images": Example(
        "lvlm", {"layers": "all", "gain": 2.0, "occurrence": -1}, {"text": WORDS_BESIDE_IMAGES}, OFF, acts=["prefill"],
        text_too=True, profile=profile,
    ),
}  # fmt: skip
