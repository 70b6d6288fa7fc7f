"""Values of a manifest held against those that they replace: a number for a number, a list for a list."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

_SPECIAL = {"uni3d.float": "a number", "uni3d.tensor": "a tensor", "uni3d.counter": "a counter"}
"""Objects that `uni3d.checkpoint.json_state` writes for what JSON lacks."""


def other_kinds(saved: Any, here: Any, where: str, *, leave: Collection[str] = ()) -> Iterator[str]:
    """Yield a line for each saved value that can't take the place of the one that is here.

    Where nothing is here, anything may come. Of objects, the keys in both are compared, without those in
    `leave`. `where` names the saved value.
    """
    mine, theirs = _kind(here), _kind(saved)
    if mine == "null":
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


def _fits_a_float(value: Any) -> bool:
    """Return whether a value, if it is a number, is within a float's range."""
    return not isinstance(value, int) or abs(value) < 2**1023
