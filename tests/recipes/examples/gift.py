"""gift: the map is read at layer 1, before it is used there and later; or by a probe, where it is used before it could be known."""

from example import IN_THE_SEQUENCE, Example

WORDS = {"words": "content", "alpha": 3.0}
MERGED = {"saliency_layers": [1], "enhance_layers": [1, 3]}
PROBED = {"saliency_layers": [0, 2], "enhance_layers": [0, 1, 3]}
EXAMPLES = {
    "": Example("lvlm", {**MERGED, **WORDS}, off={"alpha": 0}, layers=2, refused=IN_THE_SEQUENCE),
    "from a probe": Example("lvlm", {**PROBED, **WORDS}, off={"alpha": 0}, layers=3, refused=IN_THE_SEQUENCE),
}
