"""visual-token-exit: images are hidden after layer 1, or leave the sequence there."""

from example import IN_THE_SEQUENCE, Example

FIXED = "tokens cannot leave a sequence whose cache is a .* with fixed, quantised or windowed layers"
EXAMPLES = {
    "": Example("lvlm", {"exit_layer": 1}, off={"exit_layer": 3}, layers=2, operations=(0, 23), refused=IN_THE_SEQUENCE),
    "leaving": Example(
        "lvlm",
        {"exit_layer": 1, "mode": "leave"},
        off={"exit_layer": 3},
        layers=2,
        operations=(23, 10),
        acts=["prefill"],  # at decode nothing more leaves
        refused={
            **IN_THE_SEQUENCE,
            "gemma3": 'is not tested for language models of type .gemma3_text.*pass mode="hide"',
            "windowed mistral3": "has layers with a sliding window, whose caches keep keys by number",
            "flash": "tokens cannot leave before model.*takes no whole masks",
            "heads": "has taken tokens out of the sequence",
            "together": "has taken tokens out of the sequence",
            **{f"llava, {cache}": FIXED for cache in ("static", "static, longer", "quantised")},
        },
    ),
}
BAD = [({"exit_layer": 1, "profile_path": "x"}, "both name the layer"), ({"exit_layer": -1}, "exit_layer")]

# -- what the benchmarks ask, see benchmarks/methods.py

TIMED = {
    "visual-token-exit, leaving": lambda subject: {"exit_layer": subject.layers // 2, "mode": "leave"},
    "visual-token-exit, hidden after half of the layers": lambda subject: {"exit_layer": subject.layers // 2},
}
OWN = "visual-token-exit"
TRIED = {"images": [f"{OWN}:profile_path={{visual-token-exit}}", *(f"{OWN}:exit_layer={layer}" for layer in (4, 3, 2))]}
PROFILED = {"samples": "scenes"}
