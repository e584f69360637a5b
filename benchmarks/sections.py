"""What benchmarks/effects.py asks: every suite, the recipes with the strengths that are tried, and what a user would try without them."""

from __future__ import annotations

from dataclasses import dataclass, field

from methods import paper, tried

SMOLLM2, GEMMA = ("smollm2", "SmolLM2-135M-Instruct"), ("gemma3-270m", "Gemma 3 270M (base model)")
LLAVA, SD = ("zoo:shapes-llava", "shapes-llava"), ("zoo:shapes-sd", "shapes-sd")
TURBO = ("zoo:shapes-turbo", "shapes-turbo")


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
    best: how many settings of a recipe are confirmed; defaults: whether its default is even where others were better.
    instead: {text: text} put into suite and variants when settings are confirmed
    on another task. paper: {slug: what it reports, on its models}. short: what summaries call it, where that is not the suite's name.
    """

    title: str
    model: str
    suite: str
    columns: tuple[str, ...]
    recipes: dict[str, list[str]]
    choose: int
    confirm: int
    confirming: str = ""
    best: int = 1
    defaults: bool = True
    others: tuple[str, ...] = ()
    baselines: dict[str, Baseline] = field(default_factory=dict)
    instead: dict[str, str] = field(default_factory=dict)
    paper: dict[str, str] = field(default_factory=dict)
    short: str = ""


def highlighters(model: str, title: str) -> Section:
    baselines = {
        "the fact repeated": Baseline("prompting=repeated"),
        '"Important:" before it': Baseline("prompting=important"),
        "the fact in capitals": Baseline("prompting=capitals"),
    }
    return Section(
        f"A marked fact against another one, {title}", model, "highlight", ("followed", "lead", "loss"), tried("highlight"), 20, 50,
        confirming="written=12",
        others=("emphasise+instaboost", "emphasise:alpha=0.01:heads=[[3,1],[9,4],[12,3],[15,2],[17,0],[11,2]]"),
        baselines=baselines, paper=paper("highlight"),
    )  # fmt: skip


def order_of_segments(model: str, title: str) -> Section:
    # asking in every order costs as many passes as there are segments
    averaged = Baseline(
        counts={"right": "averaged in all", "consistent": "items", "right 0": "averaged", "right 2": "averaged"}
    )
    return Section(
        f"An answer from three notes in changing order, {title}", model, "position-swap",
        ("consistency", "accuracy", "accuracy_first", "accuracy_last"), tried("order"), 0, 100,
        baselines={"asked in all orders, mean of the log-probabilities": averaged},
        paper=paper("order"),
    )  # fmt: skip


def calibration(model: str, title: str, suite: str, columns: tuple[str, ...], confirm: int) -> Section:
    kinds = {"sentiment": "Positive or negative", "choices": "Multiple choice"}
    return Section(
        f"{kinds[suite]}, {title}", model, suite, columns,
        tried("calibration"), 80, confirm,
        others=("act:heads=all",),
        baselines={"decided by the likelihood less that without a question": Baseline(counts={"right": "calibrated"})},
        paper=paper("calibration"),
    )  # fmt: skip


def copying(model: str, title: str) -> Section:
    own = "retrieval-heads:profile_path={retrieval-heads}"
    return Section(
        f"A needle in a haystack, {title}", model, "needles", ("recall", "found"),
        tried("copying"),
        16, 50,
        others=(
            "streaming:window=124", f"{own}:random_heads=true", f"{own}:mode=mask:top=5", f"{own}:mode=mask:top=5:random_heads=true"
        ),
        baselines={
            "asked before the text too": Baseline("asked_first=true"),
            "only the text's last 128 tokens": Baseline("last=128"),
        },
        paper=paper("copying"),
    )  # fmt: skip


def windows(model: str, title: str) -> Section:
    # whole contexts, and the part of them that a window of half their length sees, as one would cut a text
    return Section(
        f"Prose after 512 tokens of it, {title}", model, "perplexity:lengths=[256,512]", ("perplexity_512",),
        tried("windows"), 0, 16,
        others=("streaming:window=256:sinks=0",),
        baselines={"only the text's last 256 tokens": Baseline(counts={"loss 512": "loss 256"})},
    )  # fmt: skip


def tasks(task: str, confirm: int) -> Section:
    return Section(
        f"A task without its demonstrations ({task}), {SMOLLM2[1]}", SMOLLM2[0], "word-tasks:task=opposite",
        ("accuracy", "answers_input"), tried("tasks"), 30, confirm,
        baselines={"ten demonstrations in the prompt": Baseline("shots=10")},
        instead={"opposite": task},
        paper=paper("tasks"),
    )  # fmt: skip


def images(suite: str, columns: tuple[str, ...], title: str, baselines: dict[str, Baseline]) -> Section:
    """Layers are chosen for six layers of width 128 where a recipe names them; a variant without parameters is its published default."""
    others = ("var:tau=2:profile_path={var}", "vhr+pai:gamma=1", "pai:alpha=0.1+opera:penalty_weight=0.5")
    return Section(
        title, LLAVA[0], suite, columns, tried("images"), 300, 600, others=others, baselines=baselines, paper=paper("images")
    )


def pictures() -> Section:
    """Random heads are a control, which is confirmed and cannot be chosen."""
    variants = tried("pictures")
    controls = tuple(spec for specs in variants.values() for spec in specs if "random_heads" in spec)
    return Section(
        f"Coloured shapes in drawn pictures, {SD[1]}", SD[0], "binding", ("binding", "shapes", "count"),
        {slug: [spec for spec in specs if spec not in controls] for slug, specs in variants.items()}, 32, 200,
        best=2, defaults=False, others=controls, baselines={"guidance scale 3 instead of 2": Baseline("guidance=3")},
        paper=paper("pictures"),
    )  # fmt: skip


def negatives(model: str, title: str, settings: str, choose: int, confirm: int) -> Section:
    """Told to the pipeline, a negative prompt needs guidance, whose second half costs what a recipe's second text costs at most."""
    variants = tried("negatives") if choose else {slug: [slug] for slug in tried("negatives")}
    return Section(
        f"A thing that is to stay out of the picture, {title}", model, f"negatives:{settings}", ("right", "kept_out", "rest", "count"),
        variants, choose, confirm, best=2, defaults=False,
        baselines={"as the pipeline's negative_prompt, guidance 2": Baseline("by=pipeline:guidance=2")}, paper=paper("negatives"),
    )  # fmt: skip


def layout() -> Section:
    """A prompt without a recipe says nothing of places: what one can do is to draw several pictures and to keep the best."""
    return Section(
        f"Each thing in its box, {SD[1]}", SD[0], "layout", ("placed", "iou", "inside", "binding"), tried("layout"), 32, 200,
        best=2, defaults=False, baselines={"the best of four pictures": Baseline("pictures=4")}, paper=paper("layout"),
    )  # fmt: skip


def removal() -> Section:
    """From noise alone in the box, under an empty prompt, as the authors have it; what a user would try is an inpainting pipeline."""
    return Section(
        f"A thing taken out of a picture, {SD[1]}", SD[0], "removal:strength=1", ("right", "empty", "rest", "psnr", "ssim", "inside"),
        tried("removal"), 32, 200, best=2, defaults=False,
        baselines={
            "an inpainting pipeline": Baseline("by=inpaint"),
            "an inpainting pipeline, told what stays": Baseline("by=inpaint:prompt=rest"),
        },
        paper=paper("removal"),
    )  # fmt: skip


def composition() -> Section:
    """A picture pasted in keeps its own light; an inpainting pipeline draws another thing of that name, and sees no picture of it."""
    return Section(
        f"A thing put into a picture, {SD[1]}", SD[0], "composition", ("right", "there", "rest", "psnr", "ssim", "inside"),
        tried("composition"), 32, 200, best=2, defaults=False,
        baselines={"pasted in": Baseline("by=pasted"), "an inpainting pipeline": Baseline("by=inpaint")}, paper=paper("composition"),
    )  # fmt: skip


def masks() -> Section:
    """Without a recipe: where the maps of the words are high, cut at the share that was best of five on seed 0."""
    baselines = {"read with twice the noise": Baseline("strength=0.6"), "of colours and shapes": Baseline("naming=things")}
    return Section(
        f"Where the things of a picture are, {SD[1]}", SD[0], "masks", ("iou", "told", "rest"), tried("masks"), 32, 200,
        best=2, baselines=baselines, paper=paper("masks"),
    )  # fmt: skip


def words(model: str, title: str, choose: int, confirm: int) -> Section:
    """The suite names the words; told without a recipe they are said twice, or stand stronger in the encoded prompt (compel's way)."""
    return Section(
        f"Words that are to show in drawn pictures, {title}", model, "binding", ("binding", "shapes", "count"), tried("words"), choose, confirm,
        best=2, defaults=False,
        baselines={
            "the colours said twice": Baseline("naming=colours:prompting=repeated"),
            "the shapes said twice": Baseline("naming=shapes:prompting=repeated"),
            "the words' embeddings scaled by 1.5": Baseline("prompting=scaled"),
        },
        paper=paper("words"),
    )  # fmt: skip


def canvas(side: int) -> Section:
    """Larger pictures repeat things, which shows as things that nobody asked for."""
    return Section(
        f"Pictures of {side} x {side} from a model of 64 x 64, {SD[1]}", SD[0], f"binding:side={side}", ("binding", "extra", "count"),
        tried("canvas"), 0, 40,
        baselines={"drawn at 64 x 64": Baseline("side=64")}, paper=paper("canvas"), short=f"binding at {side} x {side}:",
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
    "pictures": pictures(),
    "words": words(*SD, 32, 200),
    "sd3-words": words("zoo:shapes-sd3", "shapes-sd3", 0, 32),
    "negatives": negatives(*SD, "guidance=2", 0, 32),
    "turbo-negatives": negatives(*TURBO, "steps=4:guidance=1", 32, 200),
    "layout": layout(),
    "removal": removal(),
    "composition": composition(),
    "masks": masks(),
    "canvas-96": canvas(96),
    "canvas-48": canvas(48),
}  # fmt: skip
