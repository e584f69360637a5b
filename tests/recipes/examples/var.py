"""var: thresholds at which rows of random models have something to move."""

from example import IN_THE_SEQUENCE, Example

EXAMPLES = {
    "": Example(
        "lvlm",
        {"tau": 1.5, "sink_dims": list(range(8)), "first_layer": 1, "rho": 1.0, "summ": 0.0},
        off={"move": 0},
        layers=3,
        operations=(52, 0),
        refused=IN_THE_SEQUENCE,
    )
}
BAD = [
    ({"move": 1.5}, "move"),
    ({"rho": -0.1}, "rho"),
    ({"summ": 2}, "summ"),
    ({"tau": 0}, "tau"),
    ({"strength": 1}, "strength"),
]

# -- what the benchmarks ask, see benchmarks/methods.py

TIMED = {"var": lambda subject: subject.var}
TRIED = {
    "images": [
        "var:tau=2:profile_path={var}:move=0.2",
        "var",
        "var:tau=2:profile_path={var}",
        "var:tau=2:profile_path={var}:move=0.8",
    ]
}
PROFILED = {"tau": 2.0, "text": "is there a circle in the image ?"}
