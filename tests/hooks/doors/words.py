"""Half the attention to one word of the prompt, in one of two prompts."""

from reattend.hooks import Edits, Plan, Words, attach, sites
from reattend.interventions import Gain
from tiny_pipelines import stable_diffusion
from tiny_runs import draw


def use() -> None:
    pipe, call = stable_diffusion(), {"prompt": ["a red fox", "a blue map"], "guidance_scale": 4.0}
    found = []

    def less(at):
        found.append(at.columns("objects"))  # bool [batch, text columns], on conditional rows
        return Gain(columns=at.columns("objects.0"), factor=0.5, renormalise=None)

    words = Words("objects", [["red"], ["map"]])
    with attach(pipe, [Plan("less", [words, Edits(sites(pipe).stack("denoiser").kind("cross"), less)])]):
        draw(pipe, call)
    read = [pipe.tokenizer(text)["input_ids"] for text in call["prompt"]]
    columns = [found[0][row].nonzero()[:, 0] for row in (2, 3)]
    assert not found[0][:2].any(), "nothing in the negative prompts"
    assert [pipe.tokenizer.decode([ids[i] for i in at]).strip() for ids, at in zip(read, columns)] == ["red", "map"]
