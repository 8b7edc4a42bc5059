"""What is built is what is installed: every folder is in the wheel, and it works."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: Uses a session, the reaper and every module, by nothing but what the wheel has.
USE = """
import importlib, pkgutil, sys
import flask_resilient_session
assert flask_resilient_session.__file__.startswith(sys.prefix), sys.path
for module in pkgutil.walk_packages(
    flask_resilient_session.__path__, "flask_resilient_session."
):
    importlib.import_module(module.name)
from flask import Flask, session
app = Flask("used", instance_path=sys.argv[1])
app.secret_key = "of this test"
app.testing = True
flask_resilient_session.ResilientSession(app)
app.add_url_rule("/set", "set", lambda: session.update(a=1) or "")
app.add_url_rule("/get", "get", lambda: str(session["a"]))
with app.test_client() as browser:
    browser.get("/set")
    assert browser.get("/get").text == "1"
result = app.test_cli_runner().invoke(args=["reap-sessions"])
assert result.exit_code == 0, result.output
app.extensions["resilient_session"].close()
"""


def run(*command: object) -> None:
    """Run something that has to succeed."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wheel_is_whole_and_works(tmp_path: Path) -> None:
    """Built from the sources, installed into an empty environment, and used there."""
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {n for n in archive.namelist() if n.startswith("flask_resilient")}
    package = ROOT / "flask_resilient_session"
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in [*package.rglob("*.py"), package / "py.typed"]
    }
    assert sources <= packed
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    paths = {"base": str(environment), "platbase": str(environment)}
    site = Path(sysconfig.get_path("purelib", vars=paths))
    run(sys.executable, "-m", "pip", "install", "--no-deps", "-t", site, wheel)
    # The distribution's requirements, without the checkout that is installed there.
    (site / "requirements.pth").write_text(sysconfig.get_path("purelib"))
    run(environment / "bin" / "python", "-I", "-W", "error", "-c", USE, tmp_path)
