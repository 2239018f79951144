"""Prompt lookup compared with plain decoding: accepted tokens and speed on three kinds of text.

    python benchmarks/speculation.py MODEL --rounds 5

MODEL has a chat template. Each kind of text has its own prompts; decoding with and without drafts takes turns
in every round, and must give the same text. Prints a Markdown table: drafted and accepted tokens, tokens per
call of the model, and the ratio of decoding speeds.
"""

from __future__ import annotations

import argparse
import inspect
import textwrap
from dataclasses import replace
from functools import partial

from smolctl.data.tokenizer.prompt import Prompt
from smolctl.generation.complete import CompletionSettings, complete
from smolctl.generation.load import LoadedModel, load_model
from smolctl.generation.sampling import SamplingSettings
from smolctl.timing import Spread, in_turns

TOKENS = 160


def prompts(model: LoadedModel) -> dict[str, list[Prompt]]:
    """Three kinds: a text to repeat with changes, code to continue, and free answers."""
    passage = inspect.cleandoc(str.format.__doc__ or "") + " " + inspect.cleandoc(str.join.__doc__ or "")

    def chat(request: str) -> Prompt:
        return model.chat_prompt([{"role": "user", "content": request}])

    text = model.tokenizer.prompt
    return {
        "repeat and edit": [
            chat(f"Repeat this text and correct its spelling, change nothing else:\n\n{passage}"),
            chat("Rewrite this list in the same order, one a line: " + ", ".join(sorted(dir(str))[:12:-1])),
        ],
        "code": [
            text(inspect.getsource(textwrap.dedent)),
            text("class Stack:\n    def push(self, item):\n        self.items.append(item)\n"),
        ],
        "free answer": [
            chat("Tell me a story about a lighthouse keeper who finds a letter."),
            chat("Why is the sky blue? Explain it to a child."),
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.0)
    options = parser.parse_args()
    model = load_model(options.model)
    plain = CompletionSettings(
        speculation="off", max_tokens=TOKENS, sampling=SamplingSettings(temperature=options.temperature)
    )
    lookup = replace(plain, speculation="lookup")
    print(f"{options.model}: {model.engine.name}\n")
    print("| text | drafted | accepted | tokens per call | speed with / without drafts |")
    print("|---|---|---|---|---|")
    for kind, texts in prompts(model).items():
        drafted = accepted = tokens = calls = 0
        ratios = []
        for prompt in texts:
            works = [partial(complete, model.engine, model.tokenizer, prompt, one) for one in (plain, lookup)]
            for without, drafting in zip(*in_turns(works, options.rounds), strict=True):
                text, expected = drafting.completions[0].tokens, without.completions[0].tokens
                assert text == expected, f"another text: {text} instead of {expected}"
                speeds = drafting.timing.decode_tokens_per_s, without.timing.decode_tokens_per_s
                if speeds[0] and speeds[1]:
                    ratios.append(speeds[0] / speeds[1])
            drafted += drafting.timing.guessed_tokens
            accepted += drafting.timing.accepted_tokens
            tokens, calls = tokens + len(text) - 1, calls + drafting.timing.decode_steps
        of = Spread.of(ratios)
        spread = f"{of.median:.2f} ({of.low:.2f}–{of.high:.2f})"
        print(f"| {kind} | {drafted} | {accepted} | {tokens / calls:.2f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
