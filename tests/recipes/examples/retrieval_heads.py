"""retrieval-heads: heads named by hand, switched off after the prompt or from its last row on, and strengthened in every row."""

from example import HEADS, Example

OFF = {"strength": 0}
EXAMPLES = {
    "sharpen": Example("llm", {"heads": HEADS, "strength": 1.0}, off=OFF),
    "mask": Example("llm", {"mode": "mask", "heads": HEADS}, off=OFF, acts=["decode"]),
    "mask from the last row on": Example("llm", {"mode": "mask", "heads": HEADS, "where": "last_row"}, off=OFF),
    "zero": Example("llm", {"mode": "zero", "heads": HEADS}, off=OFF, acts=["decode"]),
    "sink_down": Example("llm", {"mode": "sink_down", "heads": HEADS, "strength": 1.0}, off=OFF),
    "gain": Example("llm", {"mode": "gain", "heads": HEADS, "strength": 1.0}, off=OFF),
}
