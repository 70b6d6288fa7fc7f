"""Fixtures of the tests of `ckpt`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("store_contract")


@pytest.fixture(scope="session")
def memory_path() -> Iterator[Path]:
    """A folder in memory if the system has one, for tests that write thousands of files and sync none."""
    shared = Path("/dev/shm")
    usable = shared.is_dir() and os.access(shared, os.W_OK)
    path = Path(tempfile.mkdtemp(prefix="ckpt-tests-", dir=shared if usable else None))
    yield path
    shutil.rmtree(path)
