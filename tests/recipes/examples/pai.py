"""pai: three layers and the logits; the attention part alone too."""

from example import IN_THE_SEQUENCE, Example

EXAMPLES = {
    "": Example(
        "lvlm", {"first_layer": 1, "alpha": 0.5, "gamma": 1.3}, off={"alpha": 0, "gamma": 1}, layers=4, refused=IN_THE_SEQUENCE
    ),
    "attention part": Example(
        "lvlm", {"first_layer": 1, "alpha": 0.5, "gamma": 1.0}, off={"alpha": 0}, layers=3, refused=IN_THE_SEQUENCE
    ),
}
