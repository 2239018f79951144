"""The tokens that end an answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from smolctl.config import ModelConfig

# Added tokens that always end an answer: those of llama.cpp (`special_eog_ids` in its llama-vocab.cpp) that
# end a turn or a text.
END_TOKENS = {
    *("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]"),
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<end_of_utterance>"),
    *("<EOT>", "_<EOT>", "[EOT]"),
}


def stop_token_ids(config: ModelConfig, named: Iterable[int], added: Mapping[int, str]) -> frozenset[int]:
    """All ids at which an answer of a model ends.

    Args:
        config: of the model.
        named: ids that its tokenizer, its generation config or its GGUF declare as ends.
        added: added tokens of the tokenizer, by their text.
    """
    known = (token_id for token_id, token in added.items() if token in END_TOKENS)
    return frozenset({*config.eos_token_ids, *named, *known})
