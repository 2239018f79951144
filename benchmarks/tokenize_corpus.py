"""Tokenizing a corpus with smolctl and with `datasets.map`, from a file to tokens on the disk.

    pip install datasets
    python benchmarks/tokenize_corpus.py --rounds 3
    python benchmarks/tokenize_corpus.py --rounds 3 --copies 8   # who needs more memory for a larger corpus?

Both read the embedded corpus as JSON lines, encode it on all cores and write the ids. `datasets` maps batches
of 1,000 rows through the fast tokenizer of transformers, as its documentation says, once in one process whose
tokenizer uses all cores and once in a process for each core; the packing into sequences that it needs after
that is left out. Both are compared with `encode_batch` of the tokenizers package, in memory. They take turns,
each time in a new process, after its imports. Peak memory is that of this process and that of its largest
child process. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from smolctl.config.data import DataConfig
from smolctl.data.text.corpus import iter_texts
from smolctl.data.tokenizer.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from smolctl.timing import Ratio, in_turns, ratio_of

Found = dict[str, Any]


def smolctl(corpus: Path, tokenizer: Tokenizer, out: Path) -> int:
    """Tokens that smolctl writes."""
    from smolctl.data.tokens.corpus import tokenize_corpus

    return tokenize_corpus(DataConfig(source=(str(corpus),)), tokenizer, out).tokens


def datasets_map(corpus: Path, tokenizer: Tokenizer, out: Path, processes: int | None = None) -> int:
    """Tokens that `datasets.map` writes."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=str(corpus), cache_dir=str(out), split="train")

    def encode(batch: Mapping[str, list[str]]) -> dict[str, Any]:
        found = fast(batch["text"], add_special_tokens=False, return_attention_mask=False)
        return {"ids": found["input_ids"], "tokens": [len(ids) for ids in found["input_ids"]]}

    mapped = rows.map(encode, batched=True, remove_columns=["text"], num_proc=processes)
    return int(sum(mapped["tokens"]))


def encode_batch(corpus: Path, tokenizer: Tokenizer, out: Path) -> int:
    """Tokens that the tokenizers package makes of texts in memory."""
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    return sum(len(one.ids) for one in tokenizer.backend.encode_batch(texts, add_special_tokens=False))


CORES = len(os.sched_getaffinity(0))
SIDES: Mapping[str, Callable[[Path, Tokenizer, Path], int]] = {
    "smolctl": smolctl,
    "datasets.map": datasets_map,
    f"datasets.map, {CORES} processes": partial(datasets_map, processes=CORES),
    "encode_batch": encode_batch,
}


def measure(side: str, corpus: Path, tokenizer: Path) -> Found:
    """One run in this process, whose imports are made first."""
    loaded = load_tokenizer(str(tokenizer))
    for module in ("datasets", "transformers") if "datasets" in side else ("smolctl.data.tokens.corpus",):
        __import__(module)
    with tempfile.TemporaryDirectory(dir=corpus.parent) as out:
        before, started = os.times(), time.perf_counter()
        tokens = SIDES[side](corpus, loaded, Path(out))
        seconds, after = time.perf_counter() - started, os.times()
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(after[:4]) - sum(before[:4])
    return {"tokens": tokens, "seconds": seconds, "cpu": cpu, "peak_mb": [kb / 1e3 for kb in peaks]}


def in_new_process(side: str, corpus: Path, tokenizer: Path) -> Found:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--side", side, str(corpus), str(tokenizer)]
    found: Found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(side, found, file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--copies", type=int, default=1, help="of the embedded corpus")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side, corpus_name, tokenizer_name = arguments.side
        print(json.dumps(measure(side, Path(corpus_name), Path(tokenizer_name))))
        return
    with tempfile.TemporaryDirectory() as name:
        texts = list(iter_texts(DataConfig()))
        train_tokenizer(iter(texts), arguments.vocab_size).backend.save(f"{name}/tokenizer.json")
        with Path(name, "corpus.jsonl").open("w", encoding="utf-8") as file:
            for copy in range(arguments.copies):
                for text in texts:
                    file.write(f"{json.dumps({'text': f'{copy} {text}' if copy else text})}\n")
        corpus, tokenizer = Path(name, "corpus.jsonl"), Path(name, "tokenizer.json")
        works = [partial(in_new_process, side, corpus, tokenizer) for side in SIDES]
        measured = dict(zip(SIDES, in_turns(works, arguments.rounds, warmups=0), strict=True))
        megabytes = arguments.copies * sum(len(text.encode()) for text in texts) / 1e6

    def faster(than: str, what: str) -> Ratio:
        return ratio_of(*([float(run[what]) for run in measured[side]] for side in (than, "smolctl")))

    result = {
        "megabytes": round(megabytes, 2),
        "sides": {
            side: {
                "mb_per_s": round(megabytes / median(run["seconds"] for run in runs), 2),
                "tokens": runs[0]["tokens"],
                "peak_mb": [
                    round(max(peaks)) for peaks in zip(*(run["peak_mb"] for run in runs), strict=True)
                ],
            }
            for side, runs in measured.items()
        },
        "smolctl_is_faster": {
            side: {what: vars(faster(side, what).spread) for what in ("seconds", "cpu")}
            for side in SIDES
            if side != "smolctl"
        },
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
