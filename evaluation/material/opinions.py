"""Sentences with an opinion, written for this project: half of them positive, half negative; by hand, and from patterns."""

from __future__ import annotations

import random
from dataclasses import dataclass

POSITIVE = """
I have not laughed so much in years.
The waiter remembered our names and brought the children crayons.
It arrived a day early and fits perfectly.
I would watch it again tomorrow.
After ten years the engine still starts at the first turn.
My grandmother, who hates everything, asked for a second portion.
The plot is simple, but the actors make every minute count.
You get far more than you pay for.
I was sceptical at first, and I was wrong.
Finally a manual that a normal person can understand.
The room was small, yet we slept better than at home.
Nobody in the hall wanted the concert to end.
It does exactly what it promises.
Our guide knew every stone and told wonderful stories.
I could not put the book down until three in the morning.
The soup alone is worth the long drive.
Support answered within minutes and solved the problem at once.
We have already booked the same house for next summer.
Not a single dull scene in two hours.
The colours are even prettier than in the pictures.
My son plays with it every day and refuses to share it.
The staff could not have been kinder.
What a relief to find shoes that do not hurt.
There was nothing to complain about.
The second season is even better than the first.
I recommend this dentist to all my friends.
The battery lasts a whole week, which still amazes me.
Despite the rain it was the best day of our holiday.
She sings as if the song had been written for her.
The bread is warm, the butter is salted, and life is good.
They replaced the broken part for free.
I was sad only because it was over.
"""
NEGATIVE = """
I want those two hours of my life back.
The waiter forgot us twice and then brought the wrong bill.
It broke on the second day.
I fell asleep before the first song was over.
After a month the zip came off in my hand.
Even my dog would not eat it.
The actors try hard, but the story makes no sense at all.
You pay a lot and get almost nothing.
I had high hopes, and every one of them was disappointed.
The manual seems to have been translated by a machine.
The room was large, but so were the spiders.
Half of the audience left during the break.
It does none of the things it promises.
Our guide read from a sheet and looked at his watch.
I gave up on the book after forty pages.
The soup was cold and tasted of soap.
Support never answered my three letters.
We left two days early and will not come back.
There is not one good joke in the whole film.
The colours washed out the first time.
My son looked at it once and never touched it again.
The staff could hardly have been ruder.
My feet hurt after five minutes in these shoes.
There was nothing there to enjoy.
The second season ruins everything that was good about the first.
I would not send my worst enemy to this dentist.
The battery is empty before lunch.
Even the sunshine could not save this holiday.
She sings as if she had never heard the song before.
The bread was stale, the butter was gone, and nobody cared.
They refused to replace the broken part.
I was glad only because it was over.
"""

# (things, good words, bad words): the words say something about each of the things
FIELDS = (
    ("film|novel|play|series|concert|exhibition",
     "moving|brilliant|gripping|funny|charming|unforgettable", "boring|pointless|predictable|clumsy|tedious|forgettable"),
    ("meal|pizza|breakfast|cake|curry|salad",
     "delicious|fresh|tasty|excellent|perfectly seasoned|generous", "tasteless|stale|greasy|burnt|overcooked|disgusting"),
    ("hotel|apartment|campsite|guest house|hostel|cabin",
     "clean|quiet|comfortable|cosy|spotless|welcoming", "dirty|noisy|run-down|cold|damp|unfriendly"),
    ("phone|laptop|camera|printer|vacuum cleaner|headset",
     "reliable|fast|easy to use|well made|excellent|sturdy", "useless|slow|unreliable|badly made|faulty|flimsy"),
)  # fmt: skip
PATTERNS = (
    ("The {t} was {w}.", "The {t} was {w}."),
    ("What a {w} {t}!", "What a {w} {t}!"),
    ("I found the {t} {w}, and my friends thought so too.", "I found the {t} {w}, and my friends thought so too."),
    ("The {t} was {w}, which made our day.", "The {t} was {w}, which spoiled our day."),
    ("Everybody warned us about the {t}, but it was {w}.", "Everybody praised the {t}, but it was {w}."),
    ("The {t} was not {o} at all.", "The {t} was not {o} at all."),
    ("We were surprised how {w} the {t} was, and we will come again.", "We were shocked how {w} the {t} was, and never again."),
    ("I expected a {o} {t} and got a {w} one.", "I expected a {o} {t} and got a {w} one."),
    ("Thanks to the {w} {t} the evening was saved.", "Because of the {w} {t} the evening was ruined."),
)  # fmt: skip


@dataclass(frozen=True)
class Opinion:
    text: str
    positive: bool
    written: bool  # by hand


def pool(seed: int) -> list[Opinion]:
    """Positive and negative in turn, all different, every fourth pair from those written by hand as long as they last."""
    rng = random.Random(f"opinions {seed}")
    sides = []
    for positive, lines in ((True, POSITIVE), (False, NEGATIVE)):
        written = [Opinion(line, positive, True) for line in lines.strip().splitlines()]
        made = [Opinion(text, positive, False) for text in sorted(_patterned(positive))]
        rng.shuffle(written)
        rng.shuffle(made)
        side = []
        while made:
            side += written[:1] + made[:3]
            written, made = written[1:], made[3:]
        sides.append(side)
    count = min(map(len, sides))
    return [opinion for pair in zip(sides[0][:count], sides[1][:count]) for opinion in pair]


def _patterned(positive: bool) -> set[str]:
    found = set()
    for things, good, bad in FIELDS:
        words, opposite = (good, bad) if positive else (bad, good)
        for k, thing in enumerate(things.split("|")):
            for i, pattern in enumerate(PATTERNS):
                # one of the six words for each pattern, another one for each thing
                word, other = words.split("|")[(i + k) % 6], opposite.split("|")[(i + 2 * k) % 6]
                text = pattern[0 if positive else 1].format(t=thing, w=word, o=other)
                found.add(_article(text))
    return found


def _article(text: str) -> str:
    words = text.split(" ")
    for i, word in enumerate(words[:-1]):
        if word.lower() == "a" and words[i + 1][0] in "aeiou":
            words[i] += "n"
    return " ".join(words)
