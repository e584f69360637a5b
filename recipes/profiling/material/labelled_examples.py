"""Small labelled sets of our own, so that profiling runs without a data set: feelings of remarks, topics of sentences, facts."""

from __future__ import annotations

import random
from typing import Any

from .word_pairs import MORE_CAPITALS, MORE_OPPOSITES, Pair, pairs_in

POSITIVE = (
    "The soup was warm, rich and better than anything I had this year.",
    "Every scene made me smile and the ending was perfect.",
    "The staff greeted us kindly and solved everything in minutes.",
    "I would gladly buy this lamp again, it works beautifully.",
    "A charming little book that I could not put down.",
    "The room was spotless and the view took my breath away.",
    "Her voice filled the hall and the crowd cheered for an hour.",
    "This bicycle rides smoothly and feels solid on every road.",
    "The teacher explained it so well that I finally enjoyed maths.",
    "Fast delivery, careful packing and a lovely thank you note.",
    "The actors were wonderful and the jokes landed every time.",
    "My headache was gone after one cup of this excellent tea.",
    "The garden looks splendid since they took care of it.",
    "A clever plot, brilliant music and a great cast.",
    "The new update made my phone quicker and easier to use.",
    "We had a delightful evening and already booked the next one.",
)
NEGATIVE = (
    "The soup was cold, bland and far too expensive.",
    "I was bored after ten minutes and left before the end.",
    "The staff ignored us and nobody ever apologised.",
    "This lamp broke after two days and smells of burnt plastic.",
    "A dull book with flat characters and endless mistakes.",
    "The room was filthy and the noise kept us awake all night.",
    "Her voice cracked on every song and people walked out.",
    "This bicycle rattles terribly and the brakes are useless.",
    "The lecture was confusing and a complete waste of time.",
    "The parcel came late, torn open and half empty.",
    "The actors seemed asleep and none of the jokes worked.",
    "The tea tasted like dust and made me feel sick.",
    "The garden looks awful since they stopped caring for it.",
    "A stupid plot, ugly pictures and terrible music.",
    "The new update made my phone slow and it crashes daily.",
    "We had a miserable evening and will never come back.",
)
TOPICS = {
    "sports": (
        "The goalkeeper saved two penalties in the final minutes of the match.",
        "She won the marathon with a strong sprint on the last lap.",
        "The coach changed three players after the first half.",
        "Fans filled the stadium long before the tournament began.",
        "He scored twice and the team moved to the top of the league.",
        "The swimmer broke the national record in the relay.",
        "A late basket decided the championship game.",
        "The tennis champion lost the first set but won the next two.",
        "The referee showed a red card after the foul.",
        "Cyclists climbed the steepest stage of the race today.",
    ),
    "food": (
        "Knead the dough, let it rise and bake the bread until golden.",
        "The chef served grilled fish with lemon and fresh herbs.",
        "Add a pinch of salt to the sauce and stir it slowly.",
        "This bakery makes the best apple cake in town.",
        "Roast the vegetables in olive oil for half an hour.",
        "The menu lists five soups and a spicy noodle dish.",
        "Grandmother's recipe needs butter, sugar and six eggs.",
        "They fried the onions and seasoned the rice with saffron.",
        "A ripe cheese and a glass of cider make a simple supper.",
        "Peel the potatoes and boil them until they are soft.",
    ),
    "weather": (
        "Heavy rain is expected along the coast tonight.",
        "Temperatures will drop below freezing before dawn.",
        "Thick fog covered the valley until late morning.",
        "A thunderstorm brought hail and strong gusts of wind.",
        "The forecast promises sunshine and clear skies tomorrow.",
        "Snow fell for three days and closed the mountain pass.",
        "Clouds will move in from the west with light showers.",
        "The heatwave ends on Sunday when cooler air arrives.",
        "Humidity stays high and the afternoon will be stormy.",
        "Frost and icy winds are forecast for the northern hills.",
    ),
}


ASKED = {
    "Question: What is the capital of {0}?\nAnswer:": MORE_CAPITALS,
    'Question: What is the opposite of "{0}"?\nAnswer:': MORE_OPPOSITES,
}


def built_in(kind: str) -> list[Any]:
    """The examples for a kind of labelled task: remarks and topics to classify, facts to choose from four options or to write."""
    if kind == "multiple_choice":
        return fact_questions()
    if kind == "generation":
        return [(prompt, right) for prompt, right, _ in fact_questions()]
    return list(labelled_examples())


def fact_questions() -> list[tuple[str, str, tuple[str, ...]]]:
    """(prompt, answer, options), capitals and opposites in turn; none of them is asked by the suite "choices"."""
    rng = random.Random("fact questions")

    def asked(prompt: str, pairs: list[Pair]) -> list[tuple[str, str, tuple[str, ...]]]:
        rows = []
        for x, y in pairs:
            options = [y, *rng.sample(sorted({other for _, other in pairs} - {y}), 3)]
            rng.shuffle(options)
            rows.append((prompt.format(x), f" {y}", tuple(f" {o}" for o in options)))
        return rows

    columns = [asked(prompt, pairs_in(table)) for prompt, table in ASKED.items()]
    return [row for rows in zip(*columns, strict=False) for row in rows]


def labelled_examples() -> list[tuple[str, str, tuple[str, ...]]]:
    """62 (prompt, label, choices), labels mixed; the even ones and the odd ones are two halves of the same kind."""
    feelings = (" positive", " negative")
    topics = tuple(f" {name}" for name in TOPICS)
    remarks = [
        (text, label) for pair in zip(POSITIVE, NEGATIVE, strict=True) for text, label in zip(pair, feelings, strict=True)
    ]
    sentences = [(row[i], label) for i in range(10) for row, label in zip(TOPICS.values(), topics, strict=True)]
    # neighbours have different labels: pairs of two make each half hold all of them
    feeling = [(f"Remark: {text}\nIs this remark positive or negative? It is", label, feelings) for text, label in remarks]
    topic = [
        (f"Text: {text}\nIs this text about sports, food or weather? It is about", label, topics) for text, label in sentences
    ]
    return _interleaved(feeling, 2) + _interleaved(topic, 3)


def _interleaved(items: list, labels: int) -> list:
    """Items so ordered that even and odd places hold equally many of each label: groups of one item per label, taken in pairs."""
    groups = [items[i : i + labels] for i in range(0, len(items), labels)]
    return [
        item for a, b in zip(groups[::2], groups[1::2], strict=False) for pair in zip(a, b, strict=True) for item in pair
    ] + [item for group in groups[len(groups) // 2 * 2 :] for item in group]
