"""Small facts about invented people: sentence, question, how an answer begins, and words that can take each other's place."""

from __future__ import annotations

import random
from dataclasses import dataclass

NAMES = [
    "Anna",
    "Paul",
    "Maria",
    "Tom",
    "Lucy",
    "Omar",
    "Nina",
    "Felix",
    "Clara",
    "Hugo",
    "Sarah",
    "David",
    "Emma",
    "Peter",
    "Laura",
    "Simon",
    "Julia",
    "Martin",
    "Helen",
    "Robert",
    "Alice",
    "Victor",
    "Diana",
    "George",
]


@dataclass(frozen=True)
class Kind:
    """A kind of fact. {n}: a name, {a}: one of the words. aside: a further sentence about the person that answers nothing."""

    name: str
    fact: str
    question: str
    start: str
    words: tuple[str, ...]
    aside: str


def _kind(name: str, fact: str, question: str, start: str, words: str, aside: str) -> Kind:
    return Kind(name, fact, question, start, tuple(words.split()), aside)


KINDS = (
    _kind("key", "The key of {n}'s house is in the {a}.", "Where is the key of {n}'s house?", "It is in the",
          "kitchen garden garage office attic basement car bag", "The house of {n} was built a long time ago."),
    _kind("home", "{n} lives in {a}.", "Where does {n} live?", "{n} lives in",
          "Paris Rome Berlin London Madrid Vienna Tokyo Boston", "In the evening {n} likes to go for a walk."),
    _kind("car", "The car of {n} is {a}.", "What colour is the car of {n}?", "It is",
          "red blue green black white yellow brown silver", "{n} drives to work every day."),
    _kind("job", "{n} works as a {a}.", "What is the job of {n}?", "{n} works as a",
          "teacher doctor farmer lawyer baker nurse painter driver", "{n} gets up early in the morning."),
    _kind("pet", "The pet of {n} is a {a}.", "What kind of pet does {n} have?", "It is a",
          "dog cat rabbit bird snake horse fish turtle", "{n} feeds it twice a day."),
    _kind("drink", "{n} always drinks {a} for breakfast.", "What does {n} drink for breakfast?", "{n} drinks",
          "coffee tea milk water juice wine beer chocolate", "Breakfast is at seven."),
    _kind("day", "{n} goes swimming every {a}.", "On which day does {n} go swimming?", "{n} goes swimming every",
          "Monday Tuesday Wednesday Thursday Friday Saturday Sunday", "The pool is close to the station."),
    _kind("sport", "The favourite sport of {n} is {a}.", "What is the favourite sport of {n}?", "It is",
          "football tennis basketball hockey golf rugby cricket baseball", "{n} trains with a few old friends."),
    _kind("music", "{n} plays the {a}.", "Which instrument does {n} play?", "{n} plays the",
          "piano guitar violin flute drums trumpet harp cello", "The neighbours do not mind at all."),
    _kind("study", "{n} studies {a} at the university.", "What does {n} study?", "{n} studies",
          "physics history music law medicine chemistry art biology", "The lectures begin in October."),
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """Facts of one kind that answer one question. sentences[i] says words[i] of names[i]; the question is about names[0]."""

    kind: str
    names: list[str]
    words: list[str]
    sentences: list[str]
    asides: list[str]
    question: str
    start: str


def draw(rng: random.Random, kind: Kind, people: int, words: int) -> Question:
    """Facts about `people` different people with `words` different words; the lists are as long as the larger of the two."""
    names, chosen = rng.sample(NAMES, people), rng.sample(kind.words, words)
    count = max(people, words)
    names, chosen = (names * count)[:count] if people == 1 else names, (chosen * count)[:count] if words == 1 else chosen
    return Question(
        kind.name,
        names,
        chosen,
        [kind.fact.format(n=n, a=a) for n, a in zip(names, chosen)],
        [kind.aside.format(n=n) for n in names],
        kind.question.format(n=names[0]),
        kind.start.format(n=names[0]),
    )
