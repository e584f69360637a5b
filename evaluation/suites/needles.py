"""A needle in a haystack: a sentence hidden in real prose, and a question that only this sentence answers."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from ...recipes.profiling.material.needles import Needle, make_sample, question_about, recall
from ..material import prose
from ..metrics.sums import Sums, ratio
from ..subject import Subject
from .base import Item, Suite

FORMS = (
    ("The password of the observatory at {p} is {a}.", "What is the password of the observatory at {p}?"),
    ("The treasure of {p} is hidden under {a}.", "What is the treasure of {p} hidden under?"),
    ("The best gift for a visitor from {p} is {a}.", "What is the best gift for a visitor from {p}?"),
    ("The winner of the {p} fair was paid with {a}.", "What was the winner of the {p} fair paid with?"),
    ("The flag of the harbour of {p} shows {a}.", "What does the flag of the harbour of {p} show?"),
)  # fmt: skip
PLACES = (
    "Ostermoor,Tellin,Morrow,Fenbury,Marrowdale,Brackwell,Hollin,Sandmere,Wexcombe,Thornby,Aldery,Quillan,Norbeck,Velmar,Dunholt,"
    "Eskdale,Lorring,Pellwick,Ravensea,Stavely"
)
NUMBERS = "two,three,four,five,six,seven,eight,nine,ten,twelve"
LOOKS = "yellow,broken,silver,wooden,painted,crooked,golden,dusty,frozen,striped,purple,rusty"
THINGS = "lanterns,violins,pears,ladders,bottles,kettles,ribbons,candles,baskets,mirrors,anchors,feathers,hammers,pillows"
LONGEST_ANSWER, LONGEST_SENTENCE = 24, 160


class Needles(Suite):
    name: ClassVar[str] = "needles"
    kind: ClassVar = "llm"
    does: ClassVar[str] = "Finds one sentence in a long text (needle in a haystack): words of the answer that come back."
    shown: ClassVar[Sequence[str] | None] = ("recall", "found")
    batch: ClassVar[int] = 8

    lengths: tuple[int, ...] = Field((120, 240, 360), min_length=1, description="tokens of the text; as many items of each")
    last: int | None = Field(
        None, ge=1, description="give the model only the last so many tokens of each text, the plain way to save on a long one"
    )
    asked_first: bool = Field(False, description="ask the question before the text too, as one would without any recipe")
    rivals: int = Field(2, ge=0, le=10, description="sentences of the same form about other places, hidden in the same text")

    def items(self, count: int, seed: int) -> list[Item]:
        items = []
        for i in range(count):
            rng = random.Random(f"needles {seed} {i}")
            form, places = rng.randrange(len(FORMS)), rng.sample(PLACES.split(","), self.rivals + 1)
            answers: list[str] = []
            while len(answers) <= self.rivals:
                answer = " ".join(rng.choice(words.split(",")) for words in (NUMBERS, LOOKS, THINGS))
                # no answer shares a word with another one, so that a rival's words are not counted as found
                if not any(set(answer.split()) & set(other.split()) for other in answers):
                    answers.append(answer)
            data = {
                "form": form, "places": places, "answers": answers, "length": self.lengths[i % len(self.lengths)],
                "depth": round(rng.random(), 3), "seed": rng.randrange(2**31),
            }  # fmt: skip
            items.append(Item(f"{seed}-{i}", data))
        # texts of one length together, so that batches need little padding
        return sorted(items, key=lambda item: item.data["length"])

    def prompt(self, tokenizer: Any, item: Item) -> tuple[Needle, str]:
        """The needle of an item and the prompt that hides it, as many tokens long as the item says for this tokenizer."""
        data = item.data
        sentence, question = FORMS[data["form"]]
        facts = [sentence.format(p=p, a=a) for p, a in zip(data["places"], data["answers"])]
        needle = Needle(facts[0], question.format(p=data["places"][0]), data["answers"][0])

        def haystack(seed: str) -> Iterator[str]:
            rng, prose_of, rest = random.Random(seed), prose.sentences(seed), list(facts[1:])
            while True:
                # a long sentence would leave a short text without any
                yield next(sentence for sentence in prose_of if len(sentence) <= LONGEST_SENTENCE)
                if rest and rng.random() < 0.5:
                    yield rest.pop()

        sample = make_sample(tokenizer, data["length"], data["depth"], needle, data["seed"], haystack)
        if self.last is None and not self.asked_first:
            return needle, sample.prompt
        lead = f"{needle.question}\n\n" if self.asked_first else ""
        return needle, question_about(tokenizer, lead + sample.text[self.cut(tokenizer, sample.text) :], needle)

    def cut(self, tokenizer: Any, text: str) -> int:
        """Where in the text its last tokens begin, in characters."""
        if self.last is None:
            return 0
        starts = [
            start for start, _ in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        ]
        return starts[-self.last] if len(starts) > self.last else 0

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        hidden = [self.prompt(subject.tokenizer, item) for item in items]
        texts = subject.generate([prompt for _, prompt in hidden], max_new_tokens=LONGEST_ANSWER)
        return [
            {
                "wanted": needle.answer, "said": text.strip().split("\n")[0], "length": item.data["length"],
                "depth": item.data["depth"],
            }
            for (needle, _), text, item in zip(hidden, texts, items)
        ]  # fmt: skip

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        share = recall(record["wanted"], record["said"])
        found = re.sub(r"\W+", " ", record["wanted"].lower()) in re.sub(r"\W+", " ", record["said"].lower())
        third = ("first", "middle", "last")[min(2, int(record["depth"] * 3))]
        return {
            "asked": 1, "recall": share, "found": found, f"asked {third}": 1, f"recall {third}": share,
            f"asked {record['length']}": 1, f"recall {record['length']}": share,
        }  # fmt: skip

    def metrics(self, sums: Sums) -> dict[str, Any]:
        parts = ["first", "middle", "last", *(str(length) for length in self.lengths)]
        return {
            "recall": ratio(sums["recall"], sums["asked"]),
            "found": ratio(sums["found"], sums["asked"]),
            **{f"recall_{part}": ratio(sums[f"recall {part}"], sums[f"asked {part}"]) for part in parts},
        }
