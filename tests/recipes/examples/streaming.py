"""streaming: a window shorter than the prompts."""

from example import Example

SKIPS = {"holes": "its window counts columns, hidden ones too"}
EXAMPLES = {
    "": Example("llm", {"sinks": 2, "window": 5}, off={"window": 200}, skips=SKIPS),
    "last rows": Example(
        "llm",
        {"sinks": 2, "window": 8, "last_rows": 4, "start_layer": 1},
        off={"window": 200},
        layers=3,
        skips=SKIPS,
        refused={"in pieces": "comes in pieces"},
    ),
}
NOTHING = [({"sinks": 2, "window": 64}, False)]
BAD = [
    ({"window": 0}, "window: .*greater than or equal to 1"),
    ({"sinks": -1}, "sinks: .*got -1"),
    ({"x": 1}, "x is not a parameter of 'streaming'; its parameters are: sinks, window"),
]

# -- what the benchmarks ask, see benchmarks/methods.py

TIMED = {"streaming, window 256": {"window": 252}}
TRIED = {
    "copying": ["streaming:window=60", "streaming:window=124", "streaming:window=188", "streaming"],
    "windows": ["streaming:window=252"],
}
PAPER = {"copying": "perplexity stays flat up to 4 million tokens (as recalled)"}
