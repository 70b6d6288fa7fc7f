"""Objects of a JSON document, whose values are checked as they are read, and as they replace others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ckpt import CheckpointError

_JSON_NAMES = {str: "a string", int: "an integer", bool: "a boolean", dict: "an object", list: "a list"}
_JSON_NAMES[float] = "a number"

_SPECIAL = {"uni3d.float": "a number", "uni3d.tensor": "a tensor", "uni3d.counter": "a counter"}
"""Objects that `uni3d.checkpoint.json_state` writes for what JSON lacks."""


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


# --- values that replace others ------------------------------------------------------------------------


def other_kinds(saved: Any, here: Any, where: str, *, leave: Collection[str] = ()) -> Iterator[str]:
    """Yield a line for each saved value that can't take the place of the one that is here.

    Where nothing is here, anything may come, and a learning rate may have become a tensor, or a number again.
    Of objects, the keys in both are compared, without those in `leave`. `where` names the saved value.
    """
    mine, theirs = _kind(here), _kind(saved)
    if mine == "null" or _is_alike(mine, saved, theirs):
        return
    if mine != theirs or not _fits_a_float(saved):
        yield f"{where} is {saved!r:.80}; expected {mine}"
    elif mine == "an object":
        for key in sorted(here.keys() & saved.keys() - {*leave}):
            yield from other_kinds(saved[key], here[key], f"{where}: {key}")
    elif mine == "a list" and here:
        for i, item in enumerate(saved):
            yield from other_kinds(item, here[min(i, len(here) - 1)], f"{where}[{i}]")


def other_groups(saved: Any, here: Any, where: str, *, leave: Collection[str] = ()) -> Iterator[str]:
    """Yield lines as `other_kinds`, and one for each list that has another length: two betas stay two."""
    yield from other_kinds(saved, here, where, leave=leave)
    for key in sorted(here.keys() & saved.keys() - {*leave}):
        mine, theirs = here[key], saved[key]
        if _kind(mine) == _kind(theirs) == "a list" and len(mine) != len(theirs):
            yield f"{where}: {key} is {theirs!r:.80}; expected {len(mine)} values"


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return next((_SPECIAL[key] for key in value if key in _SPECIAL and len(value) == 1), "an object")
    if value is None or isinstance(value, bool):
        return "null" if value is None else "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


def _is_alike(mine: str, saved: Any, theirs: str) -> bool:
    """Return whether a value of another kind stands for the same: 1 for true, a tensor for its number."""
    kinds = {mine, theirs}
    return kinds == {"a number", "a tensor"} or (kinds == {"a number", "a boolean"} and saved in (0, 1))


def _fits_a_float(value: Any) -> bool:
    """Return whether a value, if it is a number, is within a float's range."""
    return not isinstance(value, int) or abs(value) < 2**1023
