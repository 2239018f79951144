"""`python -m tests.fuzz --count 100000` runs many inputs, `python -m tests.fuzz config:4711` one of them."""

from __future__ import annotations

import argparse
import time

from tests.fuzz.harness import Finding, run_cases, show
from tests.fuzz.inputs import base
from tests.fuzz.kinds import KINDS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("case", nargs="?", help="kind:number of one input, to be run in this process")
    parser.add_argument("--count", type=int, default=16_000, help="inputs in all")
    parser.add_argument("--first", type=int, default=0, help="number of the first one of each kind")
    parser.add_argument("--kinds", default=",".join(KINDS), help="which, with commas between them")
    asked = parser.parse_args()
    base()
    if asked.case:
        show(asked.case, KINDS[asked.case.partition(":")[0]])
        return
    kinds = {name: KINDS[name] for name in asked.kinds.split(",")}
    started, each = time.time(), -(-asked.count // len(kinds))
    found: list[Finding] = []
    for name, case in kinds.items():
        outcome = run_cases([(name, case)], range(asked.first, asked.first + each), print)
        found += outcome.findings
        shown = ", ".join(f"{count:,} {what.split(' ')[1]}" for what, count in sorted(outcome.counts.items()))
        print(f"{name}: {shown}; {time.time() - started:.0f} s", flush=True)
    print(f"{each * len(kinds):,} inputs, {len(found)} of them did not end as they should")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
