"""Words that are looked up have the ids that the tokenizer gives to the whole text."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from smolctl.data.tokenizer import word_encoder
from smolctl.data.tokenizer.text_encoder import TextEncoder
from smolctl.data.tokenizer.tokenizer import Tokenizer
from tests.support.tokenizers import MAKERS, tokenizer

LOOKED_UP = ("smollm", "gpt2", "gpt2 and added tokens")
PLAIN = [*"\n\n\n    \t\r\v\f\x1c\x00\x7f", *"ab'sdtl01.!-<|>_", " the", "'ll"]
OTHERS = [*"éß界🎉²½Ⅷ一\u0301\u200d\ufeff▁。", *"\x85\xa0\u2028\u3000\u180e"]


def encoder(kind: str) -> TextEncoder:
    return TextEncoder(Tokenizer(tokenizer(kind), eos_token_id=0))


def ids(of: TextEncoder, text: str) -> list[int]:
    return [token for found in of.encode(list(of.pieces([text]))) for token in found.tolist()]


@pytest.mark.parametrize("kind", LOOKED_UP)
@given(text=st.lists(st.sampled_from([*PLAIN, *PLAIN, *OTHERS]), max_size=24).map("".join))
@example(text="b\n\nⅧ\n ")  # as for the three below: what the white space before another character is
@example(text="a  🎉0 ²\r\n½")
@example(text="b  \xa0c")
@example(text="a  <|endoftext|>")
def test_ids_are_those_of_the_whole_text(kind: str, text: str) -> None:
    of = encoder(kind)
    assert ids(of, text) == of._backend.encode(text, add_special_tokens=False).ids


def test_only_tokenizers_that_divide_as_gpt2_look_words_up() -> None:
    assert {kind for kind in MAKERS if encoder(kind)._words is not None} == set(LOOKED_UP)


def test_a_word_is_encoded_once_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_encoder, "_KEPT", 100)
    of = encoder("gpt2")
    words = of._words
    assert words is not None
    texts = [" ".join(f"w{chr(97 + n % 7)}{n}" for n in range(first, first + 10)) for first in range(200)]
    for text in texts:
        assert ids(of, text) == of._backend.encode(text, add_special_tokens=False).ids
        assert sum(map(len, words._known)) <= 100 + len(text)
    assert set(words._known) >= set(words._division.findall(texts[-1]))
