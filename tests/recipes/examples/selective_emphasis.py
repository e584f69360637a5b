"""selective-emphasis: half of every image counts as local."""

from example import IN_THE_SEQUENCE, Example

EXAMPLES = {
    "": Example("lvlm", {"first_layer": 1, "local_share": 0.5}, off={"alpha": 0, "beta": 0}, layers=3, refused=IN_THE_SEQUENCE)
}
