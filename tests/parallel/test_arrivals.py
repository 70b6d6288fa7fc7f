"""Ranks that come to a store which an earlier attempt has left behind, ended at any point."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from parallel import failures
from parallel.arrivals import COUNT, SETTLED, Arrivals
from parallel.host_comm import HostComm, LostRankError
from parallel.store_calls import connection_to

SIZE = 3


def parts_of(store: Any) -> list[str | None]:
    """Let all ranks come, each in a thread; return what the part of each has under a key that rank 0 sets."""

    def come(rank: int) -> str | None:
        arrivals = Arrivals(store, rank, 5.0)
        part = arrivals.part(5.0)
        if part is None:
            return None
        if rank == 0:
            part.set("mine", str(id(arrivals)))
            while not part.check([f"here/{other}" for other in range(1, SIZE)]):
                arrivals.answer()
            arrivals.settle()
        part.set(f"here/{rank}", "")
        return part.get("mine").decode()

    with ThreadPoolExecutor(SIZE) as ranks:
        return [*ranks.map(come, range(SIZE))]


def test_what_an_earlier_attempt_has_left_does_not_count() -> None:
    store = dist.HashStore()
    assert Arrivals(store, 1, 5.0).part(0.01) is None, "rank 0 hasn't come"
    store.add(COUNT, 1)  # a rank that has ended before it could say who it is
    names, keys = [], []
    for _ in range(3):
        (name,) = {*parts_of(store)}
        names.append(name)
        keys.append(store.num_keys())
    assert keys[2] - keys[1] == 1 + SIZE, "those of the new part alone: `mine`, and each rank's `here`"
    assert len({*names} - {None}) == 3
    for number in range(1, 1 + store.add(COUNT, 0)):
        assert not store.check([f"{COUNT}/{number}"]), "what was answered is forgotten"
    # Those that had ended are looked at again by each attempt; nobody else is.
    assert store.get(SETTLED) == b"1"


def test_a_second_attempt_on_the_same_store() -> None:
    """torchrun keeps the store when it starts the ranks again; rank 2 has ended before it came."""
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)

    def come(rank: int, seconds: float) -> str:
        store = dist.TCPStore("127.0.0.1", server.port, None, False, wait_for_workers=False)
        try:
            comm = HostComm.of(store, rank, SIZE, patience=20.0, timeout=timedelta(seconds=seconds))
        except LostRankError as error:
            return str(error)
        return f"{comm.all_reduce(rank, sum)} {failures.Failures(comm)._count}"

    with ThreadPoolExecutor(SIZE) as ranks:
        first = [*ranks.map(come, range(SIZE - 1), [2.0] * (SIZE - 1))]
        second = [*ranks.map(come, range(SIZE), [30.0] * SIZE)]
    assert first == ["rank 2 didn't come within 2 s"] * (SIZE - 1)
    assert second == ["3 0"] * SIZE


def test_rank_0_that_does_not_come_is_named() -> None:
    with pytest.raises(LostRankError, match=r"^initialize\(\): rank 0 didn't come within 0.1 s, or has"):
        HostComm.of(dist.HashStore(), 1, 2, doing="initialize()", timeout=timedelta(seconds=0.1))


def test_one_further_connection_for_each_store() -> None:
    store, other = dist.HashStore(), dist.HashStore()
    held = connection_to(store)
    assert connection_to(store) is held
    assert connection_to(other) is not held
