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

# -- what the benchmarks ask, see benchmarks/methods.py

TIMED = {"act, all heads of layers 2 to 28": {"heads": "all"}, "act, 20 heads": lambda subject: {"heads": subject.heads}}
TRIED = {"calibration": ["act:heads=all:beta=0.7", "act:heads=all", "act:heads=all:beta=0.1", "act:profile_path={act}"]}
PAPER = {"calibration": "chosen heads: up to 7.3 points of mean accuracy over data sets on Llama-30B (abstract)"}
PROFILED = {"max_heads": 60}
