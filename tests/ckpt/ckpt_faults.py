"""Fault injection: the k-th call to the file system fails, or the process dies there."""

import errno
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from ckpt.stores import files

CALLS = ("open", "pwritev", "fsync", "mkdir", "link", "rename", "unlink", "rmdir")
"""Functions of `os` by which a save changes the disk, including through `pathlib` and `shutil`."""

NATIVE = ("exchange_folders", "sync_tree")
"""Functions of `ckpt.stores.files` that make system calls which `os` doesn't have."""

OWNERS = ((os, CALLS), (files, NATIVE), (shutil, ("copyfile",)))


class Faults:
    """Counts the calls that change the disk, and calls `at_fault` instead of the k-th, or before it.

    A failing write first writes `part` of its first buffer; `error` is the number of the error. Nothing is
    really synced: the tests are about the order of calls.
    """

    def __init__(
        self,
        k: int,
        *,
        forever: bool = False,
        at_fault: Callable[[], None] | None = None,
        goes_on: bool = False,
        part: float = 0.5,
        error: int = errno.EIO,
    ) -> None:
        self.k, self.forever, self.at_fault, self.goes_on = k, forever, at_fault, goes_on
        self.part, self.error = part, error
        self.names: list[str] = []
        self.threads: list[str] = []
        self.struck: list[str] = []
        self.lock = threading.Lock()

    def _due(self, name: str) -> bool:
        with self.lock:
            self.names.append(name)
            self.threads.append(threading.current_thread().name)
            due = len(self.names) == self.k or (self.forever and len(self.names) > self.k)
            if due:
                self.struck.append(name)
            return due

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._due(name):
                return None if name in ("fsync", "sync_tree") else real(*args, **kwargs)
            if self.goes_on:
                assert self.at_fault is not None
                self.at_fault()
                return None if name in ("fsync", "sync_tree") else real(*args, **kwargs)
            if name == "pwritev":
                fd, views, offset = args
                os.pwrite(fd, views[0][: int(len(views[0]) * self.part)], offset)
            if name == "copyfile":
                with open(args[0], "rb") as old, open(args[1], "wb") as new:
                    new.write(old.read(os.stat(args[0]).st_size // 2))
            if self.at_fault is not None:
                self.at_fault()
            path = [] if name in ("pwritev", "fsync") else [os.fspath(args[0])]  # as the system tells it
            raise OSError(self.error, f"injected into {name}", *path)

        return call

    @contextmanager
    def active(self) -> Iterator["Faults"]:
        with ExitStack() as stack:
            for owner, names in OWNERS:
                wrapped = {name: self._wrap(name, getattr(owner, name)) for name in names}
                stack.enter_context(mock.patch.multiple(owner, **wrapped))
            yield self


def killed_at(k: int, work: Callable[[], object]) -> bool:
    """Do `work` in a process that dies at its k-th call; return False if it ended before."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # other tests' libraries leave threads, of which fork warns
        pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # rather than hang
        try:
            with Faults(k, at_fault=lambda: os._exit(9)).active():
                work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9), f"the child ended with {status}"
    return status == 9


@contextmanager
def recorded() -> Iterator[list[tuple[str, str, str]]]:
    """Record the calls `(name, path, thread)`, in order. Nothing is really synced.

    The path of a move or a link is `from -> to`; that of a file removed with its folder is its name.
    """
    calls: list[tuple[str, str, str]] = []
    paths: dict[int, str] = {}
    lock = threading.Lock()
    real_open, real_pwritev = os.open, os.pwritev

    def note(name: str, path: object) -> None:
        with lock:
            calls.append((name, str(path), threading.current_thread().name))

    def opened(path: Any, *args: Any, **kwargs: Any) -> int:
        fd = real_open(path, *args, **kwargs)
        paths[fd] = str(path)
        return fd

    def written(fd: int, views: Any, offset: int) -> int:
        note("write", paths[fd])
        return real_pwritev(fd, views, offset)

    def of_two(name: str, real: Callable[..., None]) -> Callable[..., None]:
        return lambda a, b: (note(name, f"{a} -> {b}"), real(a, b))[1]

    def removing(real: Callable[..., None]) -> Callable[..., None]:
        return lambda path, **more: (note("remove", path), real(path, **more))[1]

    of_os = {
        "open": opened,
        "pwritev": written,
        "fsync": lambda fd: note("sync", paths[fd]),
        "rename": of_two("move", os.rename),
        "link": of_two("link", os.link),
        "unlink": removing(os.unlink),
        "rmdir": removing(os.rmdir),
    }
    exchange = of_two("move", files.exchange_folders)
    sync_tree = lambda folder: note("sync_tree", folder)  # noqa: E731
    with (
        mock.patch.multiple(os, **of_os),
        mock.patch.multiple(files, exchange_folders=exchange, sync_tree=sync_tree),
    ):
        yield calls
