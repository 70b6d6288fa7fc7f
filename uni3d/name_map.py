"""Other names for a model's tensors: a JSON object, regular expression -> replacement.

    {"model\\.layers\\.(\\d+)\\.self_attn\\.([qkvo])_proj\\.(.*)": "layers.\\1.attn.\\2.\\3",
     "lm_head\\.weight": "head.weight",
     ".*\\.rotary_emb\\.inv_freq": null}

The first pattern that matches the whole name counts. Its replacement may refer to groups, as `\\1` or
`\\g<name>`; null leaves the tensor out. A name that no pattern matches stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class NameMap:
    """Patterns of names, each with what becomes of them, in order."""

    def __init__(self, patterns: Mapping[Any, Any], where: str = "the name map") -> None:
        """`where` it is from, for messages.

        Raises:
            ValueError: a pattern is no regular expression, or a replacement refers to a group that it lacks.
        """
        self._rules: list[tuple[re.Pattern[str], str | None]] = []
        self._used: set[str] = set()
        for pattern, replacement in patterns.items():
            if not isinstance(replacement, str | None):
                raise ValueError(
                    f"{where}: {pattern!r} -> {replacement!r} should be a string, or null to leave out"
                )
            try:
                compiled = re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{where}: {pattern!r} is no regular expression: {error}") from None
            try:
                re.sub(compiled, replacement or "", "")  # reads the replacement, though nothing may match
            except (re.error, IndexError) as error:
                raise ValueError(f"{where}: {pattern!r} -> {replacement!r}: {error}") from None
            self._rules.append((compiled, replacement))

    @classmethod
    def load(cls, path: Path) -> NameMap:
        """Read a file.

        Raises:
            ValueError: it isn't what this module describes.
        """
        try:
            content = json.loads(path.read_text())
        except OSError as error:
            raise ValueError(f"--name-map {path} can't be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"--name-map {path} is not JSON: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"--name-map {path} must be an object, pattern -> replacement")
        return cls(content, str(path))

    def rename(self, name: str) -> str | None:
        """The new name; None if it is to be left out.

        Raises:
            ValueError: a replacement comes out empty.
        """
        for pattern, replacement in self._rules:
            if match := pattern.fullmatch(name):
                self._used.add(pattern.pattern)
                if replacement is None:
                    return None
                renamed = match.expand(replacement)
                if not renamed:
                    raise ValueError(
                        f"the name map makes an empty name of {name}; write null to leave it out"
                    )
                return renamed
        return name

    @property
    def unused(self) -> list[str]:
        """Patterns that have matched no name yet."""
        return [pattern.pattern for pattern, _ in self._rules if pattern.pattern not in self._used]

    def rename_all(self, names: Iterable[str]) -> dict[str, str]:
        """Old name -> new one, of those that aren't left out.

        Raises:
            ValueError: two names become one.
        """
        new: dict[str, str] = {}
        old: dict[str, str] = {}
        for name in names:
            renamed = self.rename(name)
            if renamed is None:
                continue
            if renamed in old:
                raise ValueError(f"the name map makes {renamed} of both {old[renamed]} and {name}")
            new[name], old[renamed] = renamed, name
        return new
