"""Objects of a JSON document, whose values are checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt import CheckpointError

_JSON_NAMES = {str: "a string", int: "an integer", bool: "a boolean", dict: "an object", list: "a list"}
_JSON_NAMES[float] = "a number"


class JsonSection:
    """One JSON object of the manifest; checks the type of each value read. A missing key reads as None."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values, self.where = values, where

    def get(self, key: str, kind: type) -> Any:
        value = self._values.get(key)
        if value is not None:
            check_type(value, kind, f"{self.where}: {key}")
        return value

    def values(self, **kinds: type) -> dict[str, Any]:
        """Return the value of each of these keys."""
        return {key: self.get(key, kind) for key, kind in kinds.items()}

    def section(self, key: str) -> JsonSection:
        """Return an object in this one. One that is missing has no keys."""
        return JsonSection(self.get(key, dict) or {}, f"{self.where}: {key}")

    def list_of(self, key: str, kind: type) -> list[Any] | None:
        values = self.get(key, list)
        for i, value in enumerate(values or []):
            check_type(value, kind, f"{self.where}: {key}[{i}]")
        return values  # type: ignore[no-any-return]

    def map_of(self, key: str, kind: type) -> dict[str, Any]:
        values = self.get(key, dict) or {}
        for name, value in values.items():
            if not isinstance(value, kind):  # before the text is made: there may be thousands
                check_type(value, kind, f"{self.where}: {key}[{name!r}]")
        return values

    def needed(self, key: str, kind: type) -> Any:
        value = self.get(key, kind)
        if value is None:
            raise CheckpointError(f"{self.where} has no {key!r}; use another tag")
        return value


def check_type(value: Any, kind: type, where: str) -> None:
    """Check the type of a value; raises CheckpointError, with `where` as its name."""
    # A bool is an int in Python but not in JSON, where an integer is a number.
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (kind in (int, float) and isinstance(value, bool)):
        raise CheckpointError(f"{where} is {value!r:.80}; expected {_JSON_NAMES[kind]}; use another tag")
