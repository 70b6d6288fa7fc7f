"""Read a config's JSON file, with the comments and trailing commas that DeepSpeed reads too."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from uni3d.config.strict import unique_keys

_TEXT = r'"(?:\\.|[^"\\\n])*"'
_COMMENT = re.compile(rf"{_TEXT}|//[^\n]*|#[^\n]*|/\*.*?\*/", re.DOTALL)
_LAST_COMMA = re.compile(rf"{_TEXT}|,(?=\s*[}}\]])")


def read_file(path: str | Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        ValueError: it can't be read, isn't JSON (the message shows the line), or repeats a key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"config {path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"config {path} is not valid JSON: {error}") from None
    plain = _LAST_COMMA.sub(_blank, _COMMENT.sub(_blank, text))
    try:
        return json.loads(plain, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"config {path} is not valid JSON: {_place(error, plain)}") from None
    except ValueError as error:
        raise ValueError(f"config {path} is not valid JSON: {error}") from None


def _blank(match: re.Match[str]) -> str:
    """Replace a comment or comma by as many spaces, so that errors name the right place; keep texts."""
    found = match.group()
    return found if found.startswith('"') else re.sub(r"[^\n]", " ", found)


def _place(error: json.JSONDecodeError, text: str) -> str:
    """Return the error's place and what is there; capitals and $ look like a template's."""
    word = re.match(r"[^\s,}\]]{0,30}", text[error.pos :])
    found = word.group() if word else ""
    where = f"{error.msg[0].lower()}{error.msg[1:]} in line {error.lineno}, column {error.colno}"
    if re.match(r"[A-Z][A-Z0-9_]+$|[$<{]", found):
        return f"{where}: {found} looks like a template's, which a script replaces by a value"
    return f"{where}: {found}" if found else where
