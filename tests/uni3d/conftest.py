"""Fixtures of the tests of `uni3d`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test's own process is the only rank, as a script that torchrun didn't start."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
