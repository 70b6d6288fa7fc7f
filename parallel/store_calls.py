"""Calls of a rendezvous store that end, also if the store's process is stopped or its machine is gone."""

from __future__ import annotations

import threading
from typing import Any


class SilentStoreError(RuntimeError):
    """The store gave no answer in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"the rendezvous store has given no answer for {seconds:g} s: the process that has it (rank 0, "
            "or torchrun on its machine) is stopped, or the machine is gone"
        )


class StoreCalls:
    """A `torch.distributed.Store` whose calls raise SilentStoreError if there is no answer in time.

    After the first such call all others raise at once, as they would wait for that one.

    Attributes:
        seconds: the longest wait for an answer.
    """

    def __init__(self, store: Any, seconds: float) -> None:
        self.seconds = seconds
        self.silent = False
        self._store = store

    def check(self, keys: list[str]) -> bool:
        return bool(self._ended("check", keys))

    def get(self, key: str) -> bytes:
        return bytes(self._ended("get", key))

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        return bytes(self._ended("compare_set", key, expected, value))

    def set(self, key: str, value: str) -> None:
        self._ended("set", key, value)

    def delete_key(self, key: str) -> None:
        self._ended("delete_key", key)

    def _ended(self, name: str, *args: Any) -> Any:
        """Return the result of a call that a thread makes, which is left behind if there is no answer."""
        if self.silent:
            raise SilentStoreError(self.seconds)
        results, errors = list[Any](), list[Exception]()

        def call() -> None:
            try:
                results.append(getattr(self._store, name)(*args))
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=call, name="uni3d's store", daemon=True)
        thread.start()
        thread.join(self.seconds)
        if errors:
            raise errors[0]
        if not results:
            self.silent = True
            raise SilentStoreError(self.seconds)
        return results[0]
