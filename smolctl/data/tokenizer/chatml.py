"""ChatML, for models without a chat template."""

from __future__ import annotations

from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.errors import InputError

TURN_BEGIN, TURN_END = "<|im_start|>", "<|im_end|>"
# Like SmolLM2-Instruct's, but without its default system message.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def with_chatml(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with ChatML as its template; the end-of-turn token is its end-of-sequence token.

    Raises:
        InputError: it has no tokens for the start and the end of a turn.
    """
    end = tokenizer.backend.token_to_id(TURN_END)
    if end is None or tokenizer.backend.token_to_id(TURN_BEGIN) is None:
        raise InputError(
            f"there is no chat template, and the tokenizer has no {TURN_BEGIN} and {TURN_END} for ChatML",
            "Start from a chat model, from SmolLM2, or from a run with --tokenizer train:N.",
        )
    ids = tokenizer.bos_token_id, end, tokenizer.pad_token_id
    named = {**tokenizer.named_tokens, "eos_token": TURN_END}
    ends = tokenizer.files().end_token_ids
    return Tokenizer(tokenizer.backend, CHATML, *ids, ends, named)
