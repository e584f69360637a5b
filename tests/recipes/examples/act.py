"""act: all heads of two layers, with a threshold that columns of random weights reach."""

from example import Example

GIVEN = {"heads": [[layer, head] for layer in (0, 2) for head in range(4)], "threshold": 0.05, "beta": 0.1}
FACTS = {"off": {"beta": 1.0}, "layers": 2, "refused": {"in pieces": "prefill_chunk_size=None"}}
CLOSE = {"near": "which columns are sinks turns on weights that lie close to the threshold"}
OTHER = {"drafts": "nothing that the untouched model drafts is accepted"}
EXAMPLES = {
    "": Example("llm", GIVEN, **FACTS),
    "threshold by length": Example("llm", {**GIVEN, "threshold_alpha": 1.5}, **FACTS, skips=CLOSE),
    "columns of four rows": Example("llm", {**GIVEN, "min_rows": 4}, **FACTS, skips=OTHER),
    "official": Example("llm", {**GIVEN, "official_exempt": True}, **FACTS),
}
NOTHING = [({"heads": [[0, 1], [1, 0], [2, 2]], "threshold": 0.99}, False)]
BAD = [
    ({"heads": [[2, 1], [2, 1]]}, "twice"),
    ({"heads": [3, 4]}, r"\[\[layer, head\], ...\] or"),
    ({"heads": "all", "beta": 1.5}, "beta"),
]

# -- what the benchmarks ask, see benchmarks/methods.py

TIMED = {"act, all heads of layers 2 to 28": {"heads": "all"}, "act, 20 heads": lambda subject: {"heads": subject.heads}}
TRIED = {"calibration": ["act:heads=all:beta=0.7", "act:heads=all", "act:heads=all:beta=0.1", "act:profile_path={act}"]}
PAPER = {"calibration": "chosen heads: up to 7.3 points of mean accuracy over data sets on Llama-30B (abstract)"}
PROFILED = {"max_heads": 60}
