"""pine: other segments in every row."""

from example import SEGMENTS, Example

WINDOW = "has a sliding window of .* tokens and the sequence"
EXAMPLES = {
    "": Example(
        "llm",
        rows={"segments": SEGMENTS},
        skips={"near": "segments are ranked by weights that lie close together"},
        refused={
            "in pieces": "must be in one forward pass, .* without prefill_chunk_size",
            "holes inside them": "attention_mask hides token 4 of prompt 0, which stands inside",
            "Mistral": WINDOW,
            "Mistral, filling": WINDOW,
            "Gemma3": WINDOW,
        },
    )
}
NOTHING = [({"ranges": [(3, 6)]}, False)]
BAD = [
    ({}, "not both"),
    ({"segments": ["a"], "ranges": [(1, 2)]}, "not both"),
    ({"segments": []}, "names no segment"),
    ({"ranges": [(1, 3)], "order": "random"}, "order"),
]

# -- what the benchmarks ask, see benchmarks/methods.py

TIMED = {"pine, 3 segments": lambda subject: {"segments": subject.segments}}
FLOORS = {"pine, 3 segments": ("a second attention, without positions, ranks the segments", "attended twice")}
TRIED = {"order": ["pine"]}
PAPER = {"order": "Llama-3-8B, RewardBench reasoning 65.3 to 73.4; question answering over 20 documents two points worse"}
