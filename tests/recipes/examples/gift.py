"""gift: the map is read at layer 1, before it is used there and later."""

from example import IN_THE_SEQUENCE, Example

EXAMPLES = {
    "": Example(
        "lvlm",
        {"saliency_layers": [1], "enhance_layers": [1, 3], "words": "content", "alpha": 3.0},
        off={"alpha": 0},
        layers=2,
        refused=IN_THE_SEQUENCE,
    )
}
