"""Decoding and prefill against llama.cpp and transformers: speed, KL and memory, on the same weights.

    pip install llama-cpp-python          the rival; transformers is there already
    python benchmarks/decode.py MODEL.gguf --rounds 5

MODEL is a Llama-shaped GGUF. smolctl and llama.cpp make their formats of it; every engine reads the same
prompt and continues greedily. All engines are loaded at once and take turns, round by round, so that a ratio
of a round compares neighbours in time. KL is against transformers in float32. Memory is of a fresh process
that loads the model, reads the prompt and decodes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

PROMPT, TOKENS, LONG_PROMPT = 32, 128, 512
CONTEXT, CONTEXT_TOKENS = 1920, 64  # decoding behind a long text
KL_WINDOW = 512
PAIRS = (("bf16", "llama.cpp bf16"), ("int8", "llama.cpp q8_0"), ("int4", "llama.cpp q4_1"))


@dataclass
class Runner:
    """One engine: `reset`, then `read` tokens and get the logits after the last, or after each."""

    name: str
    reset: Callable[[], None]
    read: Callable[[Sequence[int], bool], np.ndarray]
    slow: bool = False


def smolctl_runner(name: str, model: str, threads: int) -> Runner:
    from smolctl.generation.engine import Cache
    from smolctl.generation.load import load_model

    engine = load_model(model).engine
    caches: list[Cache] = []

    def reset() -> None:
        if not caches:
            caches.append(engine.allocate(1, CONTEXT + TOKENS))
        caches[0].truncate(0, 0)

    def read(tokens: Sequence[int], every: bool) -> np.ndarray:
        return engine.forward([tokens], caches[0], every).numpy()

    return Runner(name, reset, read)


def llama_runner(name: str, model: str, threads: int) -> Runner:
    import llama_cpp

    llama = llama_cpp.Llama(
        model,
        n_ctx=CONTEXT + TOKENS,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        verbose=False,
    )
    context, vocabulary = llama.ctx, llama.n_vocab()

    def reset() -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        reset.position = 0  # type: ignore[attr-defined]

    def read(tokens: Sequence[int], every: bool) -> np.ndarray:
        rows = []
        for start in range(0, len(tokens), 512):
            part = tokens[start : start + 512]
            batch = llama_cpp.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i] = token, reset.position + i  # type: ignore[attr-defined]
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = every or start + i + 1 == len(tokens)
            assert llama_cpp.llama_decode(context, batch) == 0
            reset.position += len(part)  # type: ignore[attr-defined]
            wanted = len(part) if every else int(start + len(part) == len(tokens))
            if wanted:
                pointer = llama_cpp.llama_get_logits(context)
                values = np.ctypeslib.as_array(pointer, (wanted, vocabulary))
                rows.append(values.copy() if every else values)
            llama_cpp.llama_batch_free(batch)
        return np.concatenate(rows) if len(rows) > 1 else rows[0]

    read.llama = llama  # type: ignore[attr-defined]  # keeps the context alive
    return Runner(name, reset, read)


def transformers_runner(name: str, model: str, threads: int) -> Runner:
    from transformers import AutoModelForCausalLM

    path = Path(model)
    network = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    ).eval()
    state = {}

    def reset() -> None:
        state.clear()

    @torch.inference_mode()
    def read(tokens: Sequence[int], every: bool) -> np.ndarray:
        out = network(
            torch.tensor([list(tokens)]),
            past_key_values=state.get("past"),
            use_cache=True,
            logits_to_keep=0 if every else 1,
        )
        state["past"] = out.past_key_values
        return out.logits[0].numpy()

    return Runner(name, reset, read, slow=True)


def make_models(source: Path, folder: Path) -> dict[str, tuple[Callable[..., Runner], str]]:
    """Every engine with its model, made from `source` where it is missing."""
    import llama_cpp

    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in ("bf16", "int8", "int4") if not (folder / name).exists()]
    for name in missing:
        command = [sys.executable, "-m", "smolctl", "quantize", str(source), "--to", name, "--no-measure"]
        subprocess.run([*command, "--out", str(folder / name)], check=True, stdout=subprocess.DEVNULL)
    for name, kind in (("q8_0", 7), ("bf16", 32), ("q4_0", 2), ("q4_1", 3)):
        target = folder / f"{name}.gguf"
        if not target.exists():
            settings = llama_cpp.llama_model_quantize_default_params()
            settings.ftype, settings.allow_requantize = kind, True
            call = llama_cpp.llama_model_quantize
            assert call(str(source).encode(), str(target).encode(), ctypes.byref(settings)) == 0
    ours = {name: (smolctl_runner, str(folder / name)) for name in ("bf16", "int8", "int4")}
    # The file as it is, where llama.cpp's own quantizer would round it once more.
    as_it_is = {name: str(source) for name in ("q4_1",) if name.upper() in source.name.upper()}
    theirs = {
        f"llama.cpp {name}": (llama_runner, as_it_is.get(name, str(folder / f"{name}.gguf")))
        for name in ("bf16", "q8_0", "q4_1", "q4_0")
    }
    return {
        "the file as it is": (smolctl_runner, str(source)),
        **ours,
        **theirs,
        "transformers float32": (transformers_runner, str(source)),
    }


def held_out_tokens(source: Path, count: int) -> list[int]:
    """Tokens of Python's own language reference."""
    from pydoc_data.topics import topics

    from smolctl.data.tokenizer.tokenizer import Tokenizer
    from smolctl.sources import open_source

    files = open_source(str(source)).read_tokenizer()
    assert files is not None
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return Tokenizer.from_files(files).encode(text[: 8 * count])[:count]


def once(runner: Runner, tokens: Sequence[int], long: bool) -> dict[str, float]:
    """Tokens a second of one round."""
    result = {}
    count = 24 if runner.slow else TOKENS
    runner.reset()
    started = time.perf_counter()
    row = runner.read(tokens[:PROMPT], False)
    result["prefill 32"] = PROMPT / (time.perf_counter() - started)
    started = time.perf_counter()
    for _ in range(count):
        row = runner.read([int(row[-1].argmax())], False)
    result["decode"] = count / (time.perf_counter() - started)
    runner.reset()
    started = time.perf_counter()
    runner.read(tokens[:LONG_PROMPT], False)
    result["prefill 512"] = LONG_PROMPT / (time.perf_counter() - started)
    if long and not runner.slow:
        row = runner.read(tokens[LONG_PROMPT:CONTEXT], False)
        started = time.perf_counter()
        for _ in range(CONTEXT_TOKENS):
            row = runner.read([int(row[-1].argmax())], False)
        result["decode at 2k"] = CONTEXT_TOKENS / (time.perf_counter() - started)
    return result


def log_probabilities(runner: Runner, tokens: Sequence[int], windows: int) -> tuple[np.ndarray, np.ndarray]:
    """(windows × 512, V) read at once, and (128, V) read one by one behind 32."""
    whole = []
    for window in range(windows):
        runner.reset()
        whole.append(runner.read(tokens[window * KL_WINDOW : (window + 1) * KL_WINDOW], True).copy())
    runner.reset()
    runner.read(tokens[:PROMPT], False)
    single = [runner.read([token], False)[-1:].copy() for token in tokens[PROMPT : PROMPT + TOKENS]]
    return tuple(torch.from_numpy(np.concatenate(rows)).log_softmax(-1).numpy() for rows in (whole, single))  # type: ignore[return-value]


def kl(reference: np.ndarray, other: np.ndarray) -> float:
    return float((np.exp(reference) * (reference - other)).sum(-1).mean())


def peak_memory(name: str, source: Path, folder: Path, threads: int) -> dict[str, int]:
    """Peak of a process of its own: all of it, and what the libraries had taken before the model came."""
    command = [sys.executable, __file__, str(source), "--folder", str(folder), "--threads", str(threads)]
    done = subprocess.run([*command, "--memory-of", name], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_bytes() -> int:
    """Of this process; `getrusage` would begin with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure_memory(name: str, source: Path, folder: Path, threads: int) -> None:
    make, model = make_models(source, folder)[name]
    import smolctl.generation.load  # noqa: F401 - what every smolctl process has

    if "llama" not in name:
        torch.zeros(300, 300) @ torch.zeros(300, 300)
    tokens = list(range(1000, 1000 + PROMPT))
    before = peak_bytes()
    started = time.perf_counter()
    runner = make(name, model, threads)
    load = time.perf_counter() - started
    runner.reset()
    row = runner.read(tokens, False)
    for _ in range(TOKENS):
        row = runner.read([int(row[-1].argmax())], False)
    after = peak_bytes()
    print(json.dumps({"libraries": before, "peak": after, "load_ms": round(load * 1000)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=Path("build/benchmark-models"))
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens, for KL; 0: none")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--only", nargs="*", default=None, help="engines, by name")
    parser.add_argument("--json", type=Path, default=None, help="write all figures there")
    parser.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        measure_memory(options.memory_of, options.source, options.folder, options.threads)
        return
    models = make_models(options.source, options.folder)
    names = options.only or list(models)
    tokens = held_out_tokens(options.source, max(CONTEXT, options.windows * KL_WINDOW))
    runners = {name: models[name][0](name, models[name][1], options.threads) for name in names}

    results: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for round_ in range(options.rounds + 1):  # the first warms up
        for name, runner in runners.items():
            for what, rate in once(runner, tokens, long=True).items():
                if round_:
                    results[name].setdefault(what, []).append(rate)
        print(f"round {round_} of {options.rounds}", file=sys.stderr, flush=True)

    divergence: dict[str, tuple[float, float]] = {}
    judge = runners.get("transformers float32")
    if judge is not None and options.windows:
        whole, single = log_probabilities(judge, tokens, options.windows)
        for name, runner in runners.items():
            own_whole, own_single = log_probabilities(runner, tokens, options.windows)
            divergence[name] = (kl(whole, own_whole), kl(single, own_single))
            del own_whole
    memory = {}
    for name in names if not options.no_memory else ():
        memory[name] = peak_memory(name, options.source, options.folder, options.threads)

    whats = ["decode", "decode at 2k", "prefill 32", "prefill 512"]
    print(
        "| engine | "
        + " | ".join(f"{what} tok/s" for what in whats)
        + " | KL | KL decoding | peak MB | load |"
    )
    print("|---" * (len(whats) + 5) + "|")
    for name in names:
        rates = [
            f"{statistics.median(results[name][what]):.0f}" if what in results[name] else "" for what in whats
        ]
        kls = [f"{value:.5f}" for value in divergence.get(name, ())] or ["", ""]
        peak = load = ""
        if name in memory:
            found = memory[name]
            peak = f"{found['peak'] / 1e6:.0f} ({found['libraries'] / 1e6:.0f} before the model)"
            load = f"{found['load_ms']} ms"
        print(f"| {name} | {' | '.join(rates)} | {' | '.join(kls)} | {peak} | {load} |")
    print()
    print("| ours / llama.cpp | " + " | ".join(whats) + " |")
    print("|---" * (len(whats) + 1) + "|")
    for ours, theirs in PAIRS:
        if ours in results and theirs in results:
            cells = [ratio(results[ours][what], results[theirs][what]) for what in whats]
            print(f"| {ours} / {theirs} | {' | '.join(cells)} |")
    base = results.get("transformers float32", {}).get("decode")
    for ours in (name for name in names if base and "llama" not in name and "transformers" not in name):
        print(f"| {ours} / transformers float32 | {ratio(results[ours]['decode'], base or [])} | | | |")
    if options.json:
        figures = {"results": results, "kl": divergence, "memory": memory}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Median of the rounds' ratios, and their range."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f}–{max(ratios):.2f})"


if __name__ == "__main__":
    main()
