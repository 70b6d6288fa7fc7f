"""Fixtures of all tests."""

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

TESTS = Path(__file__).parent
FOLDERS = [
    TESTS / "support",
    TESTS / "faults",
    TESTS / "ckpt",  # helpers that the faults use too
    TESTS / "models",
    TESTS / "uni3d",
    TESTS.parent / "examples" / "megatron_gpt",
]
sys.path[:0] = map(str, FOLDERS)

from ranks import Ranks  # noqa: E402

# torch's store looks up the name of each connection's address in its only thread. Where a name server is slow
# or gone, it would answer nobody for 10 s.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


def pytest_collection_finish() -> None:
    """Leave the tests and all imported modules out of every later garbage collection."""
    gc.freeze()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Worker processes, started when a test first needs them."""
    pool = Ranks()
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def memory_path() -> Iterator[Path]:
    """A folder in memory if the system has one, for tests that write thousands of files and sync none."""
    shared = Path("/dev/shm")
    usable = shared.is_dir() and os.access(shared, os.W_OK)
    path = Path(tempfile.mkdtemp(prefix="ckpt-tests-", dir=shared if usable else None))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def object_store() -> Iterator[Any]:
    """An S3 server on loopback, an `ObjectStore`, started when a test first needs it."""
    from object_store import served

    with served() as store:
        yield store


@pytest.fixture(scope="module")
def fresh_ranks(ranks: Ranks) -> Iterator[None]:
    """Worker processes of a file's own: accelerate and its like keep what one case told them for the next."""
    ranks.stop()
    yield
    ranks.stop()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test's own process is the only rank, as a script that torchrun didn't start."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def imports_case() -> None:
    """Do nothing; running it imports this file and its imports on a rank."""
    import hf_models

    assert hf_models.STEPS


@pytest.fixture(scope="session")
def hf_ranks(ranks: Ranks) -> Ranks:
    """Ranks that have imported the Hugging Face library, which takes a while."""
    ranks.run(2, imports_case, timeout=300)
    return ranks
