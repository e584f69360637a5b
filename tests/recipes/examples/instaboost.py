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

# -- what the benchmarks ask, see benchmarks/methods.py

TRIED = {"highlight": ["instaboost:multiplier=1.7", "instaboost", "instaboost:multiplier=9", "instaboost:multiplier=20"]}
PAPER = {"highlight": "matches or beats prompting and earlier steering of attention on 15 tasks (abstract)"}
