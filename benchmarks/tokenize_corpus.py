"""Tokenizing the embedded corpus: smolctl, reading and writing included, against `encode_batch` in memory.

    python benchmarks/tokenize_corpus.py --rounds 3

Interleaved rounds in one process. Prints one JSON document; the ratio is encode_batch's time over ours.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

from smolctl.benchmark.limits import fastest_run
from smolctl.config.run import DataConfig
from smolctl.data.text.corpus import open_sources
from smolctl.data.tokenizer.tokenizer import train_tokenizer
from smolctl.data.tokens.corpus import tokenize_corpus
from smolctl.timing import in_turns, ratio_of


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=4096)
    arguments = parser.parse_args()
    data = DataConfig()
    sources = open_sources(data)
    texts = ["".join(document.chunks) for source in sources for document in source.read(lambda _: None)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = train_tokenizer(iter(texts), arguments.vocab_size)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as cache:
            tokenize_corpus(data, tokenizer, Path(cache))

    def theirs() -> None:
        tokenizer.backend.encode_batch(texts, add_special_tokens=False)

    works = [partial(fastest_run, work) for work in (ours, theirs)]
    own, other = in_turns(works, arguments.rounds, warmups=0)
    of = ratio_of(other, own).spread
    result = {
        "megabytes": round(megabytes, 2),
        "smolctl_mb_per_s": [round(megabytes / seconds, 2) for seconds in own],
        "encode_batch_mb_per_s": [round(megabytes / seconds, 2) for seconds in other],
        "ratio": {"median": round(of.median, 2), "min": round(of.low, 2), "max": round(of.high, 2)},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
