"""OpenVINO GenAI; logits from the same model in OpenVINO's own runtime, which the pipeline does not give."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
from serve_engine import Run, Tokens, main


def load(model: str, threads: int) -> Run:
    """A folder in OpenVINO's format."""
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    pipeline = openvino_genai.LLMPipeline(model, "CPU", **settings)

    def run(tokens: Tokens, prompt: int, file: str) -> float:
        if file:
            return logits(Path(model), threads, tokens[0], prompt, file)
        ids = np.array([sequence[:prompt] for sequence in tokens], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        wanted = len(tokens[0]) - prompt
        config = openvino_genai.GenerationConfig(max_new_tokens=wanted + 1, ignore_eos=True, do_sample=False)
        started = time.perf_counter()
        found = pipeline.generate(inputs, config)
        elapsed = time.perf_counter() - started
        assert [len(one) for one in found.tokens] == [wanted + 1] * len(tokens)
        first = found.perf_metrics.get_ttft().mean / 1000
        return elapsed - first if wanted else elapsed

    return run


def make(source: Path, target: Path, scheme: str) -> None:
    """From a GGUF in float16, then by NNCF: int8 as optimum-intel does by default, int4 in groups of 32."""
    target.mkdir(parents=True)
    (target / source.name).symlink_to(source.absolute())  # the model is written beside what was read
    openvino_genai.LLMPipeline(target / source.name, "CPU", enable_save_ov_model=True)
    if scheme == "float16":
        return
    import nncf

    how = {
        "int8": {"mode": nncf.CompressWeightsMode.INT8_ASYM},
        "int4": {"mode": nncf.CompressWeightsMode.INT4_ASYM, "group_size": 32, "all_layers": True},
    }
    path = target / "openvino_model.xml"
    compressed = nncf.compress_weights(openvino.Core().read_model(path), **how[scheme])
    openvino.save_model(compressed, target / "compressed.xml")
    for ending in ("xml", "bin"):
        (target / f"compressed.{ending}").rename(path.with_suffix(f".{ending}"))


def logits(folder: Path, threads: int, tokens: Sequence[int], prompt: int, file: str) -> float:
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", settings)
    request = compiled.create_infer_request()
    names = {name for one in request.model_inputs for name in one.names}
    kept = []
    for start, end in [(0, prompt), *((at, at + 1) for at in range(prompt, len(tokens)))]:
        given = {
            "input_ids": np.array([tokens[start:end]], dtype=np.int64),
            "attention_mask": np.ones((1, end), dtype=np.int64),
            "position_ids": np.arange(start, end, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        found = request.infer({name: value for name, value in given.items() if name in names})
        kept.append(np.asarray(next(iter(found.values())))[:, -1].astype(np.float32))
    np.concatenate(kept[1:]).tofile(file)
    return 0.0


if __name__ == "__main__":
    main(load, version("openvino-genai"), make)
