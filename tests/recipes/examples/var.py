"""var: thresholds at which rows of random models have something to move."""

from example import IN_THE_SEQUENCE, Example

EXAMPLES = {
    "": Example(
        "lvlm",
        {"tau": 1.5, "sink_dims": list(range(8)), "first_layer": 1, "rho": 1.0, "summ": 0.0},
        off={"move": 0},
        layers=3,
        refused=IN_THE_SEQUENCE,
    )
}
