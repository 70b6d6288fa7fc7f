"""Fixtures for tests of third-party models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from ranks import Ranks

sys.path.insert(0, str(Path(__file__).parent))


def imports_case() -> None:
    """Do nothing; running it imports this file and its imports on a rank."""
    import hf_models

    assert hf_models.STEPS


@pytest.fixture(scope="session")
def hf_ranks(ranks: Ranks) -> Ranks:
    """Ranks that have imported the Hugging Face library, which takes a while."""
    ranks.run(2, imports_case, timeout=300)
    return ranks
