"""emphasise: other passages in every row, on some heads of a language model and on all of one with images."""

from example import HEADS, NOT_CAUSAL, PASSAGES, WORDS_BESIDE_IMAGES, Example

SKIPS = {"bits": "a bias on any row of a batch puts all of them through another kernel"}
EXAMPLES = {
    "": Example(
        "llm", {"alpha": 0.05, "heads": HEADS}, {"text": PASSAGES}, off={"alpha": 1.0}, operations=(12, 8), skips=SKIPS
    ),
    "all heads": Example("llm", {"alpha": 0.05}, {"text": PASSAGES}, off={"alpha": 1.0}, operations=(2, 8), skips=SKIPS),
    "images": Example(
        "lvlm",
        {"alpha": 0.05, "occurrence": -1},
        {"text": WORDS_BESIDE_IMAGES},
        off={"alpha": 1.0},
        text_too=True,
        refused=NOT_CAUSAL,
    ),
}
EXTREME = [{"alpha": 1e-30}, {"alpha": 1e4}]
NOTHING = [
    ({"ranges": [(0, 18)], "alpha": 0.05}, False),
    ({"ranges": [(0, 18)], "alpha": 20, "position": "include"}, False),
    ({"position": "generation", "alpha": 0.1}, True),
]
BAD = [
    ({"text": "a", "alpha": 0}, "alpha.*greater than 0"),
    ({"text": "a", "alpha": float("nan")}, "alpha"),
    ({"text": "a", "position": "before"}, "position"),
    ({"text": "a", "heads": {}}, "heads is empty"),
    ({"text": "a", "heads": "best"}, "heads must be"),
    ({"text": "a", "heads": [(0, 1), (0, 1)]}, "twice"),
    ({"text": "a", "heads": [0], "profile_path": "p"}, "not both"),
    ({"text": "a", "top": 3}, "profile_path"),
    ({"text": [["a"], ["b", "c"]], "official_multi": True}, "as many passages"),
]

# -- what the benchmarks ask, see benchmarks/methods.py

TIMED = {
    "emphasise, all heads": lambda subject: subject.marked,
    "emphasise, 20 heads": lambda subject: {**subject.marked, "heads": subject.heads},
}
TRIED = {
    "highlight": [
        "emphasise:alpha=0.55",
        "emphasise",
        "emphasise:alpha=0.09",
        "emphasise:alpha=0.09:keep_sink=true",
        "emphasise:alpha=0.01",
        "emphasise:profile_path={emphasise}",
    ]
}
