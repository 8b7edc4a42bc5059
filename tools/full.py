"""Run the whole suite on every Python and with every set of dependencies.

    python tools/full.py [--only NAME] [--list] -- ARGUMENTS OF PYTEST

Each run has a virtual environment of its own in ``.venv-full``, made anew where
``setup.cfg`` changed. What failed is listed at the end.
"""

from __future__ import annotations

import argparse
import configparser
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".venv-full"
PYTHONS = [f"3.{minor}" for minor in range(10, 15)]
#: Of which a pre-release is tried where there is one.
PRE_RELEASES = ("Flask", "Werkzeug", "Flask-SQLAlchemy", "SQLAlchemy")


@dataclass(frozen=True)
class Run:
    """One Python with one set of packages.

    :ivar pins: ``name==version`` for those that are not to be the newest.
    :ivar early: whether pre-releases of the frameworks are taken.
    """

    name: str
    python: str
    pins: Sequence[str] = ()
    early: bool = False

    @property
    def folder(self) -> Path:
        """Its virtual environment."""
        return FOLDER / self.name

    @property
    def interpreter(self) -> str:
        """Python in it."""
        return str(self.folder / "bin" / "python")

    def prepare(self) -> bool:
        """Make its environment; False where there is nothing in it worth a run."""
        stamp = self.folder / "installed.stamp"
        needed = (ROOT / "setup.cfg").read_text()
        if not stamp.exists() or stamp.read_text() != needed:
            shutil.rmtree(self.folder, ignore_errors=True)
            _call(self.python, "-m", "venv", str(self.folder))
            constraints = self.folder / "constraints.txt"
            constraints.write_text("\n".join(self.pins))
            install = [self.interpreter, "-m", "pip", "install", "--quiet"]
            install += ["--disable-pip-version-check"]
            _call(*install, "-c", str(constraints), "--editable", f"{ROOT}[test]")
            if self.early:
                _call(*install, "--pre", "--upgrade", *PRE_RELEASES)
            stamp.write_text(needed)
        return not self.early or bool(self._pre_releases())

    def test(self, arguments: Sequence[str]) -> bool:
        """Run the tests; whether all passed."""
        command = [self.interpreter, "-m", "pytest", *arguments]
        return subprocess.run(command, cwd=ROOT, check=False).returncode == 0

    def _pre_releases(self) -> list[str]:
        freeze = [self.interpreter, "-m", "pip", "freeze", "--exclude-editable"]
        listed = subprocess.run(freeze, capture_output=True, text=True, check=True)
        known = {name.lower() for name in PRE_RELEASES}
        return [
            line
            for line in listed.stdout.splitlines()
            if line.partition("==")[0].lower() in known
            and re.search(r"==.*\d(a|b|rc|\.dev)\d", line)
        ]


def runs() -> Iterator[Run]:
    """All of them, on the Pythons that are installed."""
    pythons = {name: path for name in PYTHONS if (path := find_python(name))}
    for name, path in pythons.items():
        yield Run(f"python{name}-newest", path)
    # The lowest versions know only the Pythons of their time.
    lowest = min(pythons, key=PYTHONS.index)
    newest = max(pythons, key=PYTHONS.index)
    yield Run(f"python{lowest}-lowest", pythons[lowest], lowest_versions())
    yield Run(f"python{newest}-flask3.1.0", pythons[newest], ["Flask==3.1.0"])
    yield Run(f"python{newest}-pre-release", pythons[newest], early=True)


def find_python(version: str) -> str | None:
    """An interpreter of this version that works, in PATH or kept by pyenv."""
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = shutil.which(f"python{version}")
    paths = [found] if found else []
    paths += [str(path) for path in kept.glob(f"{version}.*/bin/python{version}")]
    for path in paths:
        # A name in PATH may be a shim of a version that is not there.
        command = [path, "-c", "import ensurepip, venv"]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return path
    return None


def lowest_versions() -> list[str]:
    """What ``setup.cfg`` asks for at least, as pins."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    required = config["options"]["install_requires"].split()
    return [requirement.replace(">=", "==") for requirement in required]


def main() -> int:
    """Prepare and do the runs, one after the other."""
    parser = argparse.ArgumentParser(prog="python tools/full.py")
    parser.add_argument("--only", action="append", help="the run of this name")
    parser.add_argument("--list", action="store_true", help="name the runs")
    parser.add_argument("arguments", nargs="*", help="for pytest")
    options = parser.parse_args()
    verdicts = {}
    for run in runs():
        if options.only and run.name not in options.only:
            continue
        if options.list:
            print(run.name)
            continue
        print(f"=== {run.name}", flush=True)
        if not run.prepare():
            verdicts[run.name] = "there is no pre-release"
        else:
            passed = run.test(options.arguments)
            verdicts[run.name] = "passed" if passed else "FAILED"
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict}")
    return 1 if "FAILED" in verdicts.values() else 0


def _call(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
