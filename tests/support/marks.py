"""Values of parameters that a plain `pytest` leaves out, or `make test` too."""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Mark a set of values that adds little to a quick look: a plain `pytest` leaves it out."""
    return pytest.param(*values, marks=pytest.mark.slow)


def matrix(*values: Any) -> Any:
    """Mark a set of values of a wide table, which only `make matrix` runs."""
    return pytest.param(*values, marks=pytest.mark.matrix)


STAGES = [0, slow(1), slow(2), 3]
"""All stages of ZeRO. 1 and 2 keep parameters whole, as 0 does, and shard states, as 3 does."""
