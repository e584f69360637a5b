"""pai: three layers and the logits; the attention part alone too."""

from example import IN_THE_SEQUENCE, Example

EXAMPLES = {
    "": Example(
        "lvlm",
        {"first_layer": 1, "alpha": 0.5, "gamma": 1.3},
        off={"alpha": 0, "gamma": 1},
        layers=4,
        refused={**IN_THE_SEQUENCE, "in pieces": "prefill_chunk_size=None"},
    ),
    "attention part": Example(
        "lvlm",
        {"first_layer": 1, "alpha": 0.5, "gamma": 1.0},
        off={"alpha": 0},
        layers=3,
        operations=(23, 12),
        refused=IN_THE_SEQUENCE,
    ),
}
BAD = [
    ({"alpha": -0.1}, "alpha"),
    ({"gamma": float("nan")}, "gamma"),
    ({"cutoff": 0}, "cutoff"),
    ({"beta": 1}, "beta is not a parameter"),
]

# -- what the benchmarks ask, see benchmarks/methods.py

TIMED = {"pai": {}, "pai, attention part": {"gamma": 1}}
FLOORS = {"pai": ("every token is computed once more without the image", "blind answer")}
TRIED = {"images": ["pai:alpha=0.1", "pai", "pai:alpha=0.4", "pai:gamma=1"]}
PAPER = {"images": "as quoted by others, LLaVA-1.5-7B, CHAIR_i 13.8 to 6.8 and F1 75.9 to 74.7"}
