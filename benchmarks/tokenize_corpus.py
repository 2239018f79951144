"""Tokenizing the embedded corpus: smolctl, reading and writing included, against `encode_batch` in memory.

    python benchmarks/tokenize_corpus.py --rounds 3

Interleaved rounds in one process. Prints one JSON document; the ratio is encode_batch's time over ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from smolctl.config.run import DataConfig
from smolctl.data.text.corpus import open_sources
from smolctl.data.tokenizer.tokenizer import train_tokenizer
from smolctl.data.tokens.corpus import tokenize_corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=4096)
    arguments = parser.parse_args()
    data = DataConfig()
    sources = open_sources(data.source, data.text_field)
    texts = ["".join(document.pieces) for source in sources for document in source.read(lambda _: None)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = train_tokenizer(iter(texts), arguments.vocab_size)
    ours, theirs = [], []
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as cache:
            started = time.perf_counter()
            tokenize_corpus(data, tokenizer, Path(cache))
            ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        tokenizer.backend.encode_batch(texts, add_special_tokens=False)
        theirs.append(time.perf_counter() - started)
    ratios = [other / own for own, other in zip(ours, theirs, strict=True)]
    result = {
        "megabytes": round(megabytes, 2),
        "smolctl_mb_per_s": [round(megabytes / seconds, 2) for seconds in ours],
        "encode_batch_mb_per_s": [round(megabytes / seconds, 2) for seconds in theirs],
        "ratio": {
            "median": round(statistics.median(ratios), 2),
            "min": round(min(ratios), 2),
            "max": round(max(ratios), 2),
        },
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
