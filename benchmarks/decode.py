"""smolctl's engine compared with other engines on the same weights: decoding, prefill, batches of eight, KL.

    python benchmarks/decode.py MODEL.gguf --peer-source DIR --peer-source DIR --venvs VENVS

MODEL is a GGUF of a Llama-like model, from which every engine's formats are made once. --peer-source is the
source code of llama.cpp or ik_llama.cpp, which is built with cmake; DIR@VERSION where the folder is not
git's. VENVS holds virtual environments named openvino, onnxruntime, ctranslate2 and mistralrs; one that is
missing is left out:

    pip install openvino-genai nncf
    pip install onnxruntime-genai onnx onnx-ir torch transformers
    pip install ctranslate2 torch transformers
    pip install mistralrs

Every engine runs in its own process, which is stopped while others work; all take turns in every round, and
process the same tokens if these can be given. KL is measured against transformers in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from select import select
from time import perf_counter
from typing import Any

import numpy as np
import torch
from decode_engines import REFERENCE, Peer, commit_of, every_engine
from torch import Tensor

from smolctl.benchmark.machine import describe_machine
from smolctl.benchmark.suites import reference_text
from smolctl.benchmark.workload import Sizes, Tokens
from smolctl.cores import compute_threads
from smolctl.evaluation import score_tokens
from smolctl.sources import open_source
from smolctl.timing import in_turns

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from docs.peer_table import peer_table  # noqa: E402 - the page of measurements has the same table

# Sequences, tokens of each that are read at once, and tokens of each in all.
CASES = {
    "decode": (1, 32, 96),
    "prefill 512": (1, 512, 512),
    "eight at once": (8, 32, 64),
    "prefill 32": (1, 32, 32),
    "decode at 2k": (1, 1920, 1984),
}
QUICK = {"decode": (1, 8, 12), "prefill 512": (1, 32, 32), "eight at once": (8, 8, 10)}
FOR_KL = (1, 32, 160)
TOO_SLOW = 15.0  # seconds of a run in the warm-up, after which a case is left out
LONGEST_WAIT = 180.0  # seconds for an answer, after which an engine is left out


class PeerProcess:
    """The process of an engine, see peers/serve_engine.py. It is stopped while it is not asked."""

    def __init__(self, peer: Peer, threads: int) -> None:
        self.peer = peer
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        number = str(threads)
        self._started = perf_counter()
        self._process = subprocess.Popen(
            peer.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": number, "RAYON_NUM_THREADS": number},
        )

    def wait(self) -> None:
        """Until the model is loaded."""
        version = self._line()
        self.peer.version = self.peer.version or version
        self.peer.load_s = round(perf_counter() - self._started, 2)
        self._process.send_signal(signal.SIGSTOP)

    def run(self, text: Tokens, case: tuple[int, int, int], file: Path | None = None) -> float:
        """The seconds of a case.

        Raises:
            RuntimeError: the engine cannot, or its process has ended.
        """
        sequences, prompt, length = case
        ids = (",".join(map(str, one[:length])) for one in text[:sequences])
        assert self._process.stdin is not None
        if self._process.poll() is not None:
            raise RuntimeError("its process has ended")
        self._process.send_signal(signal.SIGCONT)
        print(prompt, file or "-", *ids, file=self._process.stdin, flush=True)
        answer = self._line(2 * TOO_SLOW if file is None else LONGEST_WAIT)
        self._process.send_signal(signal.SIGSTOP)
        if answer.startswith("!"):
            raise RuntimeError(answer[2:])
        return float(answer)

    def _line(self, limit: float = LONGEST_WAIT) -> str:
        assert self._process.stdout is not None
        if not select([self._process.stdout], [], [], limit)[0]:
            self._process.kill()
            self._process.wait()
            raise RuntimeError(f"no answer within {limit:.0f} s")
        if line := self._process.stdout.readline():
            return line.strip()
        self._process.wait()
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip().splitlines()
        raise RuntimeError(words[-1] if words else f"exit code {self._process.returncode}")

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def measure_kl(processes: Mapping[str, PeerProcess], text: Tokens) -> None:
    """The KL to transformers in nats per token, of tokens that are read one by one."""
    targets = torch.tensor(text[0][FOR_KL[1] + 1 : FOR_KL[2] + 1])
    expected: Tensor | None = None
    with tempfile.TemporaryDirectory() as folder:
        for process in sorted(processes.values(), key=lambda one: one.peer.name != REFERENCE):
            file = Path(folder) / "logits"
            try:
                process.run(text, FOR_KL, file)
            except RuntimeError as error:
                print(f"{process.peer.name}, KL: {error}", file=sys.stderr)
                continue
            found = torch.from_numpy(np.fromfile(file, np.float32).reshape(len(targets), -1))
            file.unlink()
            if process.peer.name == REFERENCE:
                expected = found
            elif expected is not None:
                width = expected.shape[1]  # some add columns that no token has
                process.peer.kl = score_tokens(found[:, :width], targets, expected).kl.mean().item()


def measure(
    peers: list[Peer], text: Tokens, cases: Mapping[str, tuple[int, int, int]], rounds: int, threads: int
) -> list[str]:
    """All engines in turns, after a warm-up.

    Returns:
        A line for everything that is left out, with the reason.
    """
    left_out = []
    with ExitStack() as stack:
        started = [stack.enter_context(PeerProcess(peer, threads)) for peer in peers]
        processes: dict[str, PeerProcess] = {}
        for process in started:
            try:
                process.wait()
                processes[process.peer.name] = process
            except RuntimeError as error:
                left_out.append(f"{process.peer.name}: {error}")
        measure_kl(processes, text)
        works = []
        for name, process in processes.items():
            for case, sizes in cases.items() if name != REFERENCE else ():
                try:
                    seconds = process.run(text, sizes)
                except RuntimeError as error:
                    left_out.append(f"{name}, {case}: {error}")
                    continue
                if seconds > TOO_SLOW:
                    left_out.append(f"{name}, {case}: a run takes {seconds:.0f} s")
                    continue
                works.append((process.peer, case, partial(timed, process, text, sizes, left_out)))
        measured = in_turns(
            [run for _, _, run in works], rounds, 0, lambda number: print(f"round {number}", file=sys.stderr)
        )
    for (peer, case, _), times in zip(works, measured, strict=True):
        sequences, prompt, length = cases[case]
        tokens = sequences * ((length - prompt) or prompt)
        taken = [one for one in times if one is not None]
        if len(taken) == len(times):
            peer.rates[case] = [round(tokens / one, 2) for one in taken]
    return left_out


def timed(
    process: PeerProcess, text: Tokens, case: tuple[int, int, int], left_out: list[str]
) -> float | None:
    """The seconds of a case; None, and a line in `left_out`, where an engine has failed since the warm-up."""
    try:
        return process.run(text, case)
    except RuntimeError as error:
        line = f"{process.peer.name}: {error}"
        left_out += [line] * (line not in left_out)  # an ended process says so each time
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="not needed to print results")
    parser.add_argument("--peer-source", action="append", default=[], metavar="DIR[@VERSION]")
    parser.add_argument("--venvs", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--folder", type=Path, default=Path("build/benchmark-models"))
    parser.add_argument("--cases", nargs="*", default=list(CASES)[:3], choices=CASES)
    parser.add_argument("--only", nargs="*", default=None, help="engines, such as 'smolctl int8'")
    parser.add_argument("--quick", action="store_true", help="whether all works: no figures to keep")
    parser.add_argument("--make", action="store_true", help="build the peers and make their models, no more")
    parser.add_argument("--json", type=Path, default=None, help="default: results/peers-MACHINE.json")
    parser.add_argument("--print", action="store_true", help="print the results of an earlier run")
    options = parser.parse_args()
    threads = compute_threads(options.threads)
    machine = describe_machine(threads)
    described = f"{machine.cpu}, {machine.instructions}"
    named = re.sub("[^a-z0-9]+", "-", described.lower())
    file = options.json or ROOT / "benchmarks" / "results" / f"peers-{named}.json"
    if options.print:
        results = json.loads(file.read_text(encoding="utf-8"))
    else:
        torch.set_num_threads(threads)
        peers = every_engine(options, threads)
        if options.make:
            return
        results = {"machine": described, **measured_results(options, peers, threads)}
        if not options.quick:
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(peer_table(results, datetime.now(UTC).date()))


def measured_results(options: argparse.Namespace, peers: list[Peer], threads: int) -> dict[str, Any]:
    """What was measured, with what and when."""
    cases = QUICK if options.quick else {case: CASES[case] for case in options.cases}
    longest = max(length for _, _, length in (*cases.values(), FOR_KL)) + 1
    sizes = Sizes(CASES["decode"][1], CASES["decode"][2], longest, 8)
    _, text = reference_text(open_source(str(options.source)), sizes)
    left_out = measure(peers, text, cases, 1 if options.quick else options.rounds, threads)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "threads": threads,
        "model": options.source.name,
        "smolctl": commit_of(ROOT),
        "left_out": left_out,
        "engines": {
            one.name: {key: value for key, value in asdict(one).items() if key != "command"} for one in peers
        },
    }


if __name__ == "__main__":
    main()
