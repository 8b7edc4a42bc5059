"""Soaks from the command line."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from contextlib import closing
from pathlib import Path

# The tests are no package: what they share is imported by its own name.
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from lab_databases import NAMES

from .databases import new_database
from .report import Report
from .run import soak


def main() -> int:
    """Run one soak on each database and print what happened."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--seconds", type=float, default=120, help="on each database")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument(
        "--database",
        choices=NAMES,
        action="append",
        help="may be given again; without it, on one after the other",
    )
    arguments = parser.parse_args()
    failed = False
    for name in arguments.database or NAMES:
        report = _soak(name, arguments.seconds, arguments.seed)
        print(report, flush=True)
        failed = failed or bool(report.violations)
    return 1 if failed else 0


def _soak(name: str, seconds: float, seed: int) -> Report:
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(new_database(name, Path(folder), seed)) as database,
    ):
        return soak(seconds, seed, Path(folder), database, name=name)


if __name__ == "__main__":
    sys.exit(main())
