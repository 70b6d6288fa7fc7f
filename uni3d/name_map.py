"""Name maps, which rename tensors in an import or export.

A name map is a JSON object, regular expression -> replacement. The first pattern that matches the whole name
applies. The replacement may refer to the pattern's groups (`\\1`, `\\g<layer>`); `null` leaves the tensor
out. A name that no pattern matches doesn't change.

    {
        "layers\\\\.(\\\\d+)\\\\.attn\\\\.q\\\\.(.*)": "model.layers.\\\\1.self_attn.q_proj.\\\\2",
        "rope\\\\..*": null
    }
"""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from uni3d.config.strict import unique_keys

Rules = Mapping[str, str | None]
"""Pattern -> replacement, in the order in which they are tried."""

SECONDS = 5
"""Seconds that matching one name against one pattern may take."""


class NameMap:
    """A name map; `source` stands for it in error messages.

    Raises:
        ValueError: a pattern isn't a regular expression, or its replacement doesn't fit it.
    """

    def __init__(self, rules: Rules, source: str = "the name map") -> None:
        self.source = source
        self._rules = [(_compiled(pattern, to, source), to) for pattern, to in rules.items()]
        self._used: set[str] = set()

    @classmethod
    def load(cls, path: str | Path) -> NameMap:
        """Read a name map from a JSON file.

        Raises:
            ValueError: the file isn't a JSON object of strings and nulls, or as above.
            OSError: it can't be read.
        """
        source = f"the name map {path}"
        try:
            rules = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
        except ValueError as error:
            raise ValueError(f"{source} can't be read as JSON: {error}") from None
        if not isinstance(rules, dict):
            raise ValueError(f"{source} must be a JSON object of pattern: replacement, not {_kind(rules)}")
        return cls(rules, source)

    def rename(self, name: str) -> str | None:
        """Return the new name of a tensor; None if it is left out.

        Raises:
            ValueError: the new name is empty.
        """
        for pattern, replacement in self._rules:
            if match := self._matched(pattern, name):
                self._used.add(pattern.pattern)
                if replacement is None:
                    return None
                if not (new := match.expand(replacement)):
                    raise ValueError(
                        f"{self.source} renames {name} to an empty name (pattern {pattern.pattern!r}); "
                        "to leave the tensor out, give null"
                    )
                return new
        return name

    def _matched(self, pattern: re.Pattern[str], name: str) -> re.Match[str] | None:
        """Match a whole name.

        Raises:
            ValueError: it takes more than `SECONDS`: patterns such as `(a+)+b` can take years.
        """
        try:
            with _time_limit(SECONDS):
                return pattern.fullmatch(name)
        except TimeoutError:
            raise ValueError(
                f"{self.source}: the pattern {pattern.pattern!r} takes more than {SECONDS} s to match "
                f"{name[:80]!r}; don't repeat what repeats itself"
            ) from None

    @property
    def unused(self) -> list[str]:
        """Patterns that haven't matched a name yet."""
        return [pattern.pattern for pattern, _ in self._rules if pattern.pattern not in self._used]

    def rename_all(self, names: Iterable[str]) -> dict[str, str]:
        """Map each name to its new name, in order, without the tensors that are left out.

        Raises:
            ValueError: two tensors get the same name, or as above.
        """
        renamed: dict[str, str] = {}
        taken: dict[str, str] = {}
        for name in names:
            if (new := self.rename(name)) is None:
                continue
            if (first := taken.setdefault(new, name)) != name:
                raise ValueError(f"{self.source} renames both {first} and {name} to {new}")
            renamed[name] = new
        return renamed


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds. Only in the main thread, which gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _compiled(pattern: str, replacement: object, source: str) -> re.Pattern[str]:
    """Compile a pattern, and check that its replacement fits it."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{source}: the pattern {pattern!r} isn't a regular expression: {error}") from None
    if replacement is None:
        return compiled
    if not isinstance(replacement, str):
        raise ValueError(
            f"{source}: the replacement of {pattern!r} must be a string or null, not {_kind(replacement)}"
        )
    try:
        compiled.sub(replacement, "")  # parses the replacement, whether or not anything matches
    except (re.error, IndexError) as error:
        raise ValueError(
            f"{source}: the replacement {replacement!r} doesn't fit the pattern {pattern!r}: {error}"
        ) from None
    return compiled


def _kind(value: object) -> str:
    """Return JSON's word for the type of `value`."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
