"""emphasise: other passages in every row, on some heads of a language model and on all of one with images."""

from example import HEADS, NOT_CAUSAL, PASSAGES, WORDS_BESIDE_IMAGES, Example

EXAMPLES = {
    "": Example("llm", {"alpha": 0.05, "heads": HEADS}, {"text": PASSAGES}, off={"alpha": 1.0}, operations=(12, 8)),
    "all heads": Example("llm", {"alpha": 0.05}, {"text": PASSAGES}, off={"alpha": 1.0}, operations=(2, 8)),
    "images": Example(
        "lvlm",
        {"alpha": 0.05, "occurrence": -1},
        {"text": WORDS_BESIDE_IMAGES},
        off={"alpha": 1.0},
        text_too=True,
        refused=NOT_CAUSAL,
    ),
}

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
