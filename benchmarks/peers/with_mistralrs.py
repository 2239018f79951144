"""mistral.rs; it takes text, and says itself how long it took."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import mistralrs
from serve_engine import Run, Tokens, main


def load(model: str, threads: int) -> Run:
    """A GGUF; the tokenizer is in it. RAYON_NUM_THREADS holds the number of threads."""
    path = Path(model)
    which = mistralrs.Which.GGUF(quantized_model_id=str(path.parent), quantized_filename=path.name)
    runner = mistralrs.Runner(which, prefix_cache_n=0)

    def run(tokens: Tokens, prompt: int, file: str) -> float:
        if file or len(tokens) > 1:
            raise RuntimeError("its Python package gives no logits, and takes one request at a time")
        wanted = len(tokens[0]) - prompt
        request = mistralrs.CompletionRequest(
            prompt=runner.detokenize_text(list(tokens[0][:prompt]), skip_special_tokens=False),
            model="default",
            max_tokens=wanted + 1,
            temperature=0.0,
            ignore_eos=True,
        )
        usage = runner.send_completion_request(request).usage
        if wanted:
            return float(usage.total_completion_time_sec * wanted / usage.completion_tokens)
        return float(usage.total_prompt_time_sec * prompt / usage.prompt_tokens)

    return run


if __name__ == "__main__":
    main(load, version("mistralrs"))
