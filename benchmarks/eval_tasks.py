"""`smolctl eval` compared with lm-eval's own `--model hf` on the same float32 weights and items, in turns.

    pip install '.[eval]'
    python benchmarks/eval_tasks.py MODEL --rounds 3

The tasks are made of docstrings of Python's standard library: four possible continuations of a text of 100
tokens or more; the same with a letter as the answer, where lm-eval too reads each text once; whole texts; and
texts to be continued. Every round, each engine answers all items of a kind. Prints a Markdown table: seconds
of smolctl, of hf with one request at a time (its default) and with eight, the ratios, and how many items were
answered differently; then the items that int8 and int4 answer differently.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import json
import math
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from smolctl.cores import sharing_cores
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.evaluation.harness import EngineLM
from smolctl.generation.load import load_model
from smolctl.publish.export import export_model
from smolctl.quantization.quantize import QuantizeOptions, quantize
from smolctl.sources import open_source
from smolctl.timing import in_turns, ratio_of

MODULES = (
    *("argparse", "asyncio", "collections", "contextlib", "csv", "datetime", "decimal", "difflib", "doctest"),
    *("email.message", "enum", "fractions", "functools", "heapq", "inspect", "itertools", "json", "logging"),
    *("os", "pathlib", "pickle", "random", "re", "shutil", "socket", "sqlite3", "statistics", "string"),
    *("subprocess", "tarfile", "tempfile", "textwrap", "threading", "traceback", "unittest", "zipfile"),
)
SHORTEST, LONGEST, ANSWER = 100, 400, 10  # tokens of a context, and of an answer
KINDS: Mapping[str, Mapping[str, Any]] = {
    "four answers": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "four letters": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}\n\nHow does this go on?\n{{letters}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "whole texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "texts to continue": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 32},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def docstrings(tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Tokens of the docstrings that are long enough, each once."""
    seen = set()
    for name in MODULES:
        module = importlib.import_module(name)
        members = (value for _, value in sorted(vars(module).items()) if callable(value))
        for one in [module, *members]:
            text = re.sub(r"\s+", " ", inspect.getdoc(one) or "")
            ids = tokenizer.encode(text)
            if len(ids) >= SHORTEST + ANSWER and text not in seen:
                seen.add(text)
                yield ids


def write_items(path: Path, tokenizer: Tokenizer, count: int) -> None:
    """Texts cut in two, with the ends of three others."""
    chance = random.Random(0)
    texts = list(docstrings(tokenizer))
    chance.shuffle(texts)
    cuts = [chance.randint(SHORTEST, min(LONGEST, len(ids) - ANSWER)) for ids in texts]
    ends = [tokenizer.decode(ids[cut : cut + ANSWER]) for ids, cut in zip(texts, cuts, strict=True)]
    lines = []
    for number in range(min(count, len(texts))):
        others = chance.sample([end for end in ends if end != ends[number]], 3)
        answer = chance.randrange(4)
        choices = [*others[:answer], ends[number], *others[answer:]]
        letters = "\n".join(f"{letter}.{choice}" for letter, choice in zip("ABCD", choices, strict=True))
        context = tokenizer.decode(texts[number][: cuts[number]])
        lines.append(
            json.dumps({"context": context, "choices": choices, "letters": letters, "answer": answer})
        )
    path.write_text("\n".join(lines) + "\n")


def write_tasks(folder: Path, tokenizer: Tokenizer, count: int) -> dict[str, Path]:
    """A task of each kind as a YAML file of lm-eval's, in a new folder."""
    folder.mkdir()
    write_items(folder / "items.jsonl", tokenizer, count)
    found = {}
    for kind, settings in KINDS.items():
        found[kind] = folder / f"{kind.replace(' ', '_')}.yaml"
        common = {
            "task": found[kind].stem,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
            "test_split": "test",
        }
        found[kind].write_text(yaml.safe_dump(common | dict(settings)))
    return found


def ask(model: Any, task: Path, clock: Callable[[], float] = time.perf_counter) -> tuple[float, list[Any]]:
    """Seconds, and the answer to every item: the likeliest choice, or the text, or the log-probability."""
    started = clock()
    with contextlib.redirect_stderr(io.StringIO()):
        found = simple_evaluate(
            model=model, tasks=[str(task)], task_manager=TaskManager(include_defaults=False)
        )
    seconds = clock() - started
    assert found is not None
    responses = (sample["filtered_resps"] for sample in found["samples"][task.stem])
    return seconds, [likeliest(each) for each in responses]


def likeliest(responses: Sequence[Any]) -> Any:
    """The number of the likeliest choice; a text or a log-probability as it is."""
    (first, *_) = responses
    if isinstance(first, tuple | list):
        return max(range(len(responses)), key=lambda number: responses[number][0])
    return first


def differing(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many answers are not the same, log-probabilities but for rounding."""
    return sum(
        not (math.isclose(a, b, rel_tol=1e-5) if isinstance(a, float) else a == b)
        for a, b in zip(one, other, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--counted", type=int, default=200, help="items for what int8 and int4 change")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--cpu", action="store_true", help="processor time: for busy machines, with one thread"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, sharing_cores():  # for hf: spinning threads lose most
        folder = Path(name)
        dense = folder / "float32"
        dense.mkdir()
        export_model(open_source(options.model), dense, "float32", ())
        ours = load_model(str(dense))
        tasks = write_tasks(folder / "tasks", ours.tokenizer, options.items)
        warmup = write_tasks(folder / "warm-up", ours.tokenizer, 1)["four answers"]
        hf = {size: HFLM(str(dense), device="cpu", dtype="float32", batch_size=size) for size in (1, 8)}
        engines = [EngineLM(ours, lambda _text: None), *hf.values()]
        for engine in engines:  # the weights come into memory with the first call
            ask(engine, warmup)
        print(f"{options.model}: {ours.engine.name}, {options.items} items, {options.rounds} rounds\n")
        print("| kind | smolctl | hf, 1 | hf, 8 | faster than 1 | faster than 8 | answered differently |")
        print("|---|---|---|---|---|---|---|")
        for kind, task in tasks.items():
            clock = time.process_time if options.cpu else time.perf_counter
            works = [partial(ask, engine, task, clock) for engine in engines]
            rounds = in_turns(works, options.rounds, warmups=0)
            seconds = [[one for one, _ in results] for results in rounds]
            ratios = [ratio_of(theirs, seconds[0]).spread for theirs in seconds[1:]]
            shown = [f"{sorted(each)[len(each) // 2]:.1f} s" for each in seconds]
            shown += [f"**{one.median:.2f}** ({one.low:.2f}–{one.high:.2f})" for one in ratios]
            other = differing(rounds[0][0][1], rounds[1][0][1])
            print(f"| {kind} | {' | '.join(shown)} | {other} of {len(rounds[0][0][1])} |", flush=True)
        del hf, engines[1:]
        task = write_tasks(folder / "counted", ours.tokenizer, options.counted)["four answers"]
        expected = ask(engines[0], task)[1]
        quantize(str(dense), QuantizeOptions(("int8", "int4"), out=folder / "quantized", measure=False))
        print()
        for scheme in ("int8", "int4"):
            model = load_model(str(folder / "quantized" / scheme))
            _, found = ask(EngineLM(model, lambda _text: None), task)
            print(f"{scheme}: {differing(found, expected)} of {len(found)} choices differ from float32's")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
