"""Where a passage stands in a prompt, and a bias towards it."""

from reattend.hooks import Edits, Plan, Spans, attach, sites
from reattend.interventions import KeyBias
from tiny_language import language_model, tokenizer


def use() -> None:
    model, words = language_model(), tokenizer()
    prompt, marked = words("Anna has a red house and Paul has a blue garden", return_tensors="pt"), []

    def towards(call):
        marked.append(call.columns("passage"))  # bool [batch, keys]
        return KeyBias(bias=1.5 * call.columns("passage"))

    plan = Plan("look there", [Spans("passage", texts=[["red house"]]), Edits(sites(model), towards)])
    with attach(model, [plan], tokenizer=words):
        model(**prompt)
    assert words.decode(prompt["input_ids"][0][marked[0][0]]).strip() == "red house"
