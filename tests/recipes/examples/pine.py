"""pine: other segments in every row."""

from example import SEGMENTS, Example

WINDOW = "has a sliding window of .* tokens and the sequence"
EXAMPLES = {
    "": Example("llm", rows={"segments": SEGMENTS}, refused={"Mistral": WINDOW, "Mistral, filling": WINDOW, "Gemma3": WINDOW})
}
