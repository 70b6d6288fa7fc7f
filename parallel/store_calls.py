"""Calls of a rendezvous store that end, also if the store's process is stopped or its machine is gone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")

LEAST_S = 30.0
"""Least time that a store gets for an answer, in seconds. torch's TCPStore looks up the name of each new
connection's address in its only thread (`formatSockAddr` in c10d/socket.cpp), and answers nobody meanwhile; a
name server that is gone takes the resolver 10 s."""


class SilentStoreError(RuntimeError):
    """The store gave no answer in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"the rendezvous store has given no answer for {seconds:g} s: the process that has it (rank 0, "
            "or torchrun on its machine) is stopped, or the machine is gone"
        )


class Connection:
    """A connection to a store besides the one that torch uses: there, one thread's wait holds up all others'.

    Attributes:
        store: the store, which lives as long as the connection; rank 0's may be the server.
        clone: the store by this connection.
    """

    def __init__(self, store: Any) -> None:
        self.store, self.clone = store, store.clone()


_connections: WeakValueDictionary[int, Connection] = WeakValueDictionary()


def connection_to(store: Any) -> Connection:
    """Return this process's one further connection to a store, a new one if nobody holds it any more."""
    found = _connections.get(id(store))
    if found is None:
        found = _connections[id(store)] = Connection(store)
    return found


class StoreCalls:
    """A `torch.distributed.Store` whose calls raise SilentStoreError if there is no answer in time.

    After the first such call all others raise at once, as they would wait for that one.

    Attributes:
        seconds: the longest wait for an answer, if it is more than LEAST_S.
    """

    def __init__(self, store: Any, seconds: float) -> None:
        self.seconds = seconds
        self.silent = False
        self._store = store

    def check(self, keys: list[str]) -> bool:
        return bool(self._ended("check", keys))

    def get(self, key: str) -> bytes:
        return bytes(self._ended("get", key))

    def add(self, key: str, amount: int) -> int:
        return int(self._ended("add", key, amount))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [bytes(value) for value in self._ended("multi_get", keys)]

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        return bytes(self._ended("compare_set", key, expected, value))

    def set(self, key: str, value: str) -> None:
        self._ended("set", key, value)

    def delete_key(self, key: str) -> None:
        self._ended("delete_key", key)

    def _ended(self, name: str, *args: Any) -> Any:
        if self.silent:
            raise SilentStoreError(max(self.seconds, LEAST_S))
        try:
            return within(self.seconds, lambda: getattr(self._store, name)(*args))
        except SilentStoreError:
            self.silent = True
            raise


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return the result of a call of a store that a thread makes; it is left behind if there is no answer.

    It gets LEAST_S at least.

    Raises:
        SilentStoreError: there is none.
    """
    seconds = max(seconds, LEAST_S)
    results, errors = list[T](), list[Exception]()

    def make() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=make, name="uni3d's store", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise SilentStoreError(seconds)
    return results[0]
