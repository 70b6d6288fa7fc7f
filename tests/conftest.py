"""Fixtures of all tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS / "support"), str(TESTS.parent / "examples" / "megatron_gpt")]

from ranks import Ranks  # noqa: E402


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Worker processes, started when a test first needs them."""
    pool = Ranks()
    yield pool
    pool.stop()
