"""CTranslate2; its logits come from a pass over all tokens at once."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path

import ctranslate2
import numpy as np
from serve_engine import Run, Tokens, main


def load(model: str, threads: int) -> Run:
    generator = ctranslate2.Generator(model, device="cpu", compute_type="auto", intra_threads=threads)
    names = json.loads((Path(model) / "vocabulary.json").read_text(encoding="utf-8"))

    def run(tokens: Tokens, prompt: int, file: str) -> float:
        if file:
            found = np.asarray(generator.forward_batch([list(tokens[0])]))
            found[0, prompt:].astype(np.float32).tofile(file)
            return 0.0
        wanted = len(tokens[0]) - prompt + 1
        times: list[float] = []

        def note(_step: object) -> bool:
            times.append(time.perf_counter())
            return False

        started = time.perf_counter()
        found = generator.generate_batch(
            [[names[one] for one in ids[:prompt]] for ids in tokens],
            max_length=wanted,
            min_length=wanted,
            include_prompt_in_result=False,
            callback=note,
        )
        ended = time.perf_counter()
        assert [len(one.sequences_ids[0]) for one in found] == [wanted] * len(tokens)
        return ended - (times[0] if wanted > 1 else started)

    return run


def make(source: Path, target: Path, scheme: str) -> None:
    """From a Hugging Face folder."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(source)).convert(str(target), quantization=scheme)


if __name__ == "__main__":
    main(load, version("ctranslate2"), make)
