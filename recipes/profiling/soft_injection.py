"""Task embeddings: what each head hands on after demonstrations of a task, and how much of it a prompt without them should get."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ...hooks import Capture, Edits, Plan, SiteTable, attach
from ...hooks.tokens.spans import tokenizer_of
from ...interventions import Call, HeadMix, ReattendError
from ...interventions.families.heads import last_prompt_outputs, last_prompt_rows, mixture
from ..kit.profile import Profile, table_fingerprint
from ..kit.profiling import checked, profiled_sites, track
from .material.choices import Choice, batches_of, first_token, last_logits
from .material.files import content_of
from .material.word_pairs import Pair, parted

TEMPLATE = "Q: {x}\nA:"
BETWEEN = "\n\n"


def answer_text(y: str) -> str:
    """An answer as it follows a prompt: after a space, unless it is a number."""
    return y if y.replace(".", "", 1).lstrip("-").isdigit() else f" {y}"


def task_prompt(x: str, demonstrations: Sequence[Pair] = (), template: str = TEMPLATE) -> str:
    """The prompt that asks for the output of x, after demonstrations or, as at use, without any."""
    shown = [template.replace("{x}", a) + answer_text(b) for a, b in demonstrations]
    return BETWEEN.join([*shown, template.replace("{x}", x)])


@checked
def learn_task(
    slug: str,
    model: Any,
    processor: Any,
    *,
    data: Any = None,
    task: str = "",
    prompts: int = 50,
    shots: int = 10,
    how: Literal["gradient", "single", "even"] = "gradient",
    iterations: int = 400,
    lr: float = 0.2,
    batch_size: int = 1,
    check_every: int = 50,
    official_last: bool = False,
    template: str = TEMPLATE,
    seed: int = 0,
) -> Profile:
    """A profile with task_embedding [tasks, layers, heads, D] and alpha [layers, heads], learned from demonstrations.

    data: (input, output) pairs, {task: pairs} to learn one alpha for several tasks, or a JSON file of either; pairs in files may be
    {"input": ..., "output": ...}. Without it `task` names pairs of ours: opposite (the default), capital, past or plural (3 of 5 pairs are
    used, the others are left for tests). A quarter of the pairs, 100 at most, only checks the learned alphas.
    prompts, shots: the embedding is the mean over so many prompts of so many demonstrations each. how: "gradient" learns alpha by Adam
    through the frozen model (iterations steps on batch_size prompts without demonstrations; needs the memory of a backward pass);
    "single", an approximation without gradients, ranks heads by the loss with each of them replaced alone and takes as many as lower the
    loss together (one pass per head); "even" leaves alpha at 0.5. check_every: steps between checks, of which the best counts;
    official_last: the last one counts, as in the official code. template: what is asked, with {x} for the input.
    Raises ReattendError for too few pairs, and for data that is not pairs of texts.
    """
    _check(prompts, shots, how, iterations, lr, batch_size, check_every, template)
    table, chosen = profiled_sites(model, slug)
    text, rng = tokenizer_of(processor), random.Random(seed)
    tasks: dict[str, tuple[list[Pair], list[Pair]]] = {}
    for name, pairs in _tasks(data, task).items():
        mixed = rng.sample(pairs, len(pairs))
        held = min(100, max(1, len(mixed) // 4))
        if len(mixed) - held < shots + 1:
            raise ReattendError(
                f"task {name!r} has {len(pairs)} pairs; {shots} demonstrations and a question need at least {(shots + 1) * 4 // 3 + 1}"
            )
        tasks[name] = mixed[held:], mixed[:held]
    taught = [_embedding(slug, model, text, chosen, pairs, prompts, shots, template, rng) for pairs, _ in tasks.values()]
    mixer = Mixer(model, text, torch.stack(taught), template)
    train, check = ([mixer.questions(part[i]) for part in tasks.values()] for i in (0, 1))
    logit, losses = torch.zeros(taught[0].shape[:2]), {}
    with attach(model, [Plan(slug, [Edits(chosen, mixer.mix)])]):
        if how == "gradient":
            logit, losses = _learn(mixer, train, check, iterations, lr, batch_size, check_every, official_last, rng)
        alpha = _select(mixer, train, check) if how == "single" else logit.sigmoid() * mixer.known
        plain, mixed = mixer.loss(torch.zeros_like(alpha), check), mixer.loss(alpha, check)
    facts = {
        "tasks": list(tasks), "template": template, "prompts": prompts, "shots": shots, "how": how, "seed": seed,
        "pairs": {name: len(a) + len(b) for name, (a, b) in tasks.items()},
        "data_hash": hashlib.sha256(repr(tasks).encode()).hexdigest()[:16],
        "plain_loss": plain, "loss": mixed, "losses": losses,
        **({"iterations": iterations, "lr": lr, "batch_size": batch_size} if how == "gradient" else {}),
    }  # fmt: skip
    tensors = {"task_embedding": mixer.embedding, "alpha": alpha, **({"logit": logit} if how == "gradient" else {})}
    return Profile(slug, table_fingerprint(table), tensors, facts)


def _check(prompts, shots, how, iterations, lr, batch_size, check_every, template) -> None:
    for name, value in (("prompts", prompts), ("shots", shots), ("batch_size", batch_size), ("check_every", check_every)):
        if not isinstance(value, int) or value < 1:
            raise ReattendError(f"{name} must be a whole number of at least 1, got {value!r}")
    if how not in ("gradient", "single", "even"):
        raise ReattendError(f'how must be "gradient", "single" or "even", got {how!r}')
    if not isinstance(iterations, int) or iterations < 1 or not lr > 0:
        raise ReattendError(f"iterations must be at least 1 and lr above 0, got {iterations!r} and {lr!r}")
    if "{x}" not in template:
        raise ReattendError(f"template must hold {{x}}, the place of the input, got {template!r}")


def _tasks(data: Any, task: str) -> dict[str, list[Pair]]:
    if data is None:
        return {task or "opposite": parted(task or "opposite")[0]}
    data = content_of(data)
    named = dict(data) if isinstance(data, Mapping) else {task or "user data": data}
    return {str(name): [_pair(item) for item in pairs] for name, pairs in named.items()}


def _pair(item: Any) -> Pair:
    pair: Any = (item.get("input"), item.get("output")) if isinstance(item, Mapping) else item
    if (
        isinstance(pair, str)
        or not isinstance(pair, Sequence)
        or len(pair) != 2
        or not all(isinstance(t, str) and t for t in pair)
    ):
        raise ReattendError(f"data must hold (input, output) pairs of texts, got {item!r}")
    return pair[0], pair[1]


def _embedding(slug, model, tokenizer, sites: SiteTable, pairs, prompts, shots, template, rng) -> Tensor:
    """[layers, heads, D]: the mean output of each head at the last token of prompts with demonstrations; 0 where there is no head."""
    texts = []
    for _ in range(prompts):
        *shown, (asked, _) = rng.sample(pairs, shots + 1)
        texts.append(task_prompt(asked, shown, template))
    sums: dict[int, Tensor] = {}

    def read(call: Call, edits: Any) -> None:
        assert call.site is not None
        sums[call.site.layer] = sums.get(call.site.layer, 0) + last_prompt_outputs(call).sum(dim=0).float().cpu()

    asked = [Choice(list(tokenizer(text)["input_ids"]), [0], 0) for text in texts]
    batches = batches_of(model, tokenizer, asked, 8)
    with attach(model, [Plan(slug, [Capture(sites, read)])]):
        for batch in track(batches, "demonstrations", len(batches)):
            for _ in last_logits(model, [batch]):
                pass
    if not sums:
        raise ReattendError("no attention was seen in the model's forward pass")
    size = max(sums) + 1, max(t.shape[0] for t in sums.values()), max(t.shape[1] for t in sums.values())
    mean = torch.zeros(size)
    for layer, total in sums.items():
        mean[layer, : total.shape[0], : total.shape[1]] = total / prompts
    return mean


class Mixer:
    """What a session mixes into the last prompt token: embeddings [tasks, layers, heads, D] by an alpha that may need gradients."""

    def __init__(self, model: Any, tokenizer: Any, embedding: Tensor, template: str) -> None:
        self.model, self.tokenizer, self.template, self.embedding = model, tokenizer, template, embedding
        # 1 where the model has a head: layers can differ in their heads, and some have no attention
        self.known = (embedding != 0).any(dim=3).any(dim=0).float()
        self.alpha, self.task = torch.zeros(embedding.shape[1:3]), 0

    def questions(self, pairs: Sequence[Pair]) -> list[Choice]:
        """Prompts without demonstrations, and the first tokens of their answers."""
        result = []
        for x, y in pairs:
            prompt = task_prompt(x, template=self.template)
            ids = list(self.tokenizer(prompt)["input_ids"])
            result.append(Choice(ids, [first_token(self.tokenizer, prompt, ids, answer_text(y))], 0))
        return result

    def mix(self, call: Call) -> HeadMix | None:
        rows = last_prompt_rows(call)
        return None if rows is None else mixture(call, rows, self.embedding[self.task], self.alpha)

    def loss(self, alpha: Tensor, questions: Sequence[list[Choice]]) -> float:
        """Mean cross entropy of the answers' first tokens, over all tasks alike."""
        self.alpha, means = alpha, []
        for self.task, asked in enumerate(questions):
            read = last_logits(self.model, batches_of(self.model, self.tokenizer, asked, 16))
            means.append(sum(float(-logits.log_softmax(-1)[q.choices[0]]) for q, logits in read) / len(asked))
        return sum(means) / len(means)


def _learn(
    mixer: Mixer, train, check, iterations: int, lr: float, batch_size: int, every: int, last: bool, rng
) -> tuple[Tensor, dict[str, float]]:
    """(logit [layers, heads], {step: loss of the check})."""
    logit = torch.zeros(mixer.alpha.shape, requires_grad=True)
    optimiser = torch.optim.Adam([logit], lr=lr)
    best, losses = (float("inf"), logit.detach().clone()), {}
    for step in track(range(1, iterations + 1), "mixing weights", iterations):
        mixer.task = rng.randrange(len(train))
        asked = rng.sample(train[mixer.task], min(batch_size, len(train[mixer.task])))
        (inputs, part), *_ = batches_of(mixer.model, mixer.tokenizer, asked, len(asked))
        mixer.alpha = logit.sigmoid() * mixer.known
        with torch.enable_grad():
            logits = mixer.model(**inputs).logits[:, -1].float()
        wanted = torch.tensor([q.choices[0] for q in part], device=logits.device)
        # only the logits' gradient: the model's own .grad fields stay as they are
        (logit.grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, wanted), [logit])
        optimiser.step()
        if step % every == 0 or step == iterations:
            found = mixer.loss(logit.detach().sigmoid() * mixer.known, check)
            losses[str(step)] = found
            if found < best[0] or last:
                best = found, logit.detach().clone()
    return best[1], losses


def _select(mixer: Mixer, train, check) -> Tensor:
    """[layers, heads]: 1 for the heads whose replacement lowers the loss, as many as lower it together on the check."""
    asked = [part[:16] for part in train]
    plain = mixer.loss(torch.zeros_like(mixer.alpha), asked)
    heads = mixer.known.nonzero().tolist()
    drops = []
    for layer, head in track(heads, "heads", len(heads)):
        alone = torch.zeros_like(mixer.known)
        alone[layer, head] = 1.0
        drops.append(plain - mixer.loss(alone, asked))
    order = sorted(range(len(heads)), key=lambda i: -drops[i])
    useful = sum(drop > 0 for drop in drops)
    best = float("inf"), torch.zeros_like(mixer.known)
    for count in sorted({min(useful, 2**power) for power in range(12)} - {0}):
        alpha = torch.zeros_like(mixer.known)
        for i in order[:count]:
            alpha[tuple(heads[i])] = 1.0
        best = min(best, (mixer.loss(alpha, check), alpha), key=lambda pair: pair[0])
    return best[1]
