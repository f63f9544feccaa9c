"""The command: runs mutants, prints failures and counts, writes the record."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

from .mutants import TARGETS
from .record import Journal, line, make_record, write
from .runner import FAILURES, OUTCOMES, Outcome, Runner


def main() -> int:
    """Returns 1 if a mutant failed."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--mutants", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, action="append", help="this mutant alone, with its traceback")
    parser.add_argument(
        "--journal", type=Path, help="a file for the outcomes; mutants in it that did not fail are left out"
    )
    parser.add_argument("--record", action="store_true", help="write record.json from the journal")
    options = parser.parse_args()
    if options.record and not options.journal:
        parser.error("--record needs --journal")
    numbers = options.only or list(range(options.first, options.first + options.mutants))
    journal = Journal(options.journal) if options.journal else None
    outcomes = _run(options.seed, journal.left(numbers) if journal else numbers, journal, bool(options.only))
    counts = Counter(one.outcome for one in outcomes)
    print(", ".join(f"{name} {counts[name]}" for name in OUTCOMES))
    for target in TARGETS:
        costs = [one.seconds for one in outcomes if one.target == target]
        print(f"{target}: {len(costs)} mutants, {sum(costs):.0f} s of processor time")
    if options.record and journal:
        write(make_record(journal))
    return int(any(counts[name] for name in FAILURES))


def _run(seed: int, numbers: list[int], journal: Journal | None, verbose: bool) -> list[Outcome]:
    began, outcomes = time.monotonic(), list[Outcome]()
    with Runner(verbose) as runner:
        for one in runner.run(seed, numbers):
            outcomes.append(one)
            if journal:
                journal.add(one)
            if one.outcome in FAILURES or verbose:
                print(line(one), flush=True)
            if verbose:
                print(f"{one.seconds:.2f} s, {one.peak / 2**20:.0f} MiB\n{one.trace}")
            if len(outcomes) % 500 == 0:
                print(f"{len(outcomes)} mutants, {time.monotonic() - began:.0f} s", flush=True)
    return outcomes


if __name__ == "__main__":
    raise SystemExit(main())
