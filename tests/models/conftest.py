"""Fixtures of the tests with models from outside."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from ranks import Ranks

sys.path.insert(0, str(Path(__file__).parent))


def imports_case() -> None:
    """Runs when this file has been imported, with what it imports."""
    import hf_models

    assert hf_models.STEPS


@pytest.fixture(scope="session")
def hf_ranks(ranks: Ranks) -> Ranks:
    """The ranks, with the Hugging Face library imported, which takes a while."""
    ranks.run(2, imports_case, timeout=300)
    return ranks
