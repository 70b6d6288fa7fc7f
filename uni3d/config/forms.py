"""Other forms of a value that DeepSpeed accepts: 4.0 for 4, 1 for true, and in some sections "2" for 2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

_BOOLEANS = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0"), False),
}
"""Texts that pydantic, which reads most of DeepSpeed's sections, converts to booleans; in any case."""

DTYPES = {
    **dict.fromkeys(("torch.float32", "float32", "float"), "fp32"),
    **dict.fromkeys(("torch.float16", "float16", "half"), "fp16"),
    **dict.fromkeys(("torch.bfloat16", "bfloat16"), "bf16"),
}
"""Other names of types."""


def plain(value: Any, annotation: Any, *, text: bool) -> Any:
    """Return the value in the form that a key with this annotation has; unchanged if it isn't another form.

    A whole float becomes an integer where an integer is meant, 0 and 1 become booleans where one is meant.
    With `text`, so do their texts.
    """
    kinds = _kinds(annotation)
    numbers = kinds & {int, float}
    if text and isinstance(value, str) and str not in kinds and value not in _words(annotation):
        value = as_boolean(value) if bool in kinds else _number(value) if numbers else value
    if isinstance(value, float) and int in kinds and float not in kinds and value.is_integer():
        return int(value)
    if bool in kinds and not numbers and not isinstance(value, str):
        return as_boolean(value)
    return value


def as_json(value: Any) -> Any:
    """Return a copy with plain dicts and lists, and Python's numbers for numpy's and tensors."""
    if isinstance(value, Mapping):
        return {key: as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def as_boolean(value: Any) -> Any:
    """Return the boolean that a number or a text stands for, or else the value."""
    if isinstance(value, str):
        return _BOOLEANS.get(value.lower(), value)
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    return value


def as_integer(value: Any) -> Any:
    """Return the integer that a whole float or a text stands for, or else the value."""
    return plain(value, int, text=True)


def _number(text: str) -> Any:
    for convert in (int, float):
        try:
            number = convert(text)
        except ValueError:
            continue
        return number if math.isfinite(number) else text
    return text


def _kinds(annotation: Any) -> set[type]:
    """Return the plain types that an annotation allows."""
    if isinstance(annotation, type):
        return {annotation}
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)} - {str}
    return {kind for part in get_args(annotation) for kind in _kinds(part)}


def _words(annotation: Any) -> set[str]:
    """Return the strings that an annotation allows by name."""
    if get_origin(annotation) is Literal:
        return {value for value in get_args(annotation) if isinstance(value, str)}
    return {word for part in get_args(annotation) for word in _words(part)}
