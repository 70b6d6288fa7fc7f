"""Fixtures of the campaigns."""

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from situations import Places


@pytest.fixture
def places(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Places]:
    """Folders in memory for saves whose calls come in the same order each time."""
    monkeypatch.setattr("ckpt.order.cores", lambda: 1)
    monkeypatch.setattr("ckpt.stores.local.can_share_files", lambda folder: True)  # reads the list of mounts
    folder = memory_path / "faults"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other tests leave threads
        yield Places(folder)
    shutil.rmtree(folder, ignore_errors=True)
