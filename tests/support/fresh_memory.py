"""Fresh memory with a known content, so that a value which nobody has set is seen."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """Let torch fill the memory of `torch.empty` with NaN, and with the largest number in integers."""
    assert torch.utils.deterministic.fill_uninitialized_memory, "torch's default"
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
