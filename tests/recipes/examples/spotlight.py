"""spotlight: other passages in every row."""

from example import HEADS, NOT_CAUSAL, PASSAGES, WORDS_BESIDE_IMAGES, Example

EXAMPLES = {
    "": Example("llm", {"target": 0.6}, {"text": PASSAGES}, off={"target": 0}, operations=(34, 6)),
    "some heads": Example("llm", {"target": 0.6, "heads": HEADS}, {"text": PASSAGES}, off={"target": 0}, operations=(44, 6)),
    "images": Example(
        "lvlm",
        {"target": 0.6, "occurrence": -1},
        {"text": WORDS_BESIDE_IMAGES},
        off={"target": 0},
        text_too=True,
        refused=NOT_CAUSAL,
    ),
}
EXTREME = [{"target": 0.9, "exact": True}]
NOTHING = [({"ranges": [(0, 18)]}, True), ({"ranges": [(0, 18)], "target": 0.6, "exact": True}, True)]
BAD = [
    ({"text": "a", "target": 1}, "target.*less than or equal to 0.9"),
    ({"text": "a", "target": float("nan")}, "target"),
    ({"text": "a", "largest_factor": 0.5}, "largest_factor"),
    ({"text": "a", "target": 0.2, "min_share": 0.2}, "min_share must be below target"),
]

# -- what the benchmarks ask, see benchmarks/methods.py

TRIED = {"highlight": ["spotlight:target=0.1", "spotlight", "spotlight:target=0.4", "spotlight:target=0.6"]}
PAPER = {"highlight": "Qwen2.5-7B, IFEval by prompt 0.47 to 0.54"}
