"""Fill in `"auto"`, as Hugging Face's Trainer does from its `TrainingArguments` (as of transformers 5.24).

A Trainer refuses a config whose other values differ from its arguments. So an argument that isn't given is
the one that the config's own values imply, or else the Trainer's default.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 1.0,
    "learning_rate": 5e-5,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "fp16": False,
    "fp16_full_eval": False,
    "bf16": False,
    "bf16_full_eval": False,
    "warmup_steps": 0,
    "max_steps": -1,
    "save_on_each_node": False,
}
"""Arguments that the Trainer fills in from, and their defaults."""

_BATCH, _MICRO, _STEPS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)
_OPTIMIZER, _SCHEDULER, _ZERO = "optimizer.params", "scheduler.params", "zero_optimization"
_TOTAL, _WARMUP = f"{_SCHEDULER}.total_num_steps", f"{_SCHEDULER}.warmup_num_steps"
_FROM: dict[str, tuple[str, ...]] = {
    _MICRO: ("per_device_train_batch_size",),
    _STEPS: ("gradient_accumulation_steps",),
    _BATCH: ("per_device_train_batch_size", "gradient_accumulation_steps"),
    "gradient_clipping": ("max_grad_norm",),
    f"{_OPTIMIZER}.lr": ("learning_rate",),
    f"{_OPTIMIZER}.betas": ("adam_beta1", "adam_beta2"),
    f"{_OPTIMIZER}.eps": ("adam_epsilon",),
    f"{_OPTIMIZER}.weight_decay": ("weight_decay",),
    f"{_SCHEDULER}.warmup_min_lr": (),
    f"{_SCHEDULER}.warmup_max_lr": ("learning_rate",),
    _TOTAL: ("max_steps",),
    _WARMUP: ("warmup_steps",),
    "fp16.enabled": ("fp16", "fp16_full_eval"),
    "bf16.enabled": ("bf16", "bf16_full_eval"),
}
"""Keys that the Trainer fills in, and the arguments it takes."""

_BY_WIDTH = (
    f"{_ZERO}.reduce_bucket_size",
    f"{_ZERO}.stage3_prefetch_bucket_size",
    f"{_ZERO}.stage3_param_persistence_threshold",
)
_BY_STAGE_3 = _BY_WIDTH[1:]
"""Keys that the Trainer leaves "auto" at other stages, where DeepSpeed doesn't use them."""
_BY_ACCELERATE: dict[str, Any] = {
    f"{_ZERO}.stage": 2,
    f"{_ZERO}.offload_optimizer.device": "none",
    f"{_ZERO}.offload_param.device": "none",
    f"{_ZERO}.offload_optimizer.nvme_path": "none",
    f"{_ZERO}.offload_param.nvme_path": "none",
    f"{_ZERO}.stage3_gather_16bit_weights_on_model_save": False,
}
"""Keys that Accelerate, which the Trainer runs on, fills in unless its own settings say otherwise."""
FILLED = (*_FROM, *_BY_WIDTH, *_BY_ACCELERATE)
"""Every key whose "auto" is filled in."""
FILL_FIRST = "give --fill"
"""Advice on a key that isn't filled in because nobody asked for it."""


class Filled(NamedTuple):
    """A config without the "auto" of the keys that could be filled in."""

    values: dict[str, Any]
    filled: dict[str, tuple[Any, str]]
    """Keys that were filled in, with their value and its origin."""
    left: dict[str, str]
    """Keys that are still "auto", with what to do about it."""


def autos(values: Mapping[str, Any]) -> list[str]:
    """Return the keys that are "auto" and that the Trainer fills in."""
    return [key for key in FILLED if _get(values, key) == "auto"]


def all_autos(values: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """Yield every key that is "auto", but for those that have a meaning of their own for it."""
    for name, value in values.items():
        key = f"{within}{name}"
        if isinstance(value, Mapping):
            yield from all_autos(value, f"{key}.")
        elif value == "auto" and not (within.startswith("parallel.") or key == "checkpoint.files"):
            yield key


def fill(
    values: Mapping[str, Any], *, dp: int, given: Mapping[str, Any] | None = None, width: int | None = None
) -> Filled:
    """Fill in "auto" for `dp` data-parallel ranks.

    Args:
        values: a config, which isn't modified.
        dp: the Trainer's number of processes, all of which are data-parallel.
        given: `TrainingArguments`; those that the Trainer doesn't fill in from aren't looked at.
        width: hidden size of the model.

    Raises:
        ValueError: an argument has the wrong type, or the Trainer would refuse the config, as one of its
            values isn't the argument's.
    """
    said = _read(given or {})
    implied = _implied(values, dp, said)
    known = ARGUMENTS | implied | said
    result = Filled(copy.deepcopy(dict(values)), {}, {})
    refusals = []
    for key in FILLED:
        found = _get(values, key)
        value = _value(key, known, dp=dp, width=width, stage=_get(values, f"{_ZERO}.stage"))
        if found == "auto" and value is None:
            if key not in _BY_STAGE_3 or _get(values, f"{_ZERO}.stage") == 3:
                result.left[key] = _needs(key)
        elif found == "auto":
            _set(result.values, key, value)
            result.filled[key] = value, _origin(key, said, implied)
        elif _differs(key, found, value, said, values):
            refusals.append(f"{key} is {found!r}, but {_origin(key, said, implied)} gives {value!r}")
    if refusals:
        raise ValueError(
            f"a Trainer refuses this config: {'; '.join(refusals)}; set either to the other's value, or "
            'those of the config to "auto"'
        )
    if known["save_on_each_node"]:
        _set(result.values, "checkpoint.use_node_local_storage", True)
    return result


def standing_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with a valid value for each "auto" of the Trainer's, to check the others."""
    filled = fill({**values, _BATCH: None}, dp=1)
    for key in filled.left.keys() - {*_BY_WIDTH}:
        _set(filled.values, key, 1)
    return {**filled.values, _BATCH: None if (total := values.get(_BATCH)) == "auto" else total}


def hidden_size(model: Mapping[str, Any]) -> int | None:
    """Return the hidden size in a model's `config.json`, the largest of several; None if it has none."""
    for part in (model, model.get("text_config")):
        if isinstance(part, Mapping):
            if isinstance(size := part.get("hidden_size"), int):
                return size
            if sizes := part.get("hidden_sizes"):
                return int(max(sizes))
    return None


def refusal(keys: Sequence[str], file: str | Path | None) -> str:
    """Return the problem with keys that are still "auto": who fills them in, and the command that does."""
    trainers = [key for key in keys if key in FILLED]
    nobodys = [key for key in keys if key not in FILLED]
    parts = []
    if trainers:
        parts.append(
            f'"auto" is left in {", ".join(trainers)}, which Hugging Face\'s Trainer fills in: do the same '
            f"with `uni3d config {file or 'FILE'} --world-size N --fill --training-args ARGS.json --save "
            "NEW.json` and train with NEW.json, or give values"
        )
    if nobodys:
        parts.append(f'"auto" is left in {", ".join(nobodys)}, which nothing fills in; give values')
    return "; ".join(parts)


def _value(key: str, known: Mapping[str, Any], *, dp: int, width: int | None, stage: object) -> Any:
    """Return the Trainer's value of a key; None if it can't be known."""
    if key in _BY_ACCELERATE:
        return _BY_ACCELERATE[key]
    if key in _BY_WIDTH:
        sizes = (lambda n: n * n, lambda n: int(0.9 * n * n), lambda n: 10 * n)
        if width is None or (key in _BY_STAGE_3 and stage != 3):
            return None
        return sizes[_BY_WIDTH.index(key)](width)
    taken = [known[name] for name in _FROM[key]]
    if key == _BATCH:
        return dp * taken[0] * taken[1]
    if key == f"{_SCHEDULER}.warmup_min_lr":
        return 0
    if key == _TOTAL:
        return taken[0] if taken[0] > 0 else None
    if key == _WARMUP:
        return _warmup(taken[0], known["max_steps"])
    if key.endswith(".enabled"):
        return any(taken)
    return taken if len(taken) > 1 else taken[0]


def _warmup(steps: float, total: int) -> int | None:
    """Return the warmup's steps: a number of them, or a share of all steps. DeepSpeed needs at least 1."""
    if steps >= 1:
        return int(steps)
    if steps == 0:
        return 1
    return max(1, math.ceil(total * steps)) if total > 0 else None


def _needs(key: str) -> str:
    """Return what would tell a key, or that it needn't be told (see `deepspeed_keys`)."""
    return "may stay, or give --model-config" if key in _BY_WIDTH else "give max_steps in --training-args"


def _origin(key: str, said: Mapping[str, Any], implied: Mapping[str, Any]) -> str:
    """Return where a filled value comes from."""
    if key in _BY_WIDTH:
        return "hidden size"
    if key in _BY_ACCELERATE:
        return "Accelerate's default"
    names = _FROM[key]
    if not names:
        return "always"
    kinds = [
        "" if name in said else " as in the config" if name in implied else " by default" for name in names
    ]
    if len(set(kinds)) == 1:
        return f"{' and '.join(names)}{kinds[0]}"
    return " and ".join(f"{name}{kind}" for name, kind in zip(names, kinds, strict=True))


def _differs(key: str, found: object, value: object, said: Mapping[str, Any], values: Any) -> bool:
    """Return whether a Trainer would refuse the value that the config has."""
    if found is None or value is None or not _FROM.get(key):
        return False
    derives = key == _BATCH and "auto" in (_get(values, _MICRO), _get(values, _STEPS))
    return bool(found != value) and (derives or bool(said.keys() & set(_FROM[key])))


def _implied(values: Mapping[str, Any], dp: int, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that the config's own values imply."""
    found: dict[str, Any] = {}
    for key, names in _FROM.items():
        value = _get(values, key)
        if value in (None, "auto") or key == _BATCH:
            continue
        parts = value if isinstance(value, list) else [value]
        if len(parts) == len(names) or key.endswith(".enabled"):
            found |= dict(zip(names, parts, strict=False))
    found = {name: value for name, value in found.items() if _fits(name, value)}
    total, pair = _get(values, _BATCH), _FROM[_BATCH]
    sizes = [{**found, **said}.get(name) for name in pair]
    if isinstance(total, int) and sizes.count(None) == 1:
        other = dp * next(size for size in sizes if size is not None)
        if other > 0 and total % other == 0:
            found[pair[sizes.index(None)]] = total // other
    return found


def _read(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that matter, with transformers 4's `warmup_ratio` as the share it was."""
    said = {name: given[name] for name in ARGUMENTS if given.get(name) is not None}
    if given.get("warmup_ratio") and not said.get("warmup_steps"):
        said["warmup_steps"] = given["warmup_ratio"]
    for name, value in said.items():
        if not _fits(name, value):
            kind = "true or false" if isinstance(ARGUMENTS[name], bool) else "a number"
            raise ValueError(f"the training arguments have {name} {value!r}; expected {kind}")
    return said


def _fits(name: str, value: object) -> bool:
    """Return whether a value has the type of this argument."""
    if isinstance(default := ARGUMENTS[name], bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    whole = isinstance(default, int) and name != "warmup_steps"
    return isinstance(value, int if whole else int | float)


def _get(values: Mapping[str, Any], key: str) -> Any:
    inner: Any = values
    for part in key.split("."):
        inner = inner.get(part) if isinstance(inner, Mapping) else None
    return inner


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
    values[last] = value
