"""Training and decoding next to two other busy processes, compared with the speed on a quiet machine.

    python benchmarks/neighbours.py                              # nano's training step
    python benchmarks/neighbours.py --preset smollm2-135m-hub --batch 2
    python benchmarks/neighbours.py --model FILE.gguf            # and decoding, on the C engine

With as many busy processes as there are cores, a fair share is 0.5. Training is measured with libgomp's
default and with `smolctl.cores.sharing_cores`, in turns, on the quiet and the busy machine. All variants use
the same batches, and their losses must be equal to the last bit. Run it on a quiet machine. Prints one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from statistics import median

import torch

from smolctl.benchmark.machine import describe_machine
from smolctl.config import load_run_config
from smolctl.cores import sharing_cores, usable_cpus
from smolctl.generation.load import load_model
from smolctl.model.weights import initialize
from smolctl.timing import ratio_of

SETTLE_S = 3.0  # until the measured work has adapted to its neighbours
MEASURE_S = 6.0


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """This many processes, each of which keeps a core busy."""
    with ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
        yield


def training(preset: str, batch: int) -> Callable[[int], tuple[int, float]]:
    """A step of training by its number: the tokens that it saw, and its loss."""
    config = load_run_config(preset)
    length = config.data.sequence_length
    network = initialize(config.model, 0).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    start = [parameter.detach().clone() for parameter in network.parameters()]

    def step(number: int) -> tuple[int, float]:
        if number == 0:  # every side begins with the same weights
            with torch.no_grad():
                for parameter, value in zip(network.parameters(), start, strict=True):
                    parameter.copy_(value)
            optimizer.state.clear()
        chance = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, config.model.vocab_size, (batch, length + 1), generator=chance)
        loss = network.loss(tokens[:, :-1], tokens[:, 1:]) / (batch * length)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return batch * length, loss.item()

    return step


def decoding(model: str) -> Callable[[int], tuple[int, float]]:
    """Thirty-two greedy tokens after a prompt of the same length."""
    engine = load_model(model).engine

    def decode(_number: int) -> tuple[int, float]:
        cache = engine.allocate(1, 64)
        token = int(engine.forward([list(range(100, 132))], cache).argmax())
        for _ in range(31):
            token = int(engine.forward([[token]], cache).argmax())
        return 32, float(token)

    return decode


def speed(work: Callable[[int], tuple[int, float]]) -> tuple[float, list[float]]:
    """Tokens a second once the work has settled, and the loss of every step."""
    losses: list[float] = []
    began, tokens, counted = time.perf_counter(), 0, 0.0
    while True:
        started = time.perf_counter()
        done, loss = work(len(losses))
        losses.append(loss)
        if started - began > SETTLE_S:
            tokens += done
            counted += time.perf_counter() - started
        if counted > MEASURE_S:
            return tokens / counted, losses


def compare(work: Callable[[int], tuple[int, float]], rounds: int) -> dict[str, object]:
    """Both ways of waiting, quiet and busy, in turns."""
    found: dict[tuple[str, str], list[float]] = {}
    all_losses: list[list[float]] = []
    for number in range(rounds):
        for place, count in (("quiet", 0), ("busy", usable_cpus())):
            ways = (("libgomp", nullcontext), ("sharing", sharing_cores))
            for name, way in ways if number % 2 else ways[::-1]:
                with neighbours(count), way():
                    rate, losses = speed(work)
                found.setdefault((name, place), []).append(rate)
                all_losses.append(losses)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    shortest = min(map(len, all_losses))
    if len({tuple(losses[:shortest]) for losses in all_losses}) > 1:
        raise SystemExit("the losses differ")
    plain = found["libgomp", "quiet"]
    return {
        "tokens_per_second": {" ".join(key): round(median(rates), 1) for key, rates in found.items()},
        "of_libgomp_quiet": {
            " ".join(key): asdict(ratio_of(rates, plain))
            for key, rates in found.items()
            if rates is not plain
        },
        "steps_with_equal_losses": shortest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="nano", help="whose step is trained")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--model", help="to decode with")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    machine = describe_machine(torch.get_num_threads())
    results = {f"train {options.preset}": compare(training(options.preset, options.batch), options.rounds)}
    if options.model:
        results[f"decode {options.model}"] = compare(decoding(options.model), options.rounds)
    print(json.dumps({"machine": f"{machine.cpu}, {machine.threads} threads", **results}, indent=2))


if __name__ == "__main__":
    main()
