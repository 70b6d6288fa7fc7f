"""Take DeepSpeed's keys that uni3d doesn't have out of a config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from uni3d.config.deepspeed_keys import (
    ACCUMULATED,
    AUTO_IS_DEFAULT,
    CHOICES,
    CONVERTED,
    NEUTRAL,
    NO_MEANING,
    OFF_BY_DEFAULT,
    OFF_BY_FALSE_ONLY,
    OFFLOADED,
    READ_AS,
    REFUSED,
    REQUESTS,
)
from uni3d.config.forms import DTYPES, as_boolean, as_integer, as_json
from uni3d.config.trainer import all_autos


class Sifted(NamedTuple):
    """A config without DeepSpeed's keys that uni3d doesn't have."""

    values: dict[str, Any]
    problems: list[str]
    """Refused keys, with the reason."""
    without_meaning: dict[str, str]
    """Given keys that have no effect, with the reason."""
    autos: list[str]
    """Keys that are still "auto"."""


def sift(values: Mapping[str, Any]) -> Sifted:
    """Return a copy of a config without the DeepSpeed keys that uni3d doesn't have."""
    left: dict[str, Any] = as_json(values)
    problems: list[str] = []
    without_meaning = _comments(left)
    _open_booleans(left)
    for key in AUTO_IS_DEFAULT:
        for value in _take(left, key):
            if value != "auto":
                _put(left, key, value, key)
    for key, target in READ_AS.items():
        for value in _take(left, key):
            problems += _put(left, key, value, target)
            if key == "pipeline.activation_checkpoint_interval" and as_integer(value) not in (None, 0, 1):
                without_meaning[key] = f"every layer is recomputed on its own, not {value} at once"
    for key, reason in REFUSED.items():
        for value in _take(left, key):
            if not _is_off(key, value):
                problems.append(f"{key} is refused: {reason}")
    for key, reason in NO_MEANING.items():
        for value in _take(left, key):
            problems += _other_choice(key, value)
            if value is not None and not (key in REQUESTS and _is_off(key, value)):
                without_meaning[key] = reason
    without_meaning |= _not_offloaded(left) | _other_accumulation(left)
    for section in ("tensor_parallel", "pipeline"):  # all their known keys have been removed
        if section in left and left[section] in ({}, None):
            del left[section]
    return Sifted(left, problems, without_meaning, list(all_autos(left)))


def _comments(values: dict[str, Any], within: str = "") -> dict[str, str]:
    """Remove keys whose names mark them as comments, at any depth, and return them with that reason."""
    found: dict[str, str] = {}
    for name in list(values):
        if str(name).startswith(("_", "#", "//")):
            del values[name]
            found[f"{within}{name}"] = "its name marks a comment"
        elif isinstance(values[name], dict):
            found |= _comments(values[name], f"{within}{name}.")
    return found


def _not_offloaded(values: dict[str, Any]) -> dict[str, str]:
    """Turn off what can't be offloaded at this ZeRO stage, as DeepSpeed does; return the keys and reasons."""
    zero = values.get("zero_optimization")
    if not isinstance(zero, dict):
        return {}
    stage = as_integer(zero.get("stage", 0))
    found = {}
    for key, (lowest, reason) in OFFLOADED.items():
        section = zero.get(key)
        if isinstance(section, dict) and section.get("device") in ("cpu", "nvme") and stage in range(lowest):
            section["device"] = "none"
            found[f"zero_optimization.{key}"] = reason
    return found


def _other_accumulation(values: dict[str, Any]) -> dict[str, str]:
    """Remove a 16-bit type of gradient accumulation; return it with the reason if it isn't the one used."""
    types, zero = values.get("data_types"), values.get("zero_optimization")
    if not isinstance(types, dict) or not isinstance(given := types.get("grad_accum_dtype"), str):
        return {}
    wanted = DTYPES.get(given, given)
    if wanted not in ("bf16", "fp16"):
        return {}
    del types["grad_accum_dtype"]
    stage = as_integer(zero.get("stage", 0)) if isinstance(zero, dict) else 0
    sent = str(values.get("communication_data_type")).lower()
    return {} if stage in (0, 1) and sent == wanted else {"data_types.grad_accum_dtype": ACCUMULATED}


def _open_booleans(values: dict[str, Any]) -> None:
    """Replace the booleans that stand for a section by that section."""
    if isinstance(enabled := values.get("zero_optimization"), bool):
        values["zero_optimization"] = {"stage": int(enabled)}
    zero = values.get("zero_optimization")
    for key in ("offload_optimizer", "offload_param"):
        if isinstance(zero, dict) and isinstance(enabled := zero.get(key), bool):
            zero[key] = {"device": "cpu" if enabled else "none"}


def _take(values: dict[str, Any], key: str) -> Iterator[Any]:
    """Remove a key if it is present, and yield its value."""
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict):
            return
        values = inner
    if last in values:
        yield values.pop(last)


def _put(values: dict[str, Any], key: str, value: Any, target: str) -> list[str]:
    """Set the key that `key` is read as, and return the problems with it; null isn't given."""
    if value is None:
        return []
    said = value
    if key.startswith("zero_optimization.cpu_offload"):
        if not isinstance(on := as_boolean(value), bool):
            return [f"{key} is {value!r}: expected true or false"]
        said = value = {"device": "cpu" if on else "none"}
    if key == "tensor_parallel.autotp_size":
        said = value = as_integer(value)
        if value in (0, 1):  # disabled
            return []
    if key == "pipeline.stages" and value == "auto":
        return []
    if key == "pipeline.activation_checkpoint_interval":
        interval = as_integer(value)
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 0:
            return [f"{key} is {value!r}: expected the number of layers that are recomputed at once, or 0"]
        if interval == 0:
            return []
        value = "full"
    *sections, last = target.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            return []  # the section itself is reported
    if values.get(last) is not None and values[last] != value:
        return [f"{key} is {said!r}, but {target}, which means the same, is {values[last]!r}; give one"]
    values[last] = value
    return []


def _other_choice(key: str, value: Any) -> list[str]:
    """Return the problem with a value that DeepSpeed doesn't have for this key."""
    choices = CHOICES.get(key)
    if choices is None or value is None or str(value).lower() in map(str.lower, choices):
        return []
    return [f"{key} is {value!r}: expected {', '.join(choices[:-1])} or {choices[-1]}"]


def _is_off(key: str, value: Any) -> bool:
    """Return whether the value of a refused key turns it off."""
    converted = key.split(".")[0] in CONVERTED
    if key == "compression_training" and isinstance(value, dict):
        return not any(_switches(value))
    if isinstance(value, dict):
        enabled = value.get("enabled", key not in OFF_BY_DEFAULT)
        return not value or (as_boolean(enabled) if converted else enabled) in (None, False)
    neutral = NEUTRAL.get(key, ())
    is_number = any(type(wanted) in (int, float) for wanted in neutral)
    if converted:
        value = as_integer(value) if is_number else as_boolean(value)
    if isinstance(value, str):
        value = value.lower()  # as DeepSpeed does
    if value is None or any(_same(value, wanted) for wanted in neutral):
        return True
    if key in OFF_BY_FALSE_ONLY:
        return False
    return value is False or (_same(value, 0) and not is_number)


def _switches(section: Mapping[str, Any]) -> Iterator[Any]:
    """Yield every `enabled` of a section, at any depth."""
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _switches(value)
        elif name == "enabled":
            yield value


def _same(value: Any, wanted: Any) -> bool:
    """Return whether two values are equal, where true isn't 1 unless true is wanted."""
    return bool(value == wanted) and (isinstance(wanted, bool) or not isinstance(value, bool))
