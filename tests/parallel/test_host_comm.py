"""Collectives of values and bytes between the CPUs of ranks."""

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from marks import matrix, slow
from ranks import RankError, Ranks

from parallel import HostComm, host_comm, liveness, store_calls
from parallel.host_comm import LostRankError
from parallel.routes import Routes
from parallel.store_calls import SilentStoreError, StoreCalls

LENGTHS = [10, 3_000, 200_000, 20, 5_000]
"""Lengths of one rank's value each: beside its length, alone, and much longer than the others'."""


def value_of(rank: int, lengths: list[int]) -> tuple[int, bytes]:
    return rank, bytes([rank + 1]) * lengths[rank]


def joined(lists: list[list[Any]]) -> list[Any]:
    return [value for values in lists for value in values]


def collectives_case(lengths: list[int]) -> Any:
    comm = HostComm()
    mine = value_of(comm.rank, lengths)
    return comm.all_reduce([mine], joined), comm.gather(mine), comm.broadcast(mine), comm.gather(comm.rank)


@pytest.mark.parametrize(
    ("size", "turn"), [(1, 2), (3, 0), (4, 3), slow(2, 1), slow(3, 1), slow(3, 2), slow(4, 0)]
)
def test_values_of_very_different_lengths(ranks: Ranks, size: int, turn: int) -> None:
    lengths = (LENGTHS[turn:] + LENGTHS[:turn])[:size]
    expected = [value_of(rank, lengths) for rank in range(size)]
    for rank, (everyone, gathered, first, later) in enumerate(ranks.run(size, collectives_case, lengths)):
        assert everyone == expected
        assert gathered == ([] if rank else expected)
        assert first == expected[0]
        assert later == ([] if rank else [*range(size)]), "what follows isn't mixed up with it"


def exchange_case(sizes: list[list[int]]) -> Any:
    comm = HostComm()
    outgoing = {r: np.full(n, 10 * comm.rank + r, np.uint8) for r, n in enumerate(sizes[comm.rank]) if n}
    return {rank: part.tolist() for rank, part in comm.exchange(outgoing).items()}


def test_bytes_for_each_rank(ranks: Ranks) -> None:
    sizes = [[0, 3, 1], [5, 0, 0], [2, 2, 7_000]]
    for rank, received in enumerate(ranks.run(3, exchange_case, sizes)):
        assert received == {r: [10 * r + rank] * sizes[r][rank] for r in range(3) if sizes[r][rank]}


def meeting_case() -> Any:
    """Let ranks 1 and 2 of 3 meet, twice, each time in a thread; return what they say."""
    mine, found = dist.get_rank() - 1, {}

    def meet(name: str) -> None:
        comm = HostComm.meeting(name, mine, 2)
        met = dist.PrefixStore(name, dist.distributed_c10d._get_default_store().clone())
        assert met.check([f"0/{mine}"]), "or the address has another name"
        found[name] = comm.gather(mine), comm.exchange({0: np.full(2, mine, np.uint8)})
        comm.leave()
        assert not met.check([f"0/{mine}"])
        assert not met.check([f"alive/{mine}"])
        with pytest.raises(LostRankError, match="this rank has left"):
            comm.gather(mine)

    threads = [threading.Thread(target=meet, args=(name,)) for name in ("one", "two") if mine >= 0]
    for thread in threads:
        thread.start()
    dist.barrier()
    for thread in threads:
        thread.join()
    dist.barrier()  # before a rank goes on to end the process group
    return {n: (said, {r: part.tolist() for r, part in got.items()}) for n, (said, got) in found.items()}


def test_some_ranks_meet_and_leave_nothing(ranks: Ranks) -> None:
    nobody, first, second = ranks.run(3, meeting_case)
    assert nobody == {}
    assert first == dict.fromkeys(("one", "two"), ([0, 1], {0: [0, 0], 1: [1, 1]}))
    assert second == dict.fromkeys(("one", "two"), ([], {}))


def on_threads(size: int, work: Callable[[HostComm], Any]) -> tuple[list[Any], list[HostComm | None]]:
    """Do `work(comm)` on `size` ranks of this process; return results or errors, and what keeps them open."""
    store = dist.HashStore()
    results: list[Any] = [None] * size
    comms: list[HostComm | None] = [None] * size

    def one(rank: int) -> None:
        try:
            comms[rank] = comm = HostComm.of(store, rank, size)
            results[rank] = work(comm)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, comms


def sent_by(rank: int, size: int) -> dict[int, np.ndarray]:
    drawn = np.random.default_rng(rank)
    targets = drawn.choice(size, min(size, 5), replace=False).tolist()
    return {target: drawn.integers(0, 256, drawn.integers(0, 4_000), np.uint8) for target in targets}


@pytest.mark.parametrize("size", [9, 20, slow(70)])
def test_ranks_that_arent_connected_reach_each_other(size: int) -> None:
    def work(comm: HostComm) -> Any:
        return (
            comm.exchange(sent_by(comm.rank, size)),
            comm.all_reduce([comm.rank], joined),
            comm.gather(comm.rank),
            comm.broadcast("one" if comm.rank == 0 else ""),
        )

    everything = [sent_by(rank, size) for rank in range(size)]
    for rank, (received, reduced, gathered, first) in enumerate(on_threads(size, work)[0]):
        expected = {source: sent[rank] for source, sent in enumerate(everything) if rank in sent}
        assert [*received] == [*expected]
        assert all(np.array_equal(received[source], expected[source]) for source in expected)
        assert reduced == [*range(size)]
        assert gathered == ([] if rank else [*range(size)])
        assert first == "one"


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_rank_has_few_open_descriptors() -> None:
    before, size = descriptors(), 16
    _, open_ones = on_threads(
        size, lambda comm: comm.exchange({r: np.ones(9, np.uint8) for r in range(size)})
    )
    peers = sum(len(connected(rank, size)) for rank in range(size))
    assert len(open_ones) == size
    assert descriptors() - before <= peers + 4 * size  # four for a rank that listens, and waits for events


def connected(rank: int, size: int) -> set[int]:
    return {peer for peers in Routes(rank, size).peers for peer in peers}


@pytest.mark.parametrize(
    ("size", "most"), [(1, 0), (8, 7), (16, 8), (64, 14), (1_000, 36), (1_024, 22), (2_048, 24), (16_384, 31)]
)
def test_peers_of_a_rank_are_few(size: int, most: int) -> None:
    some = range(0, size, 1 + size // 2_000)
    assert max(len(connected(rank, size)) for rank in some) <= most


@pytest.mark.parametrize("size", [1, 2, 8, 9, 63, 100, 130, 513, 600])
def test_routes_lead_everywhere_by_way_of_peers(size: int) -> None:
    routes = [Routes(rank, size) for rank in range(size)]
    for rank, here in enumerate(routes):
        for hop, peers in enumerate(here.peers):
            assert all(rank in routes[peer].peers[hop] for peer in peers), "what is sent is received"
        assert here.children == [r for r in range(1, size) if routes[r].parent == rank]
        assert {here.parent, *here.children} <= connected(rank, size) | {rank}
        for target in {0, size - 1, size // 2, (rank * 7 + 3) % size}:
            at = rank
            for hop in range(here.hops):
                after = here.after(hop, rank, target)
                assert after == at or after in routes[at].peers[hop]
                at = after
            assert at == target


@pytest.mark.parametrize("size", [1, 2, 9, 100, 600])
def test_children_speak_for_ranks_in_order(size: int) -> None:
    def below(rank: int) -> list[int]:
        return [rank, *(r for child in Routes(rank, size).children for r in below(child))]

    assert below(0) == [*range(size)]


@pytest.mark.parametrize("failing", [0, 5, 19])
def test_a_rank_that_raises_in_an_exchange_fails_the_others(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_comm, "TIMEOUT", timedelta(seconds=20))  # if gloo doesn't close a connection
    size = 20

    def fail(*_: int) -> int:
        raise MemoryError("no room for the parts")

    def work(comm: HostComm) -> Any:
        if comm.rank == failing:
            comm._routes.after = fail
        comm.exchange({(comm.rank + 1) % size: np.ones(3_000_000, np.uint8)})
        comm.broadcast(None)
        return comm.all_reduce(1, sum)

    results, _ = on_threads(size, work)
    assert isinstance(results[failing], MemoryError)
    for rank, error in enumerate(results):
        if rank != failing:
            assert isinstance(error, host_comm.LostRankError), error
            assert str(error) == f"rank {failing} failed: MemoryError: no room for the parts"


def dying_case(folder: str) -> None:
    comm = HostComm()
    if comm.rank == 3:
        os._exit(1)
    texts = []
    for _ in range(2):
        try:
            comm.exchange({3: np.ones(5_000_000, np.uint8), 0: np.ones(10, np.uint8)})
        except host_comm.LostRankError as error:
            texts.append(str(error))
    Path(folder, str(comm.rank)).write_text("\n".join(texts))


@pytest.mark.slow
def test_a_rank_that_dies_in_an_exchange_fails_the_others(tmp_path: Path) -> None:
    pool = Ranks()
    try:
        with pytest.raises(RankError, match="rank 3 died"):
            pool.run(4, dying_case, str(tmp_path))
    finally:
        pool.stop()
    for rank in range(3):
        first, again = (tmp_path / str(rank)).read_text().split("\n")
        assert first.startswith("rank 3 has ended, or its connection to rank ")
        assert again == first


def stopping_case(folder: str, stopped: int) -> str:
    """Let a rank stop until the others have given it up; return what each raises."""
    liveness.INTERVAL = 0.2
    comm = HostComm()
    comm.patience, comm.doing = 1, "the save of t1"
    pids = comm.broadcast(comm.all_reduce({comm.rank: os.getpid()}, merged))
    if comm.rank == stopped:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        comm.all_reduce(1, sum)
    except LostRankError as error:
        (Path(folder) / str(comm.rank)).touch()
        if comm.rank == (stopped + 1) % comm.size:
            while len(os.listdir(folder)) < comm.size - 1:
                time.sleep(0.05)
            os.kill(pids[stopped], signal.SIGCONT)
        return str(error)
    return "nothing"


def merged(parts: list[dict[int, int]]) -> dict[int, int]:
    return {rank: pid for part in parts for rank, pid in part.items()}


@pytest.mark.parametrize("stopped", [slow(2), matrix(0), matrix(3)])
def test_a_rank_that_is_stopped_is_named_on_all(tmp_path: Path, stopped: int) -> None:
    pool = Ranks()
    try:
        told = pool.run(4, stopping_case, str(tmp_path), stopped)
    finally:
        pool.stop()
    expected = f"the save of t1: rank {stopped} gave no sign of life for 1 s: {liveness.GONE}"
    assert told == [expected] * 4


def slow_case() -> int:
    liveness.INTERVAL = 0.2
    comm = HostComm()
    comm.patience = 1
    if comm.rank == 1:
        time.sleep(3)
    return comm.all_reduce(1, sum)


@pytest.mark.slow
def test_a_rank_that_is_slow_is_waited_for(ranks: Ranks) -> None:
    assert ranks.run(3, slow_case) == [3, 3, 3]


@pytest.mark.parametrize("leaving", [0, slow(2)])
def test_a_rank_that_leaves_a_work_is_told_of(leaving: int) -> None:
    """It raises outside of any exchange and lives on, so that no connection ends."""
    first = "the save of t1: rank {} failed: ValueError: its own"

    def work(comm: HostComm) -> str:
        comm.patience = 1  # so that they look often
        with pytest.raises(KeyError), comm.at("the save of t0", alike=(KeyError,)):
            raise KeyError("raised by all")
        assert comm.all_reduce(1, sum) == comm.size
        try:
            with comm.at("the save of t1"):
                if comm.rank == leaving:
                    raise ValueError("its own")
                comm.all_reduce(1, sum)
        except (LostRankError, ValueError) as error:
            return str(error)
        return "nothing"

    told, comms = on_threads(3, work)
    assert len(comms) == 3
    assert told == ["its own" if rank == leaving else first.format(leaving) for rank in range(3)]


class SilentStore:
    """A store whose process has stopped."""

    def __init__(self) -> None:
        self.ends = threading.Event()
        self.calls = 0

    def check(self, keys: list[str]) -> bool:
        self.calls += 1
        return self.ends.wait(60)


def test_a_store_that_gives_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_calls, "LEAST_S", 0.05)
    store = SilentStore()
    calls = StoreCalls(store, 0.01)
    for _ in range(2):
        with pytest.raises(SilentStoreError, match=r"no answer for 0.05 s: the process"):
            calls.check(["lost"])
    assert store.calls == 1, "the second needn't wait"
    store.ends.set()
    answers = StoreCalls(dist.HashStore(), 60)
    answers.set("a", "1")
    assert answers.check(["a"])
    assert answers.get("a") == b"1"
    assert answers.compare_set("b", "", "2") == b"2"
    with pytest.raises(TypeError, match="incompatible"):  # as the store's own call
        answers.check("a")  # type: ignore[arg-type]
    answers.delete_key("a")
    assert not answers.check(["a"])


def test_the_signs_of_a_rank_say_when_the_next_is_due() -> None:
    """A rank that hasn't been told of a short patience yet gives signs as seldom as before."""
    store = dist.HashStore()
    life = liveness.Liveness(store, 0, 2)
    life.patience = 0.04
    assert life.interval == liveness.SHORTEST
    store.set("alive/1", "7 0.2")
    later = threading.Timer(0.1, store.set, ("alive/1", "8 0.2"))
    later.start()
    assert life.gone(1) == []
    later.join()
    assert life.gone(1) == [1]
    life.end()
