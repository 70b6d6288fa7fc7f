"""Sections of a config: nothing unknown gets in, and what is wrong is explained by the key's full name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError


class Strict(BaseModel):
    """A section: unknown keys, values of another type, NaN and infinity are errors; it can't be changed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


Section = TypeVar("Section", bound=BaseModel)


class ConfigError(ValueError):
    """All that is wrong with a config."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("config: " + "; ".join(problems))
        self.problems = list(problems)


def validate(section: type[Section], values: object, within: str = "") -> Section:
    """Check `values` against a section whose own key is `within` (none for the whole config).

    Raises:
        ConfigError: naming every key that is wrong, with what was expected.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        found: dict[str, tuple[Any, list[str]]] = {}
        problems = []
        for e in error.errors():
            key = _full_key(section, e["loc"], within)
            if e["type"] == "extra_forbidden":
                problems.append(unknown("key", key, known_keys(section, [str(p) for p in e["loc"][:-1]])))
                continue
            if e["type"] == "missing":
                problems.append(f"{key} is missing")
                continue
            message = e["msg"].removeprefix("Value error, ")
            if e["type"] == "value_error" and isinstance(e["input"], Mapping):  # of keys that don't fit
                problems.append(f"{key}: {message}" if key else message)
                continue
            found.setdefault(key, (e["input"], []))[1].append(message[0].lower() + message[1:])
        for key, (value, messages) in found.items():  # a key with several types has a message for each
            problems.append(f"{key or 'the whole'} is {value!r}: {', or '.join(messages)}")
        raise ConfigError(problems) from None


def unknown(what: str, key: str, known: Iterable[str]) -> str:
    """A key that isn't known, with the nearest that is."""
    names = sorted(known)
    near = difflib.get_close_matches(key.rpartition(".")[2], names, n=1)
    return f"unknown {what} {key!r}; " + (
        f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(names)}"
    )


def known_keys(section: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Keys of the section that lies at `path` in `section`."""
    sections = [section]
    for part in path:
        fields = [s.model_fields[part] for s in sections if part in s.model_fields]
        sections = [model for field in fields for model in sections_of(field.annotation)]
    return sorted({key for s in sections for key in s.model_fields})


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a key with this annotation can have."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in sections_of(part)]


def _full_key(section: type[BaseModel], location: Sequence[str | int], within: str) -> str:
    """A key's full name; where it can have several types, pydantic's location also holds the type's name."""
    parts, sections = [within] if within else [], [section]
    for position, part in enumerate(location):
        last = position == len(location) - 1
        fields = [s.model_fields[part] for s in sections if part in s.model_fields]
        if fields or isinstance(part, int) or (last and sections):
            parts.append(str(part))
        sections = [model for field in fields for model in sections_of(field.annotation)]
    return ".".join(parts)
