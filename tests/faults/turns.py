"""Ranks of one process that take turns, and ranks as processes of which one may die."""

import os
import pickle
import signal
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

SECONDS = 30
"""Longest life of a forked rank, rather than a hang."""


class Together:
    """Collectives out of one call that returns everyone's values."""

    rank: int
    size: int

    def all(self, value: Any) -> list[Any]:
        raise NotImplementedError

    def gather(self, value: Any) -> list[Any]:
        everyone = self.all(value)
        return [] if self.rank else everyone

    def broadcast(self, value: Any) -> Any:
        return self.all(value)[0]

    def all_reduce(self, value: Any, merge: Callable[[list[Any]], Any]) -> Any:
        return merge(self.all(value))

    def exchange(self, outgoing: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        everyone = enumerate(self.all(outgoing))
        return {rank: sent[self.rank] for rank, sent in everyone if self.rank in sent}


class Turns:
    """Threads of which one runs at a time, from collective to collective, so that a run can be repeated."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.boards: list[dict[int, Any]] = []
        self.ended: set[int] = set()
        self.batons = [threading.Semaphore(0) for _ in range(size)]

    def pass_on(self, rank: int) -> None:
        following = ((rank + i) % self.size for i in range(1, self.size + 1))
        alive = next((r for r in following if r not in self.ended), None)
        if alive is not None:
            self.batons[alive].release()


class TurnComm(Together):
    """One of the ranks that take turns. If one ends early, the others' collectives fail."""

    def __init__(self, rank: int, turns: Turns) -> None:
        self.rank, self.size, self.turns, self.calls = rank, turns.size, turns, 0

    def all(self, value: Any) -> list[Any]:
        boards, self.calls = self.turns.boards, self.calls + 1
        if len(boards) < self.calls:
            boards.append({})
        board = boards[self.calls - 1]
        board[self.rank] = value
        self.turns.pass_on(self.rank)
        self.turns.batons[self.rank].acquire()
        if len(board) < self.size:
            raise ConnectionError("a rank has left")
        return list(pickle.loads(pickle.dumps([board[rank] for rank in range(self.size)])))


def in_turns(size: int, work: Callable[[Any], Any]) -> list[Any]:
    """Do `work(comm)` on `size` ranks; return each one's result, or the exception that it raised."""
    turns, results = Turns(size), [None] * size

    def one(rank: int) -> None:
        turns.batons[rank].acquire()
        try:
            results[rank] = work(TurnComm(rank, turns))
        except BaseException as error:
            results[rank] = error
        turns.ended.add(rank)
        turns.pass_on(rank)

    threads = [threading.Thread(target=one, args=(rank,), name=f"rank {rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    turns.batons[0].release()
    for thread in threads:
        thread.join()
    return results


class PipeComm(Together):
    """A rank in a process of its own, joined to rank 0 by a pipe; a process that ends breaks it."""

    def __init__(self, rank: int, size: int, pipes: dict[int, Connection]) -> None:
        self.rank, self.size, self.pipes = rank, size, pipes

    def all(self, value: Any) -> list[Any]:
        try:
            if self.rank:
                self.pipes[0].send(value)
                return list(self.pipes[0].recv())
            everyone = [value, *(self.pipes[rank].recv() for rank in range(1, self.size))]
            for pipe in self.pipes.values():
                pipe.send(everyone)
        except EOFError as error:
            raise ConnectionError("a rank has left") from error
        return list(pickle.loads(pickle.dumps(everyone)))


def forked(work: Callable[[], int], seconds: int = SECONDS) -> int:
    """Begin `work` in a child process that exits with what it returns; return its id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        signal.alarm(seconds)
        code = work()
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for a child process; return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_processes(size: int, work: Callable[[Any], int]) -> list[int]:
    """Do `work(comm)` in `size` processes; return their exit codes."""
    joints = {rank: Pipe() for rank in range(1, size)}

    def one(rank: int) -> int:
        for other, (at_0, at_other) in joints.items():
            if rank:
                at_0.close()
            if other != rank:
                at_other.close()
        pipes = {0: joints[rank][1]} if rank else {other: joint[0] for other, joint in joints.items()}
        return work(PipeComm(rank, size, pipes))

    pids = [forked(lambda rank=rank: one(rank)) for rank in range(size)]  # type: ignore[misc]
    for joint in joints.values():
        for end in joint:
            end.close()
    return [ended(pid) for pid in pids]
