"""Needle-in-a-haystack prompts: sentences of our own to hide, filler text to hide them in, and the recall of what comes back."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ....interventions import ReattendError
from ....interventions.families.heads import find_phrase


@dataclass(frozen=True)
class Needle:
    """A sentence to hide, the question about it, and the words of the sentence that answer it."""

    sentence: str
    question: str
    answer: str


NEEDLES = (
    Needle(
        "The best thing to do in the village of Ostermoor is to climb the old water tower and watch the cranes fly over the marsh.",
        "What is the best thing to do in the village of Ostermoor?",
        "climb the old water tower and watch the cranes fly over the marsh",
    ),
    Needle(
        "The secret ingredient of the harbour soup in Tellin is a spoon of burnt honey mixed with dried lemon peel.",
        "What is the secret ingredient of the harbour soup in Tellin?",
        "a spoon of burnt honey mixed with dried lemon peel",
    ),
    Needle(
        "The password of the observatory at Cape Morrow is seven yellow lanterns and a broken violin.",
        "What is the password of the observatory at Cape Morrow?",
        "seven yellow lanterns and a broken violin",
    ),
    Needle(
        "The name of the winning horse at the Fenbury fair is Crooked Lantern of the Silver Hill.",
        "What is the name of the winning horse at the Fenbury fair?",
        "Crooked Lantern of the Silver Hill",
    ),
    Needle(
        "The best gift for a visitor from Marrowdale is a basket of green pears and a pair of woollen socks.",
        "What is the best gift for a visitor from Marrowdale?",
        "a basket of green pears and a pair of woollen socks",
    ),
)

WHO = "the baker|my neighbour|an old teacher|the gardener|her cousin|the night guard|a young clerk|the ferryman|his aunt|the librarian"
DID = (
    "repaired a wooden fence|counted the empty bottles|wrote a long letter|waited for the morning train|painted the kitchen window|"
    "sorted a box of photographs|carried the baskets upstairs|fed the grey cat|borrowed a ladder|closed the heavy shutters"
)
WHERE = (
    "behind the market hall|near the stone bridge|at the end of the lane|in the small courtyard|beside the canal|above the workshop|"
    "on the way to the mill|across from the school|under the chestnut trees|by the post office"
)
WHEN = (
    "On Monday|In early spring|After the rain had stopped|During the holidays|Late in the evening|Before breakfast|Last winter|"
    "Around noon|A week later|Every second Thursday"
)
WHY = (
    "because the weather had turned cold|although nobody had asked for it|while the radio played softly|and nobody noticed|"
    "as people there have always done|until the lamps were lit|and then went home without a word|since the shop was closed anyway|"
    "which took longer than expected|and felt quite content with it"
)


Haystack = Callable[[str], Iterator[str]]


def filler(seed: int | str = 0) -> Iterator[str]:
    """Endless plain sentences without any fact worth asking for, the same for the same seed."""
    rng = random.Random(seed)
    parts = [part.split("|") for part in (WHEN, WHO, DID, WHERE, WHY)]
    while True:
        when, who, did, place, why = (rng.choice(part) for part in parts)
        yield f"{when}, {who} {did} {place} {why}."


@dataclass
class Sample:
    """A prompt with a hidden needle. ids: its tokens; span: the answer's [start, stop) among them; prompt: its text.

    text: the sentences in which the needle is hidden, as the prompt holds them.
    """

    needle: Needle
    length: int
    depth: float
    ids: list[int]
    span: tuple[int, int]
    answer_tokens: int
    prompt: str = ""
    text: str = ""


def make_samples(
    tokenizer: Any, lengths: Sequence[int], depths: Sequence[float], needles: Sequence[Needle], seed: int = 0
) -> list[Sample]:
    """One sample per length, depth and needle. lengths: tokens of the text; depths in [0, 1]: where in it the needle lies.

    Raises ReattendError for a text too short for its needle, or one in which the needle's answer cannot be found again.
    """
    return [make_sample(tokenizer, length, depth, needle, seed) for length in lengths for depth in depths for needle in needles]


def _text(tokenizer: Any, length: int, depth: float, needle: Needle, seed: int, haystack: Haystack) -> str:
    """Sentences of the haystack with the needle among them, other ones for every sample."""

    def size(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    room = length - size(" " + needle.sentence)
    if room < 20:
        raise ReattendError(f"lengths: {length} tokens leave no room around a needle; use 100 or more")
    sentences, before, used = [], 0, 0
    for sentence in haystack(f"{seed} {length} {depth} {needle.sentence}"):
        width = size(" " + sentence)
        if used + width > room:
            break
        used += width
        sentences.append(sentence)
        if used <= depth * room:
            before = len(sentences)
    return " ".join([*sentences[:before], needle.sentence, *sentences[before:]])


def make_sample(tokenizer: Any, length: int, depth: float, needle: Needle, seed: int, haystack: Haystack = filler) -> Sample:
    """One sample; haystack: a function of a seed that gives the sentences around the needle, without end."""
    text = _text(tokenizer, length, depth, needle, seed, haystack)
    prompt = question_about(tokenizer, text, needle)
    ids = tokenizer(prompt, add_special_tokens=not getattr(tokenizer, "chat_template", None))["input_ids"]
    ids = list(ids)
    # an answer inside a text begins with a space, which most tokenizers make part of its first token
    spaced, bare = (tokenizer(s + needle.answer, add_special_tokens=False)["input_ids"] for s in (" ", ""))
    for phrase in (spaced, bare):
        span = find_phrase(ids, phrase)
        if span is not None:
            return Sample(needle, length, depth, ids, span, len(phrase), prompt, text)
    raise ReattendError(f"the tokens of the answer {needle.answer!r} cannot be found in the prompt: choose another needle")


def question_about(tokenizer: Any, text: str, needle: Needle) -> str:
    """The prompt: a text and the needle's question, in the chat template where the tokenizer has one."""
    prompt = f"{text}\n\nBased on the content of the book, Question: {needle.question}\nAnswer:"
    if not getattr(tokenizer, "chat_template", None):
        return prompt
    return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)


def recall(answer: str, generated: str) -> float:
    """ROUGE-1 recall: the share of the answer's words that the generated text contains."""
    wanted, found = (Counter(re.findall(r"\w+", text.lower())) for text in (answer, generated))
    return sum((wanted & found).values()) / max(1, sum(wanted.values()))
