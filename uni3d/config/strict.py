"""Strict sections of a config, and validation errors that name the full key and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from uni3d.config.forms import plain


class Strict(BaseModel):
    """A frozen section. Unknown keys, wrong types, NaN and infinity are errors.

    Whole floats are integers where integers are meant, and 0 and 1 booleans. A section that is null isn't
    given.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    converts_text: ClassVar[bool] = False
    """True if DeepSpeed converts the texts of numbers and booleans in this section."""

    @model_validator(mode="before")
    @classmethod
    def _other_forms(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        known = {key: field.annotation for key, field in cls.model_fields.items()}
        return {
            key: plain(value, known[key], text=cls.converts_text) if key in known else value
            for key, value in values.items()
            if value is not None or not sections_of(known.get(key))
        }


class DeepSpeedSection(Strict):
    """A section in which DeepSpeed converts the texts of numbers and booleans."""

    converts_text: ClassVar[bool] = True


Section = TypeVar("Section", bound=BaseModel)


class ConfigError(ValueError):
    """Every problem of a config, in one error; `place` is its file, if it is one."""

    def __init__(self, problems: Sequence[str], place: object = None) -> None:
        super().__init__(f"config{'' if place is None else f' {place}'}: {'; '.join(problems)}")
        self.problems = list(problems)
        self._place = place

    def __reduce__(self) -> tuple[Any, ...]:  # errors of a pool's workers are pickled
        return type(self), (self.problems, self._place)


def validate(
    section: type[Section], values: object, within: str = "", elsewhere: Iterable[str] = ()
) -> Section:
    """Validate `values` against a section, whose own key is `within` ("" for the whole config).

    `elsewhere` are other keys that an unknown one may be meant for.

    Raises:
        ConfigError: the message names every wrong key and what was expected.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        found: dict[str, tuple[Any, list[str]]] = {}
        problems, strangers = [], []
        for e in error.errors():
            key = _full_key(section, e["loc"], within)
            if e["type"] == "extra_forbidden":
                strangers.append((key, known_keys(section, [str(p) for p in e["loc"][:-1]])))
                continue
            if e["type"] == "missing":
                problems.append(f"{key} is missing")
                continue
            message = e["msg"].removeprefix("Value error, ")
            if e["type"] == "model_type":
                message = "expected an object, {...}"
            if e["type"] == "value_error" and isinstance(
                e["input"], Mapping
            ):  # keys that contradict each other
                problems.append(f"{key}: {message}" if key else message)
                continue
            found.setdefault(key, (e["input"], []))[1].append(message[0].lower() + message[1:])
        for key, (value, messages) in found.items():  # a key with several types has one message per type
            problems.append(f"{key or 'the config'} is {value!r}: {', or '.join(messages)}")
        raise ConfigError(_unknown_keys(strangers, elsewhere) + problems) from None


def _unknown_keys(found: Sequence[tuple[str, list[str]]], elsewhere: Iterable[str]) -> list[str]:
    """Return the problems of unknown keys, given with the known ones of their sections."""
    problems: list[str] = []
    alone: dict[str, list[str]] = {}
    places = list(elsewhere)
    for key, known in found:
        section, _, last = key.rpartition(".")
        same = [place for place in places if place.rpartition(".")[2] == last]
        near = [f"{section}.{name}".lstrip(".") for name in difflib.get_close_matches(last, known, n=1)]
        if meant := (same if len(same) == 1 else near):
            problems.append(f"unknown key {key!r}; delete it, or did you mean {meant[0]!r}?")
        else:
            hint = f" ({section} has {', '.join(known)})" if section else ""
            alone.setdefault(hint, []).append(repr(key))
    for hint, keys in alone.items():
        many = len(keys) > 1
        problems.append(
            f"unknown key{'s' if many else ''} {', '.join(keys)}; delete {'them' if many else 'it'}{hint}"
        )
    return problems


def unknown(what: str, key: str, known: Iterable[str]) -> str:
    """Return the message for an unknown name, with the nearest known one."""
    names = sorted(known)
    near = difflib.get_close_matches(key.rpartition(".")[2], names, n=1)
    return f"unknown {what} {key!r}; " + (
        f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    )


def known_keys(section: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Return the keys of the section at `path` within `section`."""
    sections = [section]
    for part in path:
        fields = [s.model_fields[part] for s in sections if part in s.model_fields]
        sections = [model for field in fields for model in sections_of(field.annotation)]
    return sorted({key for s in sections for key in s.model_fields})


def all_keys(section: type[BaseModel], within: str = "") -> list[str]:
    """Return the full names of the keys of a section, and of the sections in it."""
    found = []
    for name, field in section.model_fields.items():
        found.append(f"{within}{name}")
        for inner in sections_of(field.annotation):
            found += all_keys(inner, f"{within}{name}.")
    return found


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a key with this annotation accepts."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in sections_of(part)]


def _full_key(section: type[BaseModel], location: Sequence[str | int], within: str) -> str:
    """Return a key's dotted name, without the type names that pydantic adds to locations in unions."""
    parts, sections = [within] if within else [], [section]
    for position, part in enumerate(location):
        last = position == len(location) - 1
        fields = [s.model_fields[part] for s in sections if part in s.model_fields]
        if fields or isinstance(part, int) or (last and sections):
            parts.append(str(part))
        sections = [model for field in fields for model in sections_of(field.annotation)]
    return ".".join(parts)


def named_section(key: str, section: object, example: str) -> dict[str, Any] | None:
    """Check that a section has the form {"type": ..., "params": {...}}; None if it names nothing.

    Raises:
        ConfigError: it isn't an object with a "type"; the message shows the form, with the type `example`.
    """
    untyped = {"type": None}
    nothing: list[object] = [None, {}, untyped, {**untyped, "params": None}, {**untyped, "params": {}}]
    if section in nothing:
        return None
    if not isinstance(section, Mapping) or not isinstance(section.get("type"), str):
        raise ConfigError([f'{key} is {section!r}: expected {{"type": "{example}", "params": {{}}}}'])
    params = section.get("params")
    return {**section, "params": {} if params is None else params}


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object of JSON (as its `object_pairs_hook`) without dropping repeated keys silently.

    Raises:
        ValueError: a key occurs twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {max(names, key=names.count)!r}")
    return values
