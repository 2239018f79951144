"""ONNX Runtime GenAI, with a folder that its model builder has written."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime_genai
from serve_engine import Run, Tokens, main


def load(model: str, threads: int) -> Run:
    config = onnxruntime_genai.Config(model)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    loaded = onnxruntime_genai.Model(config)

    def run(tokens: Tokens, prompt: int, file: str) -> float:
        settings = onnxruntime_genai.GeneratorParams(loaded)
        length = len(tokens[0])
        settings.set_search_options(
            do_sample=False, batch_size=len(tokens), max_length=length + 1, min_length=length + 1
        )
        generator = onnxruntime_genai.Generator(loaded, settings)
        ids = np.array(tokens, dtype=np.int32)
        kept = []
        started = time.perf_counter()
        generator.append_tokens(ids[:, :prompt])
        generator.generate_next_token()
        if file:
            generator.rewind_to(prompt)
            for at in range(prompt, length):
                generator.append_tokens(ids[:, at : at + 1])
                kept.append(generator.get_logits().reshape(-1, generator.get_logits().shape[-1])[-1:])
            np.concatenate(kept).astype(np.float32).tofile(file)
        elif prompt < length:
            started = time.perf_counter()
            for _ in range(prompt, length):
                generator.generate_next_token()
        return time.perf_counter() - started

    return run


def make(source: Path, target: Path, scheme: str) -> None:
    """From a Hugging Face folder; activations in 8 bits, the builder's advice for a CPU."""
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(target)]
    options = ["accuracy_level=4", "block_size=32"]
    command = [*builder, "-p", scheme, "-e", "cpu", "-c", str(target), "--extra_options", *options]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main(load, version("onnxruntime-genai"), make)
