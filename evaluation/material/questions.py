"""Questions with four options each, written for this project: facts that a small model knows in part."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from ...recipes.profiling.material.word_pairs import CAPITALS, OPPOSITES

KINDS = ("capital", "opposite", "category", "order", "number", "everyday")

CATEGORIES = {
    "fish": "trout salmon herring tuna cod", "bird": "sparrow eagle owl pigeon raven", "tree": "oak birch willow maple pine",
    "fruit": "plum pear cherry banana peach", "vegetable": "carrot spinach cabbage onion celery", "metal": "copper zinc iron tin lead",
    "insect": "beetle wasp moth cricket ant", "tool": "hammer chisel screwdriver saw drill", "fabric": "silk cotton velvet denim wool",
    "dance": "waltz tango polka samba foxtrot",
}  # fmt: skip
ORDERS = {
    "The day that comes right after {0} is": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "The month that comes right after {0} is": "January February March April May June July August September October November December",
    "The letter that comes right after {0} in the alphabet is": "B C D E F G H J K L M P Q R S T",
}
# the first option is right
EVERYDAY = """
People open an umbrella when it | rains, burns, sleeps, speaks
Bread is baked in an | oven, icebox, aquarium, envelope
To cut paper, people use | scissors, soup, blankets, whistles
A letter is put into an | envelope, oven, orchard, engine
Milk comes from | cows, stones, clouds, trains
Honey is made by | bees, sheep, frogs, horses
Wool comes from | sheep, fish, bees, snakes
A baby cat is called a | kitten, calf, foal, chick
A baby dog is called a | puppy, lamb, cub, duckling
A baby cow is called a | calf, kitten, tadpole, puppy
Ice is frozen | water, iron, sand, wood
In winter the lake was covered with | ice, lava, bread, paint
At night the sky is lit by the | moon, grass, river, carpet
A doctor works in a | hospital, stable, bakery, lighthouse
A pupil learns to read at | school, sea, dinner, midnight
Books can be borrowed from a | library, pharmacy, garage, butcher
Trains stop at a | station, pillow, bottle, harbour
Ships are tied up in a | harbour, cupboard, garden, kitchen
An aeroplane lands at an | airport, orchard, opera, elevator
Teeth are cleaned with a | toothbrush, hammer, ladder, fork
Hair is cut by a | barber, baker, pilot, sailor
A broken tooth is treated by a | dentist, gardener, tailor, plumber
A leaking pipe is repaired by a | plumber, painter, singer, lawyer
Clothes are sewn by a | tailor, butcher, farmer, judge
A fire is put out by | firefighters, dancers, librarians, poets
Soup is eaten with a | spoon, comb, pencil, broom
The floor is swept with a | broom, spoon, violin, candle
A nail is driven in with a | hammer, pillow, spoon, brush
Time is shown by a | clock, chair, carpet, spoon
Temperature is measured with a | thermometer, ruler, compass, scale
The north can be found with a | compass, thermometer, blanket, kettle
Far stars can be seen through a | telescope, microscope, curtain, bucket
A photo is taken with a | camera, stove, hammer, shovel
To see in the dark, people switch on the | light, water, radio, fan
Grass is usually | green, purple, silver, transparent
Lemons taste | sour, salty, spicy, hollow
Sea water tastes | salty, sweet, sour, smoky
A triangle has three | sides, wheels, legs, petals
A spider has eight | legs, wings, ears, tails
A bicycle has two | wheels, roofs, engines, sails
Penguins cannot | fly, swim, eat, walk
Fish breathe through their | gills, fins, scales, tails
The heart pumps | blood, air, milk, bone
People hear with their | ears, knees, elbows, lips
Plants need water and | sunlight, plastic, silence, sugar
After dinner she washed the | dishes, clouds, stairs, stars
He was thirsty, so he drank some | water, sand, wool, paper
She was cold, so she put on a | coat, fan, plate, spoon
He was tired, so he went to | bed, lunch, war, sea
She was late, so she had to | hurry, wait, sleep, rest
"""


@dataclass(frozen=True)
class Choice:
    """A prompt that one of four options continues; right: its index."""

    kind: str
    prompt: str
    options: list[str]
    right: int


def pool(seed: int) -> list[Choice]:
    """All questions, kinds in turn as long as they last, with the right option at a random place; numbers are drawn by the seed."""
    rng = random.Random(f"questions {seed}")
    by_kind: dict[str, list[Choice]] = {kind: [] for kind in KINDS}
    for kind, prompt, right, wrong in [*_pairs(rng), *_categories(rng), *_orders(rng), *_numbers(rng), *_everyday()]:
        options = [right, *wrong]
        rng.shuffle(options)
        by_kind[kind].append(Choice(kind, prompt, options, options.index(right)))
    for those in by_kind.values():
        rng.shuffle(those)
    longest = max(map(len, by_kind.values()))
    return [those[i] for i in range(longest) for those in by_kind.values() if i < len(those)]


Raw = tuple[str, str, str, list[str]]


def _pairs(rng: random.Random) -> Iterator[Raw]:
    for kind, prompt, table in (
        ("capital", "Question: What is the capital of {0}?\nAnswer:", CAPITALS),
        ("opposite", 'Question: What is the opposite of "{0}"?\nAnswer:', OPPOSITES),
    ):
        pairs = [tuple(pair.replace("_", " ").split(":")) for pair in table.split()]
        for asked, right in pairs:
            yield kind, prompt.format(asked), right, rng.sample([other for _, other in pairs if other != right], 3)


def _categories(rng: random.Random) -> Iterator[Raw]:
    for right, members in CATEGORIES.items():
        for member in members.split():
            article = "An" if member[0] in "aeiou" else "A"
            start = f"{member.capitalize()}" if right in ("metal", "fabric", "vegetable") else f"{article} {member}"
            yield "category", f"{start} is a kind of", right, rng.sample([c for c in CATEGORIES if c != right], 3)


def _orders(rng: random.Random) -> Iterator[Raw]:
    for prompt, words in ORDERS.items():
        row = words.split()
        for i, word in enumerate(row[:-1]):
            # J and M follow a gap in the row of letters
            if len(word) == 1 and ord(row[i + 1]) != ord(word) + 1:
                continue
            others = [w for w in row if w not in (word, row[i + 1])]
            yield "order", prompt.format(word), row[i + 1], rng.sample(others, 3)


def _numbers(rng: random.Random) -> Iterator[Raw]:
    known = set()
    while len(known) < 50:
        if len(known) % 2:
            a, b = rng.randrange(2, 20), rng.randrange(2, 20)
            prompt, right = f"Question: What is {a} plus {b}?\nAnswer:", a + b
            wrong = rng.sample([n for n in range(max(2, right - 9), right + 10) if n != right], 3)
        else:
            right, *wrong = sorted(rng.sample(range(10, 100), 4), reverse=True)
            shown = rng.sample([right, *wrong], 4)
            prompt = f"Question: Which number is the largest: {shown[0]}, {shown[1]}, {shown[2]} or {shown[3]}?\nAnswer:"
        if prompt not in known:
            known.add(prompt)
            yield "number", prompt, str(right), [str(n) for n in wrong]


def _everyday() -> Iterator[Raw]:
    for line in EVERYDAY.strip().splitlines():
        prompt, options = line.split(" | ")
        right, *wrong = options.split(", ")
        yield "everyday", str(prompt), str(right), [str(option) for option in wrong]
