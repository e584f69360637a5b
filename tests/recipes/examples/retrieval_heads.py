"""retrieval-heads: heads named by hand, switched off after the prompt or from its last row on, and strengthened in every row."""

from example import HEADS, Example

OFF = {"strength": 0}
EXAMPLES = {
    "sharpen": Example("llm", {"heads": HEADS, "strength": 1.0}, off=OFF),
    "mask": Example("llm", {"mode": "mask", "heads": HEADS}, off=OFF, acts=["decode"]),
    "mask from the last row on": Example(
        "llm",
        {"mode": "mask", "heads": HEADS, "where": "last_row"},
        off=OFF,
        refused={"in pieces": "retrieval-heads acts at the last token.*comes in pieces"},
    ),
    "zero": Example("llm", {"mode": "zero", "heads": HEADS}, off=OFF, acts=["decode"]),
    "mask, in every row": Example("llm", {"mode": "mask", "heads": HEADS, "where": "all"}, off=OFF),
    "zero, in every row": Example("llm", {"mode": "zero", "heads": HEADS, "where": "all"}, off=OFF),
    "sink_down": Example("llm", {"mode": "sink_down", "heads": HEADS, "strength": 1.0}, off=OFF),
    "gain": Example("llm", {"mode": "gain", "heads": HEADS, "strength": 1.0}, off=OFF),
}
BAD = [
    ({"mode": "mask", "strength": 2.0, "heads": [(0, 1)]}, "at most 1"),
    ({"heads": [(0, 1)], "profile_path": "x"}, "not both"),
    ({"mode": "louder", "heads": [(0, 1)]}, "mode"),
]

# -- what the benchmarks ask, see benchmarks/methods.py

TIMED = {"retrieval-heads, 20 heads sharpened": lambda subject: {"heads": subject.heads}}
OWN = "retrieval-heads:profile_path={retrieval-heads}"
TRIED = {"copying": [f"{OWN}:strength=0.1", OWN, f"{OWN}:strength=0.4", f"{OWN}:mode=gain:strength=0.2"]}
PAPER = {"copying": "Llama-2-7B, masking 30 such heads ruins the search, 30 random ones barely matter (figures only)"}
PROFILED = {"lengths": (150, 300, 600), "depths": (0.1, 0.5, 0.9), "needles": 3}
