"""A short soak; ``make soak`` runs a long one."""

from __future__ import annotations

from pathlib import Path

from soak.run import soak


def test_soak(tmp_path: Path) -> None:
    """Whatever breaks, nothing acknowledged is lost and nobody comes back."""
    report = soak(10, 1, tmp_path)
    print(report)
    assert report.violations == []
    assert report.operations.total() > 300
    assert report.faults.total() >= 3
