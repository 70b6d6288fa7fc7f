"""Merging of tensor-parallel shards in DeepSpeed checkpoints.

Megatron-DeepSpeed and DeepSpeed's AutoTP record the rules as name patterns (`universal_checkpoint_info`; a
pattern is matched from a name's beginning). For other checkpoints the user gives them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np

from ckpt import CheckpointError
from uni3d.importers.deepspeed.zero import ParameterPart
from uni3d.importers.pickles import StandIn
from uni3d.importers.source import Array, Options, Read

RULES = ("0", "1", "0x2", "0x3", "replicated", "average")
"""Rules of `--split`: concatenate along dim 0 or 1; two fused matrices (gate and values) or three (q, k and
v), each split along dim 0; equal on all ranks; averaged over the ranks."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Rule for merging the shards of one parameter."""

    kind: str
    """`cat`, `replicated` or `average`."""
    dim: int = 0
    widths: tuple[tuple[int, ...], ...] = ()
    """Widths along `dim` of each fused matrix (q, k and v) on each rank, if they differ."""
    several: int = 1
    """Number of fused matrices of equal width."""
    rows: int | None = None
    """Rows without the padding of the vocabulary."""


class Rules:
    """Rules for all parameters of a checkpoint."""

    def __init__(self, info: Mapping[str, Any] | None, options: Options, where: str) -> None:
        self._info, self._split, self._where = info, options.split, where
        self._used: set[str] = set()

    def of(self, name: str, tp: int, *, trained: bool) -> Rule:
        """Return the rule for the shards of `name` on `tp` ranks.

        A trained parameter that no pattern matches is split along dim 0. Frozen ones need a pattern: the
        checkpoint's patterns weren't made for them.

        Raises:
            CheckpointError: no rule is known.
        """
        if tp == 1:
            return Rule(kind="cat", rows=self._rows(name))
        told = [(pattern, rule) for pattern, rule in self._split if fnmatchcase(name, pattern)]
        if len({rule for _, rule in told}) > 1:
            raise CheckpointError(
                f"--split has several rules for {name}: {', '.join('='.join(each) for each in told)}; give "
                "patterns of which only one matches it"
            )
        if told:
            self._used |= {pattern for pattern, _ in told}
            return _told(told[0][1])
        found = None if self._info is None else self._by_info(name, tp, self._info)
        if found is None and self._info is not None and trained:
            found = Rule(kind="cat")
        if found is None:
            raise CheckpointError(
                f"{self._where} doesn't record how to merge the {tp} tensor-parallel shards of {name}; give "
                f"--split 'PATTERN=RULE', where RULE is one of {', '.join(RULES)}"
            )
        return found

    def check_used(self) -> None:
        """Refuse `--split` patterns that had no effect."""
        for pattern, rule in self._split:
            if pattern not in self._used:
                raise CheckpointError(
                    f"--split {pattern}={rule} matches no tensor-parallel parameter of {self._where}"
                )

    def _rows(self, name: str) -> int | None:
        """Return the unpadded number of rows of a vocabulary parameter; None for others."""
        info = self._info or {}
        if any(re.match(pattern, name) for pattern in info.get("vocabulary_parameter_patterns") or []):
            return int(info["original_vocab_size"])
        return None

    def _by_info(self, name: str, tp: int, info: Mapping[str, Any]) -> Rule | None:
        def matches(key: str) -> bool:
            return any(re.match(pattern, name) for pattern in info.get(key) or [])

        _check_scales(name, info, self._where)
        rows = self._rows(name)
        if matches("tp_replicated_parameter_patterns"):
            return Rule(kind="replicated")
        if matches("parameter_to_average_patterns"):
            return Rule(kind="average")
        if matches("parameter_with_2_sub_params_cat_dim_0"):
            return Rule(kind="cat", several=2)
        for sub in info.get("parameter_with_sub_params") or []:
            fields = sub if isinstance(sub, Mapping) else _fields(sub)
            for pattern in fields["patterns"]:
                if re.match(pattern, name):
                    dim = int(fields["partition_dim"])
                    widths = self._widths(fields, pattern, dim, tp, info, name)
                    return Rule(kind="cat", dim=dim, widths=widths)
        if matches("parameter_with_row_parallelism_patterns"):
            return Rule(kind="cat", dim=1, rows=rows)
        return None if rows is None else Rule(kind="cat", rows=rows)

    def _widths(
        self, fields: Mapping[str, Any], pattern: str, dim: int, tp: int, info: Mapping[str, Any], name: str
    ) -> tuple[tuple[int, ...], ...]:
        widths = (info.get("sub_param_shard_widths") or {}).get(pattern)
        if widths is not None:
            return tuple(tuple(each) for each in widths)
        sizes = fields["shape"][dim]
        if isinstance(sizes, int) or any(size % tp for size in sizes):
            raise CheckpointError(
                f"{self._where} doesn't record the widths of the fused parts of {name}; convert it with a "
                "newer DeepSpeed"
            )
        return tuple((size // tp,) * tp for size in sizes)


def _told(rule: str) -> Rule:
    """Parse one of `RULES`."""
    if not rule[0].isdigit():
        return Rule(kind=rule)
    dim, _, several = rule.partition("x")
    return Rule(kind="cat", dim=int(dim), several=int(several or 1))


def _check_scales(name: str, info: Mapping[str, Any], where: str) -> None:
    """Refuse shards that are scaled on some ranks: no rule undoes that."""
    maps = (info.get("affine_map") or {}).get("params") or {}
    for pattern, described in maps.items():
        if re.match(pattern, name) and any(scale != 1 for scale in _found(described, "scale")):
            raise CheckpointError(f"{where}: the shards of {name} are scaled, which isn't supported")


def _found(value: Any, key: str) -> list[Any]:
    """Return all values under `key`, at any depth."""
    if isinstance(value, Mapping):
        own = [value[key]] if key in value else []
        return own + [found for each in value.values() for found in _found(each, key)]
    if isinstance(value, list | tuple):
        return [found for each in value for found in _found(each, key)]
    return []


def _fields(value: Any) -> Mapping[str, Any]:
    """Return the fields of a pickled dataclass of DeepSpeed."""
    if isinstance(value, StandIn) and isinstance(value.state, Mapping):
        return value.state
    raise CheckpointError(f"unknown description of fused parameters: {value!r}")


def join(parts: Sequence[ParameterPart], rule: Rule, name: str) -> ParameterPart:
    """Merge the shards of all tensor-parallel ranks."""
    first = parts[0]
    if len(parts) == 1 and rule.rows is None:
        return first
    for part in parts[1:]:
        if part.states.keys() != first.states.keys() or part.group != first.group:
            raise CheckpointError(f"{part.origin}: states or parameter group of {name} differ from rank 0")
        if part.scalars != first.scalars:
            raise CheckpointError(f"{part.origin}: {name} has {part.scalars}, but {first.scalars} on rank 0")
    what = f"{first.origin}: {name}"
    shape = _whole_shape([part.shape for part in parts], rule, what)
    states: dict[str, Read] = {
        state: partial(_joined, [part.states[state] for part in parts], rule, shape, f"{what}/{state}")
        for state in first.states
    }
    return replace(first, shape=shape, states=states)


def _whole_shape(shapes: Sequence[tuple[int, ...]], rule: Rule, what: str) -> tuple[int, ...]:
    if rule.kind != "cat":
        if len(set(shapes)) > 1:
            raise CheckpointError(f"{what} should be {rule.kind}, but its shards have shapes {list(shapes)}")
        return shapes[0]
    others = {(len(s), *s[: rule.dim], *s[rule.dim + 1 :]) for s in shapes}
    if len(others) > 1 or rule.dim >= len(shapes[0]):
        raise CheckpointError(
            f"{what} can't be concatenated along dim {rule.dim}: its shards have shapes {list(shapes)}"
        )
    if any(shape[rule.dim] % rule.several for shape in shapes):
        raise CheckpointError(f"{what} isn't {rule.several} fused matrices: shards of shapes {list(shapes)}")
    length = sum(shape[rule.dim] for shape in shapes)
    if rule.rows is not None:
        if rule.rows > length:
            raise CheckpointError(f"{what} has {length} rows, expected at least {rule.rows}")
        length = rule.rows
    return (*shapes[0][: rule.dim], length, *shapes[0][rule.dim + 1 :])


def _joined(reads: Sequence[Read], rule: Rule, shape: tuple[int, ...], what: str) -> Array:
    """Return a state of a parameter, merged from the shards of all ranks."""
    parts = [read() for read in reads]
    if rule.kind == "replicated":
        if any(part.tobytes() != parts[0].tobytes() for part in parts[1:]):
            raise CheckpointError(f"{what} differs between tensor-parallel ranks, but should be replicated")
        return parts[0]
    if rule.kind == "average":
        mean: Array = np.mean(parts, axis=0, dtype=parts[0].dtype)
        return mean
    if rule.several > 1:
        cut = [np.split(part, rule.several, axis=rule.dim) for part in parts]
        return np.concatenate([c[i] for i in range(rule.several) for c in cut], axis=rule.dim)
    if rule.widths:
        return _by_widths(parts, rule.dim, rule.widths, what)
    whole = np.concatenate(parts, axis=rule.dim)
    return whole[: shape[0]] if rule.rows is not None else whole


def _by_widths(parts: Sequence[Array], dim: int, widths: tuple[tuple[int, ...], ...], what: str) -> Array:
    held = [sum(each[rank] for each in widths) for rank in range(len(parts))]
    found = [part.shape[dim] for part in parts]
    if held != found:
        raise CheckpointError(f"{what} has shards of {found} along dim {dim}, expected {held}")
    cuts = [np.cumsum([each[rank] for each in widths])[:-1] for rank in range(len(parts))]
    split = [np.split(part, cut, axis=dim) for part, cut in zip(parts, cuts, strict=True)]
    return np.concatenate([s[i] for i in range(len(widths)) for s in split], axis=dim)
