"""Garbage collected between steps, failures looked for in waits for a GPU, timeouts, threads of the host."""

import gc
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from models import Stack, global_batches, make_engine, micro_batches, seeded
from ranks import Ranks

import parallel
from parallel.failures import Failures, RankFailedError
from parallel.host_comm import HostComm
from uni3d.engine import step_numbers
from uni3d.engine.host_threads import use_cores
from uni3d.engine.step_numbers import wait_for


class Knot:
    """An object that only the garbage collector frees."""

    def __init__(self) -> None:
        self.itself = self


class Collections:
    """Collections of garbage, each by the place where it came."""

    def __init__(self) -> None:
        self.place = "outside"
        self.seen: list[str] = []

    def note(self, phase: str, _info: dict[str, int]) -> None:
        if phase == "start":
            self.seen.append(self.place)

    def knots(self, *_: Any) -> None:
        """Make garbage in a step."""
        self.place = "step"
        for _ in range(500):
            Knot()
        self.place = "later"


@pytest.fixture
def collections() -> Iterator[Collections]:
    made, thresholds = Collections(), gc.get_threshold()
    gc.callbacks.append(made.note)
    gc.set_threshold(50, 5, 5)
    yield made
    gc.set_threshold(*thresholds)
    gc.callbacks.remove(made.note)


@pytest.mark.usefixtures("alone")
def test_garbage_is_collected_after_a_step(collections: Collections) -> None:
    engine = make_engine(seeded(Stack))
    engine.module.register_forward_hook(collections.knots)
    for _ in range(2):
        engine.train_batch(micro_batches(global_batches(1), engine))
        for _ in range(100):
            Knot()
    assert "later" in collections.seen
    assert "step" not in collections.seen


@pytest.mark.usefixtures("alone")
def test_a_script_that_has_disabled_collection_keeps_it_so() -> None:
    engine = make_engine(seeded(Stack))
    gc.disable()
    try:
        engine.train_batch(micro_batches(global_batches(1), engine))
        assert not gc.isenabled()
    finally:
        gc.enable()


class Event:
    """An event that comes after some looks at it."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def query(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def looking_case() -> str:
    failures, rank = Failures(HostComm()), dist.get_rank()
    with failures.told("step 1"):
        pass
    failures.look()
    error = ""
    if rank == 1:
        with pytest.raises(OSError, match="a disk"), failures.told("step 2"):
            raise OSError("a disk")
    elif rank == 0:
        with mock.patch.object(step_numbers, "LOOK_S", 0.01), failures.told("step 2"):
            with pytest.raises(RankFailedError) as caught:
                wait_for(Event(10**9), failures.look)  # type: ignore[arg-type]
            error = str(caught.value)
    else:  # it has ended step 2 before it learns of it
        with failures.told("step 2"):
            time.sleep(0.5)
        with failures.told("step 3"), pytest.raises(RankFailedError) as caught:
            failures.look()
        error = str(caught.value)
    dist.barrier()
    return error


def test_a_rank_that_waits_for_its_gpu_learns_of_another_that_failed(ranks: Ranks) -> None:
    first, failed, late = ranks.run(3, looking_case)
    assert not failed
    for error in (first, late):
        assert error == "another rank failed: rank 1: OSError: a disk"


def test_an_event_is_waited_for() -> None:
    event = Event(3)
    wait_for(event, lambda: pytest.fail("there is no need to look"))  # type: ignore[arg-type]
    assert event.looks == -1


def test_the_timeout_is_that_of_all_groups() -> None:
    made = mock.Mock()
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(dist, "init_process_group", made),
        mock.patch.object(torch.cuda, "set_device"),
    ):
        parallel.start_process_group("cuda", timedelta(seconds=7))
    device = torch.device("cuda", 1)
    made.assert_called_once_with("nccl", timeout=timedelta(seconds=7), device_id=device)


def timeouts_case() -> float:
    dist.destroy_process_group()
    config = {"parallel": {"timeout_seconds": 17.0, "device": "cpu"}}
    engine = make_engine(seeded(Stack), config=config)
    make_engine(seeded(Stack), config=config)  # a second one of the same timeout
    group: Any = engine.model.topology.mesh.get_group("shard")
    seconds: float = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return seconds


def test_the_config_sets_the_timeout(ranks: Ranks) -> None:
    assert ranks.run(1, timeouts_case) == [17.0]


def late_timeout_case() -> None:
    with pytest.raises(ValueError, match=r"parallel.timeout_seconds is 17, but the process group has been"):
        make_engine(seeded(Stack), config={"parallel": {"timeout_seconds": 17}})


def test_a_timeout_after_the_group_was_started_is_refused(ranks: Ranks) -> None:
    ranks.run(1, late_timeout_case)


@pytest.mark.parametrize(
    ("given", "threads", "expected"), [("1", 1, 8), (None, 1, 1), ("3", 3, 3), ("2", 1, 1)]
)
def test_an_offloaded_optimizer_has_its_share_of_the_cores(
    given: str | None, threads: int, expected: int
) -> None:
    before, environment = torch.get_num_threads(), {"LOCAL_WORLD_SIZE": "2"}
    with mock.patch.dict(os.environ, environment | ({} if given is None else {"OMP_NUM_THREADS": given})):
        if given is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        torch.set_num_threads(threads)
        try:
            with mock.patch.object(os, "sched_getaffinity", return_value=set(range(16))):
                use_cores()
            assert torch.get_num_threads() == expected
        finally:
            torch.set_num_threads(before)
