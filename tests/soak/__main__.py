"""A soak from the command line."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from .run import soak


def main() -> int:
    """Run one soak and print what happened."""
    parser = argparse.ArgumentParser(prog="python -m soak")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = soak(arguments.seconds, arguments.seed, Path(folder))
    print(report)
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
