"""Errors of a rank, and what the others say of them."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from ranks import Ranks

from parallel import failures, liveness
from parallel.failures import Failures, RankFailedError, connect
from parallel.host_comm import HostComm, LostRankError
from parallel.store_calls import SilentStoreError
from parallel.topology import Meeting

TEXTS = [
    "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1000ms for recv",
    "Application timeout caused pair closure",
]


def lost_case(text: str) -> str:
    with (
        mock.patch.object(failures, "PATIENCE_S", 0.1),
        pytest.raises(RankFailedError) as caught,
        Failures(HostComm()).told("step 3: train_batch()"),
    ):
        raise RuntimeError(text)
    return str(caught.value)


@pytest.mark.parametrize("text", TEXTS)
def test_gloos_own_words_are_a_lost_connection(ranks: Ranks, text: str) -> None:
    assert ranks.run(1, lost_case, text) == [
        "step 3: train_batch() failed: the connection to another rank was lost; see its last output"
    ]


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(LostRankError) as caught:
        HostComm.of(dist.HashStore(), 0, 3, doing="initialize()", timeout=timedelta(seconds=0.2))
    assert str(caught.value) == "initialize(): ranks 1, 2 didn't come within 0.2 s"


def alive_case() -> str:
    with mock.patch.multiple(failures, PATIENCE_S=2), mock.patch.multiple(liveness, INTERVAL=1.0):
        told = Failures(HostComm())
        dist.barrier()
        with pytest.raises(RankFailedError) as lost, told.told("step 3: train_batch()"):
            raise RuntimeError(TEXTS[0])
        dist.barrier()
        return str(lost.value)


def test_a_timeout_without_a_lost_rank_keeps_its_words(ranks: Ranks) -> None:
    expected = f"step 3: train_batch() failed, though all ranks give signs of life: RuntimeError: {TEXTS[0]}"
    assert ranks.run(2, alive_case) == [expected] * 2


def look_on(told: Failures) -> None:
    """Look until another rank has failed, as a rank does that waits for its GPU."""
    while True:
        told.look()
        time.sleep(0.05)


def waiting_case() -> tuple[str, str]:
    """Let rank 1 stop; return what rank 0 says of a lost connection, and where it waits for its GPU."""
    liveness.INTERVAL = 0.2
    comm = HostComm()
    comm.patience = 1
    failures.PATIENCE_S = 1
    told = Failures(comm)
    pids = comm.broadcast(comm.all_reduce({comm.rank: os.getpid()}, lambda parts: {**parts[0], **parts[1]}))
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        return "", ""
    with pytest.raises(RankFailedError) as lost, told.told("step 3: train_batch()"):
        raise RuntimeError(TEXTS[0])
    with pytest.raises(RankFailedError) as waits, told.told("step 4: train_batch()"):
        look_on(told)
    os.kill(pids[1], signal.SIGCONT)
    return str(lost.value), str(waits.value)


def test_a_rank_without_signs_of_life_is_named() -> None:
    pool = Ranks(2)
    try:
        (lost, waits), _ = pool.run(2, waiting_case)
    finally:
        pool.stop()
    assert lost == (
        "step 3: train_batch() failed on rank 1: no sign of life for 1 s: "
        f"{liveness.GONE}; see its last output"
    )
    assert waits == f"another rank failed: rank 1 gave no sign of life for 1 s: {liveness.GONE}"


def test_signs_are_given_while_a_thread_waits_for_a_key() -> None:
    """torch's own calls wait in the store for ranks that are late, which mustn't look lost meanwhile."""
    second = timedelta(seconds=1)
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    stores = [dist.TCPStore("127.0.0.1", server.port, None, False, wait_for_workers=False) for _ in range(2)]
    meetings = [Meeting(store, rank, 2) for rank, store in enumerate(stores)]
    comms: dict[int, HostComm] = {}

    def come() -> None:
        comm = connect("initialize()", "cpu", 1, second)[1]
        comms[comm.rank] = comm

    with mock.patch.object(failures, "meet", side_effect=meetings):
        threads = [threading.Thread(target=come) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    life = comms[0].life
    assert life is not None
    waiting = threading.Thread(target=wait_in_vain, args=(stores[1],))
    waiting.start()
    time.sleep(0.2)
    before = life.look()
    assert before.keys() == {0, 1}
    time.sleep(1.5)
    assert life.silent(before) == []
    waiting.join()


def wait_in_vain(store: dist.TCPStore) -> None:
    with pytest.raises(dist.DistStoreError):
        store.wait(["never"], timedelta(seconds=3))


SAME, NEXT = {0: b"7 0.01", 1: b"7 0.01"}, {0: b"8 0.01", 1: b"8 0.01"}
"""Signs of life of two ranks, and later ones."""


@pytest.mark.parametrize(
    ("looks", "silent"),
    [
        ([(0, SAME), (0, SAME)], [1]),
        ([(1, SAME), (0, NEXT)], []),  # the store was held up, and so was the other's sign
        ([(0, SAME), (0, NEXT)], []),  # the first was answered at the end of such a time
        ([(0, SAME), (1, SAME), (0, SAME), (0, SAME)], [1]),
        ([(0, SAME), (1, SAME), (0, SAME), (0, NEXT)], []),
        ([(0, {}), (0, {})], []),  # there is no store any more
    ],
)
def test_a_store_that_is_held_up(looks: list[tuple[float, liveness.Signs]], silent: list[int]) -> None:
    life = liveness.Liveness(dist.HashStore(), 0, 2)
    left = iter(looks)

    def look(_: liveness.Liveness) -> liveness.Signs:
        seconds, signs = next(left)
        time.sleep(seconds * 2 * liveness.PROMPT_S)
        return signs

    with mock.patch.object(liveness.Liveness, "look", look):
        assert life.silent(SAME) == silent
    life.end()


def test_a_rank_that_was_lost_before_its_second_sign_is_known() -> None:
    store = dist.HashStore()
    with mock.patch.object(liveness, "_give_signs"):
        lives = [liveness.Liveness(store, rank, 2, patience=0.2) for rank in range(2)]
    assert lives[0].come([1], 5.0) is None
    lives[0].gone(1)
    time.sleep(0.2)
    assert lives[0].gone(1) == [1]


def test_a_rank_that_raises_while_it_connects_tells_the_others() -> None:
    store, come = dist.HashStore(), liveness.Liveness.come

    def odd(life: liveness.Liveness, *rest: Any) -> str | None:
        if life._rank == 1:
            raise ValueError("odd")
        return come(life, *rest)

    def connected(rank: int) -> str:
        with pytest.raises((LostRankError, ValueError)) as caught:
            HostComm.of(store, rank, 2, patience=2.0, timeout=timedelta(seconds=60))
        return f"{caught.type.__name__}: {caught.value}"

    with mock.patch.object(liveness.Liveness, "come", odd), ThreadPoolExecutor(2) as ranks:
        assert [*ranks.map(connected, range(2))] == [
            *("LostRankError: rank 1 failed: ValueError: odd", "ValueError: odd")
        ]


def test_a_silent_store_names_the_work() -> None:
    told = Failures(HostComm.of(dist.HashStore(), 0, 1))
    with pytest.raises(RankFailedError) as caught, told.told("initialize()"):
        raise SilentStoreError(30)
    assert str(caught.value).startswith(
        "initialize() failed: the rendezvous store has given no answer for 30 s"
    )


def test_a_second_attempt_has_another_part_of_the_store() -> None:
    store = dist.HashStore()
    with mock.patch.object(failures, "meet", return_value=Meeting(store, 0, 1)):
        parts = [connect("initialize()", "cpu", 5.0, None)[0].store for _ in range(2)]
    parts[0].set("key of a process group", "")
    assert not parts[1].check(["key of a process group"])


def test_without_a_store_ranks_are_waited_for_no_longer_than_their_patience() -> None:
    life = liveness.Liveness(dist.HashStore(), 0, 2, patience=0.3)
    with mock.patch.object(life._store, "check", side_effect=dist.DistNetworkError("Broken pipe")):
        assert life.reason() is None, "rank 0 may have ended, as it has nothing left to do"
        time.sleep(0.3)
        assert life.reason() == f"the connection to the rendezvous store is lost, {liveness.OWNER}"
    life.end()
