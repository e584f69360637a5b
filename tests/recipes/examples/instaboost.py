"""instaboost: other passages in every row."""

from example import NOT_CAUSAL, PASSAGES, WORDS_BESIDE_IMAGES, Example

SKIPS = {"bits": "a bias on any row of a batch puts all of them through another kernel"}
EXAMPLES = {
    "": Example("llm", {"multiplier": 20}, {"text": PASSAGES}, off={"multiplier": 1}, operations=(2, 8), skips=SKIPS),
    "images": Example(
        "lvlm",
        {"multiplier": 20, "occurrence": -1},
        {"text": WORDS_BESIDE_IMAGES},
        off={"multiplier": 1},
        text_too=True,
        refused=NOT_CAUSAL,
    ),
}
EXTREME = [{"multiplier": 100}]
NOTHING = [({"ranges": [(0, 18)], "multiplier": 20}, True), ({"ranges": [(1, 18)], "multiplier": 20}, True)]
BAD = [
    ({"text": "a", "multiplier": 0.5}, "multiplier.*greater than or equal to 1"),
    ({"text": "a", "multiplier": float("nan")}, "multiplier"),
    ({"text": "a", "heads": {}}, "heads is empty"),
    ({"text": "a", "strength": 2}, "strength is not a parameter"),
]

# -- what the benchmarks ask, see benchmarks/methods.py

TRIED = {"highlight": ["instaboost:multiplier=1.7", "instaboost", "instaboost:multiplier=9", "instaboost:multiplier=20"]}
PAPER = {"highlight": "matches or beats prompting and earlier steering of attention on 15 tasks (abstract)"}
