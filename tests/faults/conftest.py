"""The fault labs that most of these tests use; some files have their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab import HASTY, Lab, new_lab
from lab_databases import LabDatabase
from servers import Memcached


@pytest.fixture
def lab(nodes: list[Memcached], lab_database: LabDatabase) -> Iterator[Lab]:
    """Two nodes, one worker, which is patient."""
    with new_lab(nodes, lab_database) as lab:
        yield lab


@pytest.fixture
def hasty(nodes: list[Memcached], lab_database: LabDatabase) -> Iterator[Lab]:
    """Two nodes, and a worker that does not wait long for anything."""
    with new_lab(nodes, lab_database, **HASTY) as lab:
        yield lab
