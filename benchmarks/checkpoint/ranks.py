"""Processes that are measured together: functions run on all ranks of a gloo group."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

TIMEOUT_S = 900


@dataclass
class Rank:
    """First argument of a function that runs on a rank."""

    rank: int
    world: int
    kept: dict[str, Any] = field(default_factory=dict)
    """Values that calls leave for later ones, until the group ends."""


class Timing(NamedTuple):
    seconds: float
    """Time from the first rank's start to the last one's end."""
    each: list[float]
    """Seconds of each rank."""
    results: list[Any]


class Group:
    """Ranks 0 to `world` - 1, in one process group."""

    def __init__(self, pool: Pool, world: int) -> None:
        self._pool = pool
        self.world = world

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """Run `function(rank, ...)` on every rank; return the results by rank."""
        return self._pool.ask(self.world, [("call", partial(function, **options), args)] * self.world)

    def time(self, function: Callable[..., Any], *args: Any, **options: Any) -> Timing:
        """Run and time it. All ranks begin together, after a barrier."""
        replies = self._pool.ask(self.world, [("time", partial(function, **options), args)] * self.world)
        starts, ends, results = zip(*replies, strict=True)
        each = [end - start for start, end in zip(starts, ends, strict=True)]
        return Timing(max(ends) - min(starts), each, list(results))


class Pool:
    """`size` processes that outlive their groups, with one compute thread each."""

    def __init__(self, size: int) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # the processes inherit it
        context = mp.get_context("spawn")
        self._workers: list[tuple[mp.process.BaseProcess, Connection]] = []
        for _ in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, mine))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for process, _pipe in self._workers:
            process.kill()
            process.join()

    @contextmanager
    def group(self, world: int) -> Iterator[Group]:
        """Make a process group over the first `world` processes."""
        with tempfile.TemporaryDirectory(prefix="rendezvous-") as folder:
            meet = f"file://{folder}/meet"
            self.ask(world, [("join", rank, world, meet) for rank in range(world)])
            yield Group(self, world)
            self.ask(world, [("leave",)] * world)

    def ask(self, world: int, messages: list[tuple[Any, ...]]) -> list[Any]:
        """Send a message to each of the first `world` processes; return their answers."""
        pipes = [pipe for _, pipe in self._workers[:world]]
        for pipe, message in zip(pipes, messages, strict=True):
            pipe.send(message)
        answers: dict[int, Any] = {}
        while len(answers) < world:
            ready = wait([p for i, p in enumerate(pipes) if i not in answers], timeout=TIMEOUT_S)
            if not ready:
                raise RuntimeError(f"no answer within {TIMEOUT_S} s from some of {world} ranks")
            for rank in (i for i, p in enumerate(pipes) if p in ready):
                ok, answer = pipes[rank].recv()
                if not ok:  # the other ranks may wait for this one: give up at once
                    raise RuntimeError(f"rank {rank} of {world}:\n{answer}")
                answers[rank] = answer
        return [answers[rank] for rank in range(world)]


def _work(pipe: Connection) -> None:
    """Answer messages until the pipe closes."""
    import torch

    torch.set_num_threads(1)
    rank = Rank(0, 1)
    while True:
        try:
            kind, *payload = pipe.recv()
        except EOFError:
            return
        try:
            if kind == "join":
                rank = _join(*payload)
                answer = None
            elif kind == "leave":
                _leave(rank)
                answer = None
            elif kind == "time":
                answer = _timed(rank, *payload)
            else:
                function, args = payload
                answer = function(rank, *args)
            pipe.send((True, answer))
        except BaseException:
            with suppress(BrokenPipeError):
                pipe.send((False, traceback.format_exc()))


def _join(rank: int, world: int, meet: str) -> Rank:
    import torch.distributed as dist

    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=timeout)
    return Rank(rank, world)


def _leave(rank: Rank) -> None:
    import torch.distributed as dist

    rank.kept.clear()
    gc.collect()
    dist.destroy_process_group()


def _timed(rank: Rank, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[float, float, Any]:
    import torch.distributed as dist

    gc.collect()
    dist.barrier()
    start = time.perf_counter()  # the same clock in all processes
    result = function(rank, *args)
    return start, time.perf_counter(), result
