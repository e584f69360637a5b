"""act: all heads of two layers, with a threshold that columns of random weights reach."""

from example import Example

EXAMPLES = {
    "": Example(
        "llm",
        {"heads": [[layer, head] for layer in (0, 2) for head in range(4)], "threshold": 0.05, "beta": 0.1},
        off={"beta": 1.0},
        layers=2,
    )
}
