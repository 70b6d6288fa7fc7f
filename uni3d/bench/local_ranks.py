"""Ranks on this machine, started through torch's elastic launcher, as `torchrun --standalone` does."""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

LOOPBACK = "127.0.0.1"
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def run_ranks(work: Callable[..., Any], nproc: int, *args: Any) -> list[Any]:
    """Run `work(*args)` on `nproc` new processes with torchrun's environment; return their results by rank.

    If one fails, the others are ended. A signal to this process ends them all.

    Raises:
        ValueError: a rank raised an error, or was ended by a signal; names the rank and the reason.
    """
    quiet = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # of the launcher, whose reports fill a screen
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    defaults = {"KINETO_LOG_LEVEL": "99"}  # torch's profiler says that it starts and stops
    if nproc > 1:
        defaults["OMP_NUM_THREADS"] = "1"  # as torchrun has it, since the ranks share the cores
    if "lo" in (name for _, name in socket.if_nameindex()):
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory(prefix="uni3d-bench-") as folder, _environment(defaults):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=f"{LOOPBACK}:0",
            local_addr=LOOPBACK,
            max_restarts=0,
            monitor_interval=0.1,
            start_method="spawn",
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            results: dict[int, Any] = elastic_launch(config, work)(*args)
        except ChildFailedError as error:
            raise ValueError(_first_reason(error.failures)) from None
        except SignalException as end:  # the ranks are ended by now
            if end.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + end.sigval) from None
        finally:
            logging.disable(quiet)
            for number, handler in handlers.items():  # the launcher leaves its own
                signal.signal(number, handler)
    return [results[rank] for rank in range(nproc)]


@contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Set variables that aren't set, for the processes that are started inside; restore all at the end."""
    before = dict(os.environ)
    os.environ.update({**defaults, **before})
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():  # the launcher adds one, too
            del os.environ[name]
        os.environ.update(before)


def _first_reason(failures: Mapping[int, ProcessFailure]) -> str:
    """Return the rank that failed of itself, not for another's sake, and why."""

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, int, int]:
        rank, failure = item
        return "RankFailedError" in _said(failure), failure.timestamp, rank  # timestamps are whole seconds

    rank, failure = min(failures.items(), key=order)
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        return f"rank {rank} was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"rank {rank}: {_said(failure)}"


def _said(failure: ProcessFailure) -> str:
    """Return the error of a rank, without its traceback."""
    message: Any = failure.message
    return str(message["message"] if isinstance(message, dict) else message)
