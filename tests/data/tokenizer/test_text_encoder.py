"""A long text, cut and encoded piece by piece, has the ids of the whole; special tokens in it are text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolctl.config.data import DataConfig
from smolctl.data.tokenizer.text_encoder import TextEncoder
from smolctl.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from smolctl.data.tokens.corpus import tokenize_corpus
from tests.support.tokenizers import MAKERS, WITHOUT_PLACES, tokenizer

# What a cut could spoil: white space of all kinds, contractions, digits, marks, spelled tokens.
ODD = st.text(
    st.sampled_from(
        [
            *"\n\n\n\n  \t\r\v\x1c\x85\xa0\u2028\u3000",
            *"ab'sdtl",
            *"019²½",
            *".!-<|>",
            *"é\u0301界🎉ß\u200d▁。",
        ]
    ),
    max_size=12,
)
WORDS = st.sampled_from(
    ["the", "river", "old", "long hill", "cats!", "[old]", "twice", "every", "</s>", "<|endoftext|>", "[SEP]"]
)
TEXTS = st.lists(st.one_of(ODD, WORDS), max_size=60).flatmap(
    lambda parts: st.sampled_from(["", " ", "\n"]).map(lambda between: between.join(parts))
)
PROSE = (
    "The river crosses every window, and the old clock watches the long hill. 12 cats! twice\n"
    "Größe 界面。\nund Straße,  d'll\n\n\tdef f(x): <s> [old] </s> <|endoftext|>\n"
) * 40


def encoder(kind: str, special_tokens: Any = "text") -> TextEncoder:
    return TextEncoder(Tokenizer(tokenizer(kind), eos_token_id=2), special_tokens)


def in_pieces(of: TextEncoder, text: str, size: int) -> list[int]:
    pieces = list(of.pieces([text[:100], text[100:]], size))
    assert "".join(piece.text for piece in pieces) == text
    return [token for ids in of.encode(pieces) for token in ids]


def at_once(of: TextEncoder, text: str) -> list[int]:
    ids: list[int] = of._backend.encode(text, add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize("special_tokens", ["text", "tokens"])
@pytest.mark.parametrize("kind", MAKERS)
@given(text=TEXTS, size=st.integers(1, 60))
def test_pieces_have_the_ids_of_the_whole_text(kind: str, special_tokens: str, text: str, size: int) -> None:
    of = encoder(kind, special_tokens)
    assert in_pieces(of, text, size) == at_once(of, text)


@pytest.mark.parametrize("kind", MAKERS)
def test_long_texts_are_cut_where_the_tokenizer_has_a_safe_place(kind: str) -> None:
    of = encoder(kind)
    assert in_pieces(of, PROSE, 300) == at_once(of, PROSE)
    pieces = list(of.pieces([PROSE], 300))
    if kind in WITHOUT_PLACES:
        assert len(pieces) == 1
    else:
        assert len(pieces) > len(PROSE) / 500


@pytest.mark.parametrize(
    "settings", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}]
)
@pytest.mark.parametrize("kind", ["smollm", "gpt4", "llama", "llama first", "t5", "bert"])
def test_shards_hold_what_transformers_gives_for_the_whole_text(
    kind: str, settings: dict[str, bool], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    special = tokenizer(kind).get_added_tokens_decoder()
    first, last = (0, 0) if kind in ("smollm", "gpt4") else (1, 2)
    Tokenizer(tokenizer(kind), bos_token_id=first, eos_token_id=last).save(tmp_path / "tokenizer")
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    text = PROSE.replace("<", "(") * 20  # without the spelled tokens, which transformers takes for real ones
    for token in special.values():
        assert token.content not in text
    (tmp_path / "a.txt").write_text(text)
    data = DataConfig(source=(str(tmp_path / "a.txt"),), sequence_length=16, validation_fraction=0)
    ours = load_tokenizer(str(tmp_path / "tokenizer"))
    corpus = tokenize_corpus(data, ours, tmp_path / "cache")
    whole = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")(text)["input_ids"]
    end = [] if whole[-1] == ours.end_of_text_id else [ours.end_of_text_id]
    tokens = corpus.train.parts[0].tokens
    assert tokens.read(0, len(tokens)).tolist() == whole + end


@pytest.mark.parametrize("kind", MAKERS)
def test_spelled_special_tokens_are_text_unless_they_are_meant(kind: str) -> None:
    special = {i: t.content for i, t in tokenizer(kind).get_added_tokens_decoder().items() if t.special}
    text = "a " + " ".join(f"{token} {token}b" for token in special.values())
    unknown = {i for i, token in special.items() if token in ("<unk>", "[UNK]")}  # of what no entry spells
    as_text, as_tokens = encoder(kind, "text"), encoder(kind, "tokens")
    (piece,) = as_text.pieces([text])
    assert piece.special_tokens == 2 * len(special)
    assert not set(special).difference(unknown).intersection(*as_text.encode([piece]))
    (ids,) = as_tokens.encode(list(as_tokens.pieces([text])))
    assert set(special) <= set(ids)
