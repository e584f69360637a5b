"""Labelled prompts of three kinds, and how rightly a model answers them: what a search over heads measures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ....hooks.trackers.caches import cache_name, cache_of
from ....interventions import ReattendError
from .answers import written
from .choices import Choice, batches_of, last_logits, read_choices
from .needles import recall

Kind = Literal["classification", "multiple_choice", "generation"]
# how right a written answer is, 0 to 1: judge(reference, answer)
Judge = Callable[[str, str], float]


class LabelledTask:
    """Prompts that a model answers. scores(model): one number in [0, 1] per prompt, under whatever session is active.

    passes: forward passes that read a prompt, for each example (several where options are read beside one another).
    """

    passes: list[int]

    def scores(self, model: Any) -> list[float]:
        raise NotImplementedError


def labelled_task(
    kind: str,
    tokenizer: Any,
    examples: Sequence[Any],
    batch_size: int = 16,
    judge: Judge | None = None,
    max_new_tokens: int = 0,
) -> LabelledTask:
    """The task of these examples.

    "classification": (prompt, label) or (prompt, label, choices); the highest of the logits of the choices' first tokens at the prompt's
    end is the answer; without choices all labels are. "multiple_choice": (prompt, answer, options); the likeliest option, by the
    sum of the log-probabilities of all its tokens. "generation": (prompt, reference); greedy text up to a line break, of at most
    max_new_tokens (0: the longest reference and 8 more), scored by judge(reference, answer), by default the share of the
    reference's words that the answer holds. Texts begin with a space where they follow the prompt after one.
    Raises ReattendError for another kind, and for examples that cannot be judged.
    """
    if batch_size < 1 or max_new_tokens < 0:
        raise ReattendError(f"batch_size must be 1 or more, max_new_tokens 0 or more, got {batch_size} and {max_new_tokens}")
    if kind not in ("classification", "multiple_choice", "generation"):
        raise ReattendError(f'kind must be "classification", "multiple_choice" or "generation", got {kind!r}')
    if kind != "generation" and (judge is not None or max_new_tokens):
        raise ReattendError(f'judge and max_new_tokens go with kind "generation", not with {kind!r}')
    if kind == "classification":
        return Classification(tokenizer, read_choices(tokenizer, examples), batch_size)
    for example in examples:
        if (
            isinstance(example, str)
            or not isinstance(example, Sequence)
            or not all(isinstance(t, str) and t for t in example[:2])
        ):
            raise ReattendError(f"data must hold (prompt, answer) as texts that are not empty, got {example!r}")
    if not examples:
        raise ReattendError("data must hold at least one example")
    if kind == "multiple_choice":
        return MultipleChoice(tokenizer, examples, batch_size)
    return Generation(tokenizer, examples, batch_size, judge or recall, max_new_tokens)


class Classification(LabelledTask):
    def __init__(self, tokenizer: Any, questions: list[Choice], batch_size: int) -> None:
        self.tokenizer, self.questions, self.batch_size = tokenizer, questions, batch_size
        self.passes = [1] * len(questions)

    def scores(self, model: Any) -> list[float]:
        batches = batches_of(model, self.tokenizer, self.questions, self.batch_size)
        result = [0.0] * len(self.questions)
        for q, logits in last_logits(model, batches):
            result[q.place] = float(int(logits[q.choices].argmax()) == q.right)
        return result


@dataclass
class Option:
    """One option of a question: the prompt's tokens and its own; place: which example; right: whether it is the answer."""

    ids: list[int]
    tokens: list[int]
    place: int
    right: bool


class MultipleChoice(LabelledTask):
    """The prompt is one prefill, an option's tokens are decode steps after it, as if the model had written them."""

    def __init__(self, tokenizer: Any, examples: Sequence[Any], batch_size: int) -> None:
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.options: list[Option] = []
        self.passes = []
        for place, example in enumerate(examples):
            options = list(example[2]) if len(example) > 2 else []
            if example[1] not in options or len(set(options)) < max(2, len(options)):
                raise ReattendError(f"data: answer {example[1]!r} must be one of at least two different options, got {options}")
            for option in options:
                ids, tokens = split(tokenizer, example[0], option)
                self.options.append(Option(ids, tokens, place, option == example[1]))
            self.passes.append(len(options))

    def scores(self, model: Any) -> list[float]:
        best = [(float("-inf"), False)] * len(self.passes)
        for option, logprob in self._logprobs(model):
            best[option.place] = max(best[option.place], (logprob, option.right), key=lambda pair: pair[0])
        return [float(right) for _, right in best]

    def _logprobs(self, model: Any) -> Iterator[tuple[Option, float]]:
        order = sorted(range(len(self.options)), key=lambda i: len(self.options[i].ids))
        found = torch.zeros(len(order))
        for part in (order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)):
            found[part] = option_logprobs(model, self.tokenizer, [self.options[i] for i in part])
        # ties go to the option that comes first
        yield from zip(self.options, found.tolist(), strict=True)


class Generation(LabelledTask):
    def __init__(self, tokenizer: Any, examples: Sequence[Any], batch_size: int, judge: Judge, limit: int) -> None:
        self.tokenizer, self.batch_size, self.judge = tokenizer, batch_size, judge
        self.prompts = [list(tokenizer(e[0])["input_ids"]) for e in examples]
        self.references = [e[1].strip() for e in examples]
        self.limit = limit or 8 + max(len(split(tokenizer, e[0], e[1])[1]) for e in examples)
        self.passes = [1] * len(self.prompts)

    def scores(self, model: Any) -> list[float]:
        order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        result = [0.0] * len(order)
        for part in (order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)):
            made = written(model, self.tokenizer, [self.prompts[i] for i in part], self.limit)
            for i, (_, text) in zip(part, made, strict=True):
                score = float(self.judge(self.references[i], text.strip()))
                if not 0 <= score <= 1:
                    raise ReattendError(f"judge must return a number in [0, 1], got {score}")
                result[i] = score
        return result


def split(tokenizer: Any, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """(tokens of the prompt, tokens of a text after it), however the tokenizer treats spaces."""
    ids, whole = list(tokenizer(prompt)["input_ids"]), list(tokenizer(prompt + text)["input_ids"])
    tokens = whole[len(ids) :] if whole[: len(ids)] == ids else []
    tokens = tokens or list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids or not tokens:
        raise ReattendError(f"data: {prompt!r} and {text!r} must both hold at least one token")
    return ids, tokens


def option_logprobs(model: Any, tokenizer: Any, options: Sequence[Option]) -> Tensor:
    """[n] float32: the summed log-probabilities of the options' tokens after their prompts, in one batch."""
    asked = [Choice(o.ids, [], 0, place) for place, o in enumerate(options)]
    ((inputs, part),) = batches_of(model, tokenizer, asked, len(asked))
    rows = [options[q.place] for q in part]
    steps, mask = max(len(o.tokens) for o in rows), inputs["attention_mask"]
    placed = "position_ids" in inspect.signature(type(model).forward).parameters
    total = torch.zeros(len(rows))
    with torch.no_grad():
        out = model(**{**inputs, "use_cache": steps > 1})
        for step in range(steps):
            logits = out.logits[:, -1].float().log_softmax(-1).cpu()
            for i, row in enumerate(rows):
                if step < len(row.tokens):
                    total[i] += logits[i, row.tokens[step]]
            if step + 1 == steps:
                break
            # rows whose option has ended go along; nobody reads them any more
            fed = torch.tensor([[row.tokens[min(step, len(row.tokens) - 1)]] for row in rows], device=mask.device)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            places = {"position_ids": mask.sum(dim=1, keepdim=True) - 1} if placed else {}
            places[cache_name(model)] = cache_of(out)
            out = model(input_ids=fed, attention_mask=mask, use_cache=True, **places)
    return total[torch.tensor([q.place for q in part]).argsort()]
