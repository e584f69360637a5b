"""streaming: a window shorter than the prompts."""

from example import Example

EXAMPLES = {
    "": Example("llm", {"sinks": 2, "window": 5}, off={"window": 200}),
    "last rows": Example("llm", {"sinks": 2, "window": 8, "last_rows": 4, "start_layer": 1}, off={"window": 200}, layers=3),
}
