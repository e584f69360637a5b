"""gift: the map is read at layer 1, before it is used there and later; or by a probe, where it is used before it could be known."""

from example import IN_THE_SEQUENCE, Example

WORDS = {"words": "content", "alpha": 3.0}
MERGED = {"saliency_layers": [1], "enhance_layers": [1, 3]}
PROBED = {"saliency_layers": [0, 2], "enhance_layers": [0, 1, 3]}
EXAMPLES = {
    "": Example("lvlm", {**MERGED, **WORDS}, off={"alpha": 0}, layers=2, operations=(99, 0), refused=IN_THE_SEQUENCE),
    "from a probe": Example(
        "lvlm",
        {**PROBED, **WORDS},
        off={"alpha": 0},
        layers=3,
        operations=(99, 0),
        refused=IN_THE_SEQUENCE,
        skips={"near": "heads are ranked by shares that lie close together"},
    ),
}
BAD = [
    ({"alpha": -1}, "alpha"),
    ({"alpha": 21}, "alpha"),
    ({"beta": -0.5}, "beta"),
    ({"head_share": 0}, "head_share"),
    ({"clip": 0}, "clip"),
    ({"words": "nouns"}, "words"),
    ({"saliency_layers": [1]}, "go together"),
    ({"saliency_layers": [], "enhance_layers": [1]}, "at least one layer"),
    ({"saliency_layers": [1], "enhance_layers": [2], "profile_path": "x"}, "one of them"),
    ({"question": "what", "ranges": [(1, 2)]}, "not both"),
    ({"text": "what"}, "not a parameter"),
]

# -- what the benchmarks ask, see benchmarks/methods.py


def timed(subject, layer):
    return {"question": subject.question, "saliency_layers": [layer], "enhance_layers": subject.late}


TIMED = {
    "gift, map from the prompt's own pass": lambda subject: timed(subject, subject.late[0] - 1),
    "gift, map from a probe": lambda subject: timed(subject, subject.layers // 2),
}
FLOORS = {"gift, map from a probe": ("the prompt is read once more up to the saliency layer", "read up to half")}
TRIED = {
    "images": [
        "gift:profile_path={gift}:alpha=2.5",
        "gift:profile_path={gift}",
        "gift:profile_path={gift}:alpha=10",
        "gift:saliency_layers=[2]:enhance_layers=[3,4]:alpha=2.5",
        "gift:saliency_layers=[2]:enhance_layers=[3,4]",
    ]
}
PAPER = {"images": "LLaVA-1.5-7B, CHAIR_i 15.4 to 10.6, POPE F1 82.4 to 83.8"}
PROFILED = {"samples": "scenes"}
