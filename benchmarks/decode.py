"""Decoding and prefill against llama.cpp and transformers: speed, KL and memory, on the same weights.

    python benchmarks/decode.py MODEL.gguf --rounds 5

MODEL is a Llama-shaped GGUF, from which smolctl and llama.cpp (if llama-cpp-python is installed) make their
formats. Every engine reads the same tokens in a process of its own, in turns as in `smolctl bench`. KL is
against transformers in float32. Memory is the peak of a fresh process that loads, reads and decodes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from smolctl.benchmark import measure
from smolctl.benchmark.engines import EngineSpec, open_engine
from smolctl.benchmark.peers import is_installed
from smolctl.benchmark.suites import prepare, reference_text
from smolctl.benchmark.workload import Sizes, Tokens, Workload
from smolctl.evaluation import score_tokens
from smolctl.generation.engine import Engine
from smolctl.quantization.measure import mean_kl
from smolctl.quantization.quantize import QuantizeOptions, quantize
from smolctl.sources import open_source
from smolctl.timing import in_turns, peak_memory, ratio_of
from smolctl.worker import Worker

PROMPT, DECODED, SEQUENCE = 32, 128, 512
CONTEXT, CONTEXT_DECODED = 1920, 64  # decoding behind a long text
# Suites of `smolctl bench`, and how much of each.
COLUMNS = {
    "decode": ("decode", Sizes(PROMPT, DECODED, 0)),
    "decode at 2k": ("decode", Sizes(CONTEXT, CONTEXT_DECODED, 0)),
    "prefill 32": ("prefill", Sizes(0, 0, PROMPT)),
    "prefill 512": ("prefill", Sizes(0, 0, SEQUENCE)),
}
REFERENCE = "transformers float32"
LLAMA_FTYPES = {"bf16": 32, "q8_0": 7, "q4_1": 3, "q4_0": 2}  # llama.h's llama_ftype
PAIRS = (
    *(("bf16", "llama.cpp bf16"), ("int8", "llama.cpp q8_0"), ("int4", "llama.cpp q4_1")),
    *((name, REFERENCE) for name in ("the file as it is", "bf16", "int8", "int4")),
)
Engines = dict[str, EngineSpec]
Rates = dict[str, dict[str, list[float]]]  # tokens/s of every engine and column, round by round


def make_engines(source: Path, folder: Path, threads: int) -> Engines:
    """Every engine with its model, made from `source` where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    engines = {"the file as it is": EngineSpec("smolctl", str(source), threads)}
    for scheme in ("bf16", "int8", "int4"):
        target = folder / scheme
        if not target.exists():
            quantize(str(source), QuantizeOptions((scheme,), out=target, measure=False))
        engines[scheme] = EngineSpec("smolctl", str(target), threads)
    for scheme in LLAMA_FTYPES if is_installed("llama.cpp") else ():
        # The file as it is, where llama.cpp's own quantizer would round it once more.
        as_it_is = scheme == "q4_1" and "Q4_1" in source.name.upper()
        model = source if as_it_is else folder / f"{scheme}.gguf"
        if not model.exists():
            quantize_with_llama(source, model, LLAMA_FTYPES[scheme])
        engines[f"llama.cpp {scheme}"] = EngineSpec("llama.cpp", str(model), threads, scheme)
    return engines | {REFERENCE: EngineSpec("transformers", str(source), threads)}


def quantize_with_llama(source: Path, target: Path, ftype: int) -> None:
    """Write a GGUF with llama.cpp's own quantizer."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.allow_requantize = ftype, True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)):
        raise SystemExit(f"llama.cpp could not write {target}")


def measure_rates(engines: Engines, source: Path, text: Tokens, rounds: int) -> Rates:
    """All engines in turns, after a warm-up."""
    places = {
        Workload(suite, spec, sizes, text): (name, column)
        for column, (suite, sizes) in COLUMNS.items()
        for name, spec in engines.items()
    }
    with ExitStack() as stack:
        prepared, left_out = prepare(list(places), open_source(str(source)), stack)
        print(*left_out, sep="\n", file=sys.stderr)
        works = [one.run for one in prepared]
        measured = in_turns(works, rounds, 0, lambda number: print(f"round {number}", file=sys.stderr))
    rates: Rates = {name: {} for name in engines}
    for one, measurements in zip(prepared, measured, strict=True):
        name, column = places[one.workload]
        rates[name][column] = [one.metrics[0].value(run.seconds[0]) for run in measurements]
    return rates


def measure_kl(engines: Engines, text: Tokens, sequences: int) -> dict[str, tuple[float, float]]:
    """Nats a token against transformers: sequences read at once, and tokens read one by one."""
    tokens = torch.tensor(text[0])
    at_once = [tokens[at * SEQUENCE : (at + 1) * SEQUENCE + 1] for at in range(sequences)]
    reference = open_engine(engines[REFERENCE])
    expected = one_by_one(reference, text[0])
    found = {}
    for name, spec in engines.items():
        engine = reference if name == REFERENCE else open_engine(spec)
        singles = score_tokens(one_by_one(engine, text[0]), tokens[1 : DECODED + 1], expected)
        found[name] = mean_kl(reference, engine, at_once), singles.kl.mean().item()
    return found


def one_by_one(engine: Engine, tokens: Sequence[int]) -> Tensor:
    """Logits (DECODED, V) after each of the tokens behind a prompt."""
    cache = engine.allocate(1, PROMPT + DECODED)
    engine.forward([tokens[:PROMPT]], cache)
    decoded = tokens[PROMPT : PROMPT + DECODED]
    return torch.from_numpy(np.concatenate([engine.forward([[token]], cache) for token in decoded]))


def measure_memory(spec: EngineSpec, text: Tokens) -> dict[str, int]:
    """The peak of a fresh process, what it held before it loaded the model, and the time of loading."""
    suite, sizes = COLUMNS["decode"]
    workload = Workload(suite, spec, sizes, text)
    with Worker(spec.engine, spec.threads) as worker:
        worker.call(exec, f"import smolctl.benchmark.measure, {spec.engine.replace('.', '_')}")
        libraries = worker.call(peak_memory) or 0
        started = time.perf_counter()
        worker.call(measure.prepare, workload)
        load = time.perf_counter() - started
        peak = max(worker.call(peak_memory) or 0, worker.call(measure.run, workload).peak_bytes or 0)
    return {"libraries": libraries, "peak": peak, "load_ms": round(load * 1000)}


def print_table(corner: str, headers: Sequence[str], rows: Mapping[str, Mapping[str, str]]) -> None:
    """In Markdown."""
    print(f"| {' | '.join([corner, *headers])} |")
    print("|---" * (len(headers) + 1) + "|")
    for name, cells in rows.items():
        print(f"| {' | '.join([name, *(cells.get(header, '') for header in headers)])} |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=Path("build/benchmark-models"))
    parser.add_argument("--windows", type=int, default=4, help="sequences of 512 tokens for KL; 0: no KL")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--only", nargs="*", default=None, help="engines, by name")
    parser.add_argument("--json", type=Path, default=None, help="write all figures there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    engines = make_engines(options.source, options.folder, options.threads)
    engines = {name: engines[name] for name in options.only or engines}
    longest = max(CONTEXT + CONTEXT_DECODED, options.windows * SEQUENCE + 1)
    _, text = reference_text(open_source(str(options.source)), Sizes(0, 0, longest))

    rates = measure_rates(engines, options.source, text, options.rounds)
    compared = REFERENCE in engines and options.windows
    kls = measure_kl(engines, text, options.windows) if compared else {}
    memory = {name: measure_memory(spec, text) for name, spec in engines.items() if not options.no_memory}

    cells = {
        name: {column: f"{median(of_column):.0f}" for column, of_column in of_engine.items()}
        for name, of_engine in rates.items()
    }
    for name, (at_once, single) in kls.items():
        cells[name] |= {"KL": f"{at_once:.5f}", "KL one by one": f"{single:.5f}"}
    for name, found in memory.items():
        peak = f"{found['peak'] / 1e6:.0f} ({found['libraries'] / 1e6:.0f} before the model)"
        cells[name] |= {"peak MB": peak, "load": f"{found['load_ms']} ms"}
    ratios: dict[str, dict[str, str]] = {}
    for one, other in PAIRS:
        for column in rates.get(one, {}).keys() & rates.get(other, {}).keys():
            spread = ratio_of(rates[one][column], rates[other][column]).spread
            shown = f"**{spread.median:.2f}** ({spread.low:.2f}–{spread.high:.2f})"
            ratios.setdefault(f"{one} / {other}", {})[column] = shown
    print_table("tokens a second", [*COLUMNS, "KL", "KL one by one", "peak MB", "load"], cells)
    print_table("ratio", list(COLUMNS), ratios)
    if options.json:
        figures = {"results": rates, "kl": kls, "memory": memory}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
