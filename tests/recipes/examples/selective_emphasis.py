"""selective-emphasis: half of every image counts as local."""

from example import IN_THE_SEQUENCE, Example

EXAMPLES = {
    "": Example(
        "lvlm",
        {"first_layer": 1, "local_share": 0.5},
        off={"alpha": 0, "beta": 0},
        layers=3,
        operations=(23, 16),
        refused={**IN_THE_SEQUENCE, "videos": "this prompt holds a video"},
    )
}
BAD = [({"alpha": 3}, "alpha.*less than or equal to 2")]

# -- what the benchmarks ask, see benchmarks/methods.py

TRIED = {"images": ["selective-emphasis:alpha=0.35:beta=0.15", "selective-emphasis", "selective-emphasis:alpha=1.4:beta=0.6"]}
PAPER = {"images": "LLaVA-1.5-7B, CHAIR_i 13.8 to 4.0 and F1 75.9 to 71.8, with answers twice as long"}
