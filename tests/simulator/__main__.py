"""Long soaks, and one seed with its trace."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter

from .plan import CLASSES, EDGES
from .search import explain, run_seed


def main() -> int:
    """Run schedules until one fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulator")
    parser.add_argument("--schedules", type=int, default=1000, help="in each class")
    parser.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="for all classes together: fewer schedules where they take longer",
    )
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument(
        "--class",
        dest="kinds",
        action="append",
        choices=[*CLASSES, *EDGES],
        help="default all but those in which promises are known to be broken",
    )
    parser.add_argument("--keep-going", action="store_true", help="do not explain")
    arguments = parser.parse_args()
    failed = 0
    kinds = arguments.kinds or list(CLASSES)
    for kind in kinds:
        deadline = time.monotonic() + arguments.seconds / len(kinds)
        started = time.process_time()
        counts: Counter[str] = Counter()
        failures: list[str] = []
        schedules = 0
        for seed in range(arguments.seed, arguments.seed + arguments.schedules):
            if time.monotonic() > deadline:
                break
            schedules += 1
            violation, seen = run_seed(kind, seed)
            counts += seen
            if violation is None:
                continue
            failures.append(f"  seed {seed}: {violation}")
            if not arguments.keep_going:
                print(explain(kind, seed))
                return 1
        rate = schedules / (time.process_time() - started)
        words = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        print(
            f"{kind}: {len(failures)} of {schedules} failed,"
            f" {rate:.0f} a CPU second; {words}"
        )
        print("\n".join(failures[:20]), end="\n" if failures else "")
        failed += len(failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
