"""pine: other segments in every row."""

from example import SEGMENTS, Example

WINDOW = "has a sliding window of .* tokens and the sequence"
EXAMPLES = {
    "": Example(
        "llm",
        rows={"segments": SEGMENTS},
        skips={"near": "segments are ranked by weights that lie close together"},
        refused={"Mistral": WINDOW, "Mistral, filling": WINDOW, "Gemma3": WINDOW},
    )
}
