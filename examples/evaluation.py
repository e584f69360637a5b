"""Do recipes help? A suite of your own, asked of a model plain and under recipes, with intervals and paired changes.

    python examples/evaluation.py                                   # SmolLM2 from its package, see the README
    python examples/evaluation.py --model owner/name --recipes none,emphasise,emphasise:alpha=0.1 --count 100

The questions hold two contradicting notes, and the recipe is told to look at the second one. A suite says what is asked, how a record
is counted and what the metrics are; everything else (batches, resuming, intervals, several processes) is the package's.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from typing import Any

import reattend
from reattend.comparison.loading import load
from reattend.evaluation import Evaluation, Item, Subject, Suite
from reattend.evaluation.suites import Sums, ratio

NAMES, PLACES = ("Anna", "Peter", "Laura", "Simon", "Helen"), ("Rome", "Oslo", "Cairo", "Lima", "Kyoto", "Dublin")


class Notes(Suite):
    name = "notes"
    kind = "llm"
    does = "Two notes name different places; right is the place of the second, which is marked."
    shown = ("second", "first")
    lower = ("first",)
    marks = ("highlight",)

    def items(self, count: int, seed: int) -> list[Item]:
        found = []
        for number in range(count):
            chance = random.Random(f"{seed}-{number}")
            first, second = chance.sample(PLACES, 2)
            data = {"who": chance.choice(NAMES), "first": first, "second": second}
            found.append(Item(f"{seed}-{number}", data))
        return found

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        marked = [f"A later note says that {item.data['who']} lives in {item.data['second']}." for item in items]
        prompts = [
            subject.chat(
                f"A note says that {d['who']} lives in {d['first']}. {note} Where does {d['who']} live? Name the city.",
                answer=f"{d['who']} lives in",
            )
            for d, note in zip((item.data for item in items), marked)
        ]
        with subject.marked(highlight=[[note] for note in marked]):
            said = subject.generate(prompts, max_new_tokens=4)
        return [{"said": text, **item.data} for text, item in zip(said, items)]

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        return {"asked": 1, **{which: float(record[which] in record["said"]) for which in ("first", "second")}}

    def metrics(self, sums: Sums) -> dict[str, Any]:
        return {which: ratio(sums[which], sums["asked"]) for which in ("second", "first")}


def main(arguments: list[str] | None = None, model: Any = None) -> Evaluation:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a hub id, a folder, or smollm2")
    parser.add_argument("--recipes", default="none,emphasise,emphasise:alpha=0.1", help="variants, parted by commas")
    parser.add_argument("--count", type=int, default=40, help="how many questions")
    parser.add_argument("--out", help="folder for answers and results: a second run goes on there")
    options = parser.parse_args(arguments)

    pipe = model if model is not None else load(options.model)
    result = reattend.evaluate(pipe, Notes(), options.recipes, count=options.count, out=options.out)
    result.print()
    return result


if __name__ == "__main__":
    main()
