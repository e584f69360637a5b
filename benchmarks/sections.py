"""What benchmarks/effects.py asks: every suite, the recipes with the strengths that are tried, and what a user would try without them."""

from __future__ import annotations

from dataclasses import dataclass, field

SMOLLM2, GEMMA = ("smollm2", "SmolLM2-135M-Instruct"), ("gemma3-270m", "Gemma 3 270M (base model)")
LLAVA, SD = ("zoo:shapes-llava", "shapes-llava"), ("zoo:shapes-sd", "shapes-sd")


@dataclass(frozen=True)
class Baseline:
    """What a user would try without a recipe. suite: parameters of the same suite; counts: {name: the count that takes its place}."""

    suite: str = ""
    counts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """One table: a suite asked of a model.

    suite: as in `reattend eval`; confirming: further parameters when settings are confirmed. columns: metrics of the table; by the first
    one settings are chosen. recipes: {slug: variants from weak to strong, among them the one without parameters of its own, which is the
    default}. others: variants that are confirmed without having been chosen: controls and combinations. {slug} in a variant: the profile
    of that recipe; {slug TASK}: its profile for a task. choose, confirm: scenes, texts or pairs; with choose 0 all variants are confirmed.
    instead: {text: text} put into suite and variants when settings are confirmed
    on another task. paper: {slug: what it reports, on its models}.
    """

    title: str
    model: str
    suite: str
    columns: tuple[str, ...]
    recipes: dict[str, list[str]]
    choose: int
    confirm: int
    confirming: str = ""
    others: tuple[str, ...] = ()
    baselines: dict[str, Baseline] = field(default_factory=dict)
    instead: dict[str, str] = field(default_factory=dict)
    paper: dict[str, str] = field(default_factory=dict)


def highlighters(model: str, title: str) -> Section:
    recipes = {
        "emphasise": [
            "emphasise:alpha=0.55", "emphasise", "emphasise:alpha=0.09", "emphasise:alpha=0.09:keep_sink=true", "emphasise:alpha=0.01",
            "emphasise:profile_path={emphasise}",
        ],
        "instaboost": ["instaboost:multiplier=1.7", "instaboost", "instaboost:multiplier=9", "instaboost:multiplier=20"],
        "spotlight": ["spotlight:target=0.1", "spotlight", "spotlight:target=0.4", "spotlight:target=0.6"],
        "seka": [
            "seka:profile_path={seka}:gain=0.4", "seka:profile_path={seka}", "seka:profile_path={seka}:gain=1.6",
            "seka:profile_path={seka}:adaptive=true",
        ],
        "spa": ["spa:strength=1.2", "spa", "spa:strength=1.8", "spa:strength=2.5"],
    }  # fmt: skip
    baselines = {
        "the fact repeated": Baseline("prompting=repeated"),
        '"Important:" before it': Baseline("prompting=important"),
        "the fact in capitals": Baseline("prompting=capitals"),
    }
    paper = {
        "seka": "Qwen3-4B, share of CounterFact prompts that follow the marked fact 45.0 to 99.0; in the same table `emphasise` (PASTA) "
        "97.2, `spa` 65.2, adaptive `seka` 98.9 (the official routing, whose numbers are not reproduced here: decisions.md)",
        "spotlight": "Qwen2.5-7B, IFEval by prompt 0.47 to 0.54",
        "instaboost": "matches or beats prompting and earlier steering of attention on 15 tasks (abstract)",
        "spa": "as summarised by others, six code models, Pass@1 up to 12.9 % higher",
    }
    return Section(
        f"A marked fact against another one, {title}", model, "highlight", ("followed", "lead", "loss"), recipes, 20, 50,
        confirming="written=12",
        others=("emphasise+instaboost", "emphasise:alpha=0.01:heads=[[3,1],[9,4],[12,3],[15,2],[17,0],[11,2]]"),
        baselines=baselines, paper=paper,
    )  # fmt: skip


def order_of_segments(model: str, title: str) -> Section:
    # asking in every order costs as many passes as there are segments
    averaged = Baseline(
        counts={"right": "averaged in all", "consistent": "items", "right 0": "averaged", "right 2": "averaged"}
    )
    return Section(
        f"An answer from three notes in changing order, {title}", model, "position-swap",
        ("consistency", "accuracy", "accuracy_first", "accuracy_last"), {"pine": ["pine"]}, 0, 100,
        baselines={"asked in all orders, mean of the log-probabilities": averaged},
        paper={"pine": "Llama-3-8B, RewardBench reasoning 65.3 to 73.4; question answering over 20 documents two points worse"},
    )  # fmt: skip


def calibration(model: str, title: str, suite: str, columns: tuple[str, ...], confirm: int) -> Section:
    kinds = {"sentiment": "Positive or negative", "choices": "Multiple choice"}
    return Section(
        f"{kinds[suite]}, {title}", model, suite, columns,
        {"act": ["act:heads=all:beta=0.7", "act:heads=all", "act:heads=all:beta=0.1", "act:profile_path={act}"]}, 80, confirm,
        others=("act:heads=all",),
        baselines={"decided by the likelihood less that without a question": Baseline(counts={"right": "calibrated"})},
        paper={"act": "chosen heads: up to 7.3 points of mean accuracy over data sets on Llama-30B (abstract)"},
    )  # fmt: skip


def copying(model: str, title: str) -> Section:
    own = "retrieval-heads:profile_path={retrieval-heads}"
    return Section(
        f"A needle in a haystack, {title}", model, "needles", ("recall", "found"),
        {
            "retrieval-heads": [f"{own}:strength=0.1", own, f"{own}:strength=0.4", f"{own}:mode=gain:strength=0.2"],
            "streaming": ["streaming:window=60", "streaming:window=124", "streaming:window=188", "streaming"],
        },
        16, 50,
        others=(
            "streaming:window=124", f"{own}:random_heads=true", f"{own}:mode=mask:top=5", f"{own}:mode=mask:top=5:random_heads=true"
        ),
        baselines={
            "asked before the text too": Baseline("asked_first=true"),
            "only the text's last 128 tokens": Baseline("last=128"),
        },
        paper={
            "retrieval-heads": "Llama-2-7B, masking 30 such heads ruins the search, 30 random ones barely matter (figures only)",
            "streaming": "perplexity stays flat up to 4 million tokens (as recalled)",
        },
    )  # fmt: skip


def windows(model: str, title: str) -> Section:
    # whole contexts, and the part of them that a window of half their length sees, as one would cut a text
    return Section(
        f"Prose after 512 tokens of it, {title}", model, "perplexity:lengths=[256,512]", ("perplexity_512",),
        {"streaming": ["streaming:window=252"]}, 0, 16,
        others=("streaming:window=256:sinks=0",),
        baselines={"only the text's last 256 tokens": Baseline(counts={"loss 512": "loss 256"})},
    )  # fmt: skip


def tasks(task: str, confirm: int) -> Section:
    own = "soft-injection:profile_path={soft-injection opposite}"
    return Section(
        f"A task without its demonstrations ({task}), {SMOLLM2[1]}", SMOLLM2[0], "word-tasks:task=opposite",
        ("accuracy", "answers_input"), {"soft-injection": [f"{own}:scale=0.5", own, f"{own}:alpha=0.5"]}, 30, confirm,
        baselines={"ten demonstrations in the prompt": Baseline("shots=10")},
        instead={"opposite": task},
        paper={"soft-injection": "12 models of 4B to 70B, 57 tasks, 10.2 to 14.3 points over ten demonstrations (abstract)"},
    )  # fmt: skip


def images(suite: str, columns: tuple[str, ...], title: str, baselines: dict[str, Baseline]) -> Section:
    """Layers are chosen for six layers of width 128 where a recipe names them; a variant without parameters is its published default."""
    recipes = {
        "var": ["var:tau=2:profile_path={var}:move=0.2", "var", "var:tau=2:profile_path={var}", "var:tau=2:profile_path={var}:move=0.8"],
        "vhr": ["vhr:alpha=1.5", "vhr", "vhr:alpha=3", "vhr:layers=[1,3,4,5]:alpha=1.5", "vhr:layers=[1,3,4,5]"],
        "gift": [
            "gift:profile_path={gift}:alpha=2.5", "gift:profile_path={gift}", "gift:profile_path={gift}:alpha=10",
            "gift:saliency_layers=[2]:enhance_layers=[3,4]:alpha=2.5", "gift:saliency_layers=[2]:enhance_layers=[3,4]",
        ],
        "selective-emphasis": ["selective-emphasis:alpha=0.35:beta=0.15", "selective-emphasis", "selective-emphasis:alpha=1.4:beta=0.6"],
        "pai": ["pai:alpha=0.1", "pai", "pai:alpha=0.4", "pai:gamma=1"],
        "cmai": ["cmai:gamma=0.25", "cmai", "cmai:gamma=0.9"],
        "opera": ["opera:penalty_weight=0.5", "opera", "opera:penalty_weight=2"],
        "visual-token-exit": [
            "visual-token-exit:profile_path={visual-token-exit}", *(f"visual-token-exit:exit_layer={layer}" for layer in (4, 3, 2))
        ],
    }  # fmt: skip
    paper = {
        "vhr": "LLaVA-1.5-7B, CHAIR_i 14.3 to 9.7, POPE F1 85.0 to 85.5",
        "gift": "LLaVA-1.5-7B, CHAIR_i 15.4 to 10.6, POPE F1 82.4 to 83.8",
        "selective-emphasis": "LLaVA-1.5-7B, CHAIR_i 13.8 to 4.0 and F1 75.9 to 71.8, with answers twice as long",
        "pai": "as quoted by others, LLaVA-1.5-7B, CHAIR_i 13.8 to 6.8 and F1 75.9 to 74.7",
        "opera": "as quoted by others, LLaVA-1.5-7B with its beam search, CHAIR_i 14.3 to 13.4",
    }
    others = ("var:tau=2:profile_path={var}", "vhr+pai:gamma=1", "pai:alpha=0.1+opera:penalty_weight=0.5")
    return Section(title, LLAVA[0], suite, columns, recipes, 300, 600, others=others, baselines=baselines, paper=paper)


PICTURES = Section(
    "Coloured shapes in drawn pictures, shapes-sd", SD[0], "binding", ("binding", "shapes", "count"),
    {"softpag": [
        "softpag:scale=2.5", "softpag", "softpag:strength=1",
        # every other layer of this UNet; 3 is the mid block, the published choice for larger pictures
        *(f"softpag:layers=[{n}]{more}" for n in (0, 2, 3, 4, 5, 6, 8, 9) for more in (":scale=2.5", "")),
    ], "seg": ["seg:sigma=1", "seg:sigma=4", "seg"]},
    24, 400,
    baselines={"guidance scale 3 instead of 2": Baseline("guidance=3"), "guidance scale 4 instead of 2": Baseline("guidance=4")},
    paper={"softpag": "FID 56.15 (identity), 53.37 (uniform), 53.33 (mean query), at the best setting of each"},
)  # fmt: skip

SECTIONS = {
    "highlight": highlighters(*SMOLLM2),
    "order": order_of_segments(*SMOLLM2),
    "gemma-order": order_of_segments(*GEMMA),
    "sentiment": calibration(*SMOLLM2, "sentiment", ("accuracy", "auc", "said_positive"), 160),
    "gemma-sentiment": calibration(*GEMMA, "sentiment", ("accuracy", "auc", "said_positive"), 160),
    "choices": calibration(*SMOLLM2, "choices", ("accuracy",), 120),
    "gemma-choices": calibration(*GEMMA, "choices", ("accuracy",), 120),
    "needles": copying(*SMOLLM2),
    "windows": windows(*SMOLLM2),
    "capitals": tasks("capital", 28),
    "past": tasks("past", 20),
    "pope": images(
        "pope", ("accuracy", "accuracy/random", "accuracy/popular", "accuracy/adversarial"), "Is it in the picture (POPE), shapes-llava",
        {"answered from its own description": Baseline("by=description")},
    ),
    "chair": images(
        "chair", ("chair_i", "recall", "length"), "Descriptions (CHAIR), shapes-llava",
        {"at most 12 tokens": Baseline("tokens=12"), "at most 18 tokens": Baseline("tokens=18")},
    ),
    "pictures": PICTURES,
}  # fmt: skip
# how profiles are made where the defaults do not fit the model or would take long
PROFILES: dict[str, dict] = {
    "var": {"tau": 2.0, "text": "is there a circle in the image ?"},
    "soft-injection": {"prompts": 12, "iterations": 40, "check_every": 20},
    "act": {"max_heads": 60},
    "retrieval-heads": {"lengths": (150, 300, 600), "depths": (0.1, 0.5, 0.9), "needles": 3},
}
