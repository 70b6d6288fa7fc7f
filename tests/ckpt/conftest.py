"""Fixtures of the tests of `ckpt`."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest


@pytest.fixture(scope="session")
def memory_path() -> Iterator[Path]:
    """A folder in memory if the system has one, for tests that write thousands of files and sync none."""
    shared = Path("/dev/shm")
    usable = shared.is_dir() and os.access(shared, os.W_OK)
    path = Path(tempfile.mkdtemp(prefix="ckpt-tests-", dir=shared if usable else None))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def memory_url() -> Iterator[str]:
    """An unused place in fsspec's memory."""
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    fs = fsspec.filesystem("memory")
    if fs.exists(url):
        fs.rm(url, recursive=True)
