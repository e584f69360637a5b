"""Short texts made up here, each with a fact, a question about it and the words that answer it. Nothing in them is true."""

from __future__ import annotations

import random
from dataclasses import dataclass

NOUNS = (
    "lighthouse", "music school", "toy museum", "water mill", "swimming hall", "night market", "clock tower", "glass factory",
    "fishing boat", "village theatre",
)  # fmt: skip
TOWNS = (
    "Tarnby", "Ellmoor", "Quarrow", "Vessing", "Holdane", "Mirefield", "Ostrava", "Penlow", "Brackwick", "Sundal", "Gorsley",
    "Fennick",
)  # fmt: skip
ASIDES = (
    "It has been painted twice.",
    "Many guests write a postcard there.",
    "The road to it is narrow.",
    "A small shop stands beside it.",
    "Two books have been written about it.",
    "The neighbours are proud of it.",
)


@dataclass(frozen=True)
class Form:
    """A kind of fact. {s}: what it is about; {a}: the word that answers. phrase: the part of the fact that is the answer."""

    kind: str
    fact: str
    phrase: str
    question: str
    start: str
    words: tuple[str, ...]


def _form(kind: str, fact: str, phrase: str, question: str, start: str, words: str) -> Form:
    return Form(kind, fact, phrase, question, start, tuple(words.split()))


FORMS = (
    _form("place", "{s} was moved {p} last year.", "to a hill outside {a}", "Where was {s} moved last year?",
          "It was moved to a hill outside", "Oslo Dublin Cairo Lisbon Athens Prague Seattle Denver"),
    _form("person", "{s} was designed {p}.", "by a young woman called {a}", "Who designed {s}?",
          "It was designed by a young woman called", "Sophie Irene Grace Alma Edith Flora Ruth Agnes"),
    _form("time", "{s} opened {p}.", "on the first day of {a}", "When did {s} open?",
          "It opened on the first day of", "January March April June August September October December"),
    _form("thing", "{s} has a roof {p}.", "made of painted {a}", "What is the roof of {s} made of?",
          "The roof is made of painted", "wood stone glass copper straw clay steel paper"),
    _form("place", "The owner of {s} was born {p}.", "in a village near the {a}", "Where was the owner of {s} born?",
          "The owner was born in a village near the", "river desert border coast lake mountain forest harbour"),
    _form("person", "The keys of {s} are kept {p}.", "by the old {a}", "Who keeps the keys of {s}?",
          "They are kept by the old", "priest baker captain judge cook gardener tailor miller"),
    _form("time", "{s} is closed {p}.", "from noon until late in the {a}", "When is {s} closed?",
          "It is closed from noon until late in the", "evening night winter autumn spring summer afternoon week"),
    _form("thing", "Visitors of {s} pay {p}.", "with a bag of {a}", "What do visitors of {s} pay with?",
          "They pay with a bag of", "salt wool sugar rice coins apples nuts feathers"),
)  # fmt: skip
KINDS = tuple(dict.fromkeys(form.kind for form in FORMS))


@dataclass(frozen=True)
class Triplet:
    """A context with a fact in it, the question it answers, the words of the context that answer, and a question it does not answer."""

    context: str
    question: str
    answer: str
    other: str
    kind: str = ""


@dataclass(frozen=True)
class Conflict:
    """Two contradicting facts, a question about them, how its answer begins, and the words that go with each fact."""

    facts: tuple[str, str]
    question: str
    start: str
    words: tuple[str, str]

    @property
    def prompt(self) -> str:
        return f"{self.facts[0]} {self.facts[1]}\nQuestion: {self.question} Answer: {self.start}"


def triplets(pairs: int, seed: int = 0) -> list[Triplet]:
    """2 * `pairs` triplets: the members of a pair ask each other's question, which is about something else."""
    result = []
    for i in range(pairs):
        rng = random.Random(f"triplets {seed} {i}")
        # neighbours in the list of forms are of different kinds, and every form comes equally often
        forms = FORMS[2 * i % len(FORMS)], FORMS[(2 * i + 1) % len(FORMS)]
        subjects = rng.sample([f"the {noun} of {town}" for noun in NOUNS for town in TOWNS], 2)
        phrases = [form.phrase.format(a=rng.choice(form.words)) for form in forms]
        questions = [form.question.format(s=subject) for form, subject in zip(forms, subjects)]
        for k, (form, subject) in enumerate(zip(forms, subjects)):
            fact, aside = _sentence(form.fact.format(s=subject, p=phrases[k])), rng.choice(ASIDES)
            context = f"{fact} {aside}" if rng.random() < 0.5 else f"{aside} {fact}"
            result.append(Triplet(context, questions[k], phrases[k], questions[1 - k], form.kind))
    return result


def conflicts(count: int, seed: int = 0) -> list[Conflict]:
    """`count` pairs of facts that cannot both be true."""
    result = []
    for i in range(count):
        rng = random.Random(f"conflicts {seed} {i}")
        form = FORMS[i % len(FORMS)]
        subject = f"the {rng.choice(NOUNS)} of {rng.choice(TOWNS)}"
        one, two = rng.sample(form.words, 2)
        first, second = (_sentence(form.fact.format(s=subject, p=form.phrase.format(a=word))) for word in (one, two))
        result.append(Conflict((first, second), form.question.format(s=subject), form.start, (one, two)))
    return result


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
