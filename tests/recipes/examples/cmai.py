"""cmai: from the second layer on, since it looks at the layer before; or at its own."""

from example import IN_THE_SEQUENCE, Example

EXAMPLES = {
    "": Example("lvlm", {"first_layer": 1}, off={"gamma": 0}, layers=3, refused=IN_THE_SEQUENCE),
    "own layer": Example("lvlm", {"first_layer": 1, "lag": 0}, off={"gamma": 0}, layers=3, refused=IN_THE_SEQUENCE),
}
BAD = [({"gamma": 1}, "gamma.*less than or equal to 0.9")]

# -- what the benchmarks ask, see benchmarks/methods.py

TRIED = {"images": ["cmai:gamma=0.25", "cmai", "cmai:gamma=0.9"]}
