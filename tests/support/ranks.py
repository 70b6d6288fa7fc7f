"""Real ranks for tests: gloo processes, started once, that run many cases.

A case is a function in a test file, `case(*args)`, that every rank runs in a process group. Each call gets
its own group and rendezvous, so cases share nothing but imports. A case that takes too long fails, with the
stacks of all its ranks printed.
"""

import contextlib
import faulthandler
import functools
import gc
import importlib.util
import logging
import multiprocessing as mp
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection
from types import MappingProxyType, ModuleType
from typing import Any
from unittest import mock

TIMEOUT_S = 120


class RankError(AssertionError):
    """Failure of a case; the message has each failing rank's traceback."""


class CrashError(RankError):
    """Abort of a rank by native code."""


class Ranks:
    """Pool of up to `size` worker processes, which start with further variables of the environment."""

    def __init__(self, size: int = 4, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        self._size = size
        self._environment = environment
        self._workers: list[tuple[mp.process.BaseProcess, Connection]] = []

    def run(
        self, world_size: int, case: Callable[..., Any], *args: Any, timeout: float = TIMEOUT_S
    ) -> list[Any]:
        """Run `case(*args)` on ranks 0 to world_size - 1; return the results by rank."""
        try:
            return self._run(world_size, case, args, timeout)
        except RankError as error:
            # Rarely, about once in ten thousand cases, gloo fails to connect, or torch's native code aborts
            # ("free(): invalid pointer", in a case of FSDP alone): the case isn't at fault, nor its Python.
            if "connectFullMesh failed" not in str(error) and not isinstance(error, CrashError):
                raise
            print(f"{case.__name__} runs again: {error}", file=sys.stderr)
            self.stop()
            return self._run(world_size, case, args, timeout)

    def _run(
        self, world_size: int, case: Callable[..., Any], args: tuple[Any, ...], timeout: float
    ) -> list[Any]:
        self._start()
        rendezvous = tempfile.mktemp(prefix="uni3d-rendezvous-")
        for rank in range(world_size):
            task = (case.__code__.co_filename, case.__name__, rank, world_size, rendezvous, args)
            self._workers[rank][1].send(task)
        replies: list[tuple[bool, Any]] = []
        for process, pipe in self._workers[:world_size]:
            try:
                replies.append(pipe.recv() if pipe.poll(timeout) else self._give_up(process, timeout))
            except EOFError:
                process.join(5)
                crashed = process.exitcode in (-signal.SIGABRT, -signal.SIGSEGV)
                self.stop()
                kind = CrashError if crashed else RankError
                raise kind(f"rank {len(replies)} died running {case.__name__}") from None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(rendezvous)
        errors = [f"rank {rank}:\n{reply}" for rank, (ok, reply) in enumerate(replies) if not ok]
        if errors:
            raise RankError("\n".join(errors))
        return [reply for _, reply in replies]

    def stop(self) -> None:
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers.clear()

    def _start(self) -> None:
        if self._workers:
            return
        context = mp.get_context("spawn")
        os.environ["OMP_NUM_THREADS"] = "1"  # inherited; several ranks share few cores
        with mock.patch.dict(os.environ, self._environment):
            for _ in range(self._size):
                mine, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self._workers.append((process, mine))

    def _give_up(self, process: mp.process.BaseProcess, timeout: float) -> tuple[bool, Any]:
        for worker, _ in self._workers:
            if worker.pid is not None:
                os.kill(worker.pid, signal.SIGUSR1)  # each prints its stacks
        process.join(2)
        self.stop()
        raise RankError(f"no answer within {timeout:g} s; the ranks' stacks are on stderr")


def _work(pipe: Connection) -> None:
    """Run cases until the pipe closes: the main loop of a worker."""
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
    modules: dict[str, ModuleType] = {}
    cleaner = Cleaner()
    while True:
        try:
            file, name, rank, world_size, rendezvous, args = pipe.recv()
        except EOFError:
            return
        pipe.send(_run_case(modules, file, name, rank, world_size, rendezvous, args))
        cleaner.clean()


def _run_case(
    modules: dict[str, ModuleType], file: str, name: str, rank: int, world: int, rendezvous: str, args: Any
) -> tuple[bool, Any]:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("error")  # as pytest does in its own process
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # advice on full_tensor's speed
    environment = dict(os.environ)
    try:
        if file not in modules:
            spec = importlib.util.spec_from_file_location(f"case_{len(modules)}", file)
            assert spec is not None, file
            assert spec.loader is not None, file
            modules[file] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[file])
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        return True, getattr(modules[file], name)(*args)
    except BaseException:
        return False, traceback.format_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name in os.environ.keys() - environment.keys():  # libraries read them in later cases
            del os.environ[name]
        os.environ.update(environment)


class Cleaner:
    """Releases a case's process groups: each has threads that wake up now and then, and hundreds add up.

    Engines are in reference cycles, and torch caches sharding decisions with the meshes they are for. What
    imports have made is frozen, so that the collector looks through a case's own objects alone.
    """

    def __init__(self) -> None:
        self._caches: list[Any] = []
        self._modules = 0

    def clean(self) -> None:
        from torch.distributed.tensor import _redistribute
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()
        if hasattr(_redistribute, "clear_redistribute_planner_cache"):
            _redistribute.clear_redistribute_planner_cache()
        imported = len(sys.modules) > self._modules
        if imported:
            made = [o for o in gc.get_objects() if type(o) is functools._lru_cache_wrapper]
            self._caches += [o for o in made if o.__module__.startswith("torch.distributed.")]
        for cached in self._caches:
            cached.cache_clear()
        gc.collect()
        if imported:
            self._modules = len(sys.modules)
            gc.freeze()
