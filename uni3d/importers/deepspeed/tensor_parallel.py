"""How DeepSpeed's tensor-parallel ranks' parts of a parameter go together.

The checkpoint says it where its writer did, by patterns of names (`universal_checkpoint_info`, whose patterns
are matched from a name's beginning): Megatron-DeepSpeed's, and DeepSpeed's own AutoTP. Else the user says it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt import CheckpointError
from uni3d.importers.deepspeed.zero import ParameterPart, Read
from uni3d.importers.pickles import StandIn
from uni3d.importers.source import Options

Array = npt.NDArray[Any]

RULES = ("0", "1", "0x2", "0x3", "replicated", "average")
"""What `--split` may say: the dim along which the parts lie; that each is of two matrices (a gate and its
values), or three (q, k and v), which were cut along dim 0; that they are the same; that their mean counts."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How the parts of one parameter go together."""

    kind: str
    """`cat`, `replicated` or `average`."""
    dim: int = 0
    widths: tuple[tuple[int, ...], ...] = ()
    """Where a parameter is several in one (q, k and v): of each, its width along `dim` on each rank."""
    several: int = 1
    """How many of the same width it is in one."""
    rows: int | None = None
    """Rows of the whole, the others being padding of the vocabulary."""


class Rules:
    """Of all parameters of a checkpoint."""

    def __init__(self, info: Mapping[str, Any] | None, options: Options, where: str) -> None:
        self._info, self._split, self._where = info, options.split, where
        self._used: set[str] = set()

    def of(self, name: str, tp: int, *, trained: bool) -> Rule:
        """How the parts of `name` on `tp` ranks go together.

        What no pattern matches lies along dim 0, if it was trained; the patterns aren't made for others.

        Raises:
            CheckpointError: nobody says it.
        """
        if tp == 1:
            return Rule(kind="cat", rows=self._rows(name))
        told = [(pattern, rule) for pattern, rule in self._split if fnmatchcase(name, pattern)]
        if len({rule for _, rule in told}) > 1:
            raise CheckpointError(
                f"--split says of {name} both {' and '.join('='.join(each) for each in told)}; give patterns "
                "of which one matches it"
            )
        if told:
            self._used |= {pattern for pattern, _ in told}
            return _told(told[0][1])
        found = None if self._info is None else self._by_info(name, tp, self._info)
        if found is None and self._info is not None and trained:
            found = Rule(kind="cat")
        if found is None:
            raise CheckpointError(
                f"{self._where} doesn't say how the {tp} tensor-parallel parts of {name} go together; say it "
                f"by --split 'PATTERN=RULE', where RULE is one of {', '.join(RULES)}"
            )
        return found

    def check_used(self) -> None:
        """Refuse what the user said and nothing was decided by."""
        for pattern, rule in self._split:
            if pattern not in self._used:
                raise CheckpointError(
                    f"--split {pattern}={rule} is of no parameter with tensor-parallel parts in {self._where}"
                )

    def _rows(self, name: str) -> int | None:
        """Of a parameter that has a row for each word of a padded vocabulary, how many are of words."""
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
                    return Rule(
                        kind="cat", dim=dim, widths=self._widths(fields, pattern, dim, tp, info, name)
                    )
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
                f"{self._where} doesn't say how wide the parts are of which {name} consists; convert it by a "
                "newer DeepSpeed"
            )
        return tuple((size // tp,) * tp for size in sizes)


def _told(rule: str) -> Rule:
    """One of `RULES`."""
    if not rule[0].isdigit():
        return Rule(kind=rule)
    dim, _, several = rule.partition("x")
    return Rule(kind="cat", dim=int(dim), several=int(several or 1))


def _check_scales(name: str, info: Mapping[str, Any], where: str) -> None:
    """Refuse what its writer says is scaled on some ranks: no rule here undoes that."""
    maps = (info.get("affine_map") or {}).get("params") or {}
    for pattern, described in maps.items():
        if re.match(pattern, name) and any(scale != 1 for scale in _found(described, "scale")):
            raise CheckpointError(f"{where}: the parts of {name} are scaled, which isn't read")


def _found(value: Any, key: str) -> list[Any]:
    """All values under `key`, however deep."""
    if isinstance(value, Mapping):
        own = [value[key]] if key in value else []
        return own + [found for each in value.values() for found in _found(each, key)]
    if isinstance(value, list | tuple):
        return [found for each in value for found in _found(each, key)]
    return []


def _fields(value: Any) -> Mapping[str, Any]:
    """Of a dataclass of DeepSpeed's."""
    if isinstance(value, StandIn) and isinstance(value.state, Mapping):
        return value.state
    raise CheckpointError(f"a description of joined parameters is {value!r}")


def join(parts: Sequence[ParameterPart], rule: Rule, name: str) -> ParameterPart:
    """One part of the parts of all tensor-parallel ranks."""
    first = parts[0]
    if len(parts) == 1 and rule.rows is None:
        return first
    for part in parts[1:]:
        if part.states.keys() != first.states.keys() or part.group != first.group:
            raise CheckpointError(
                f"{part.origin}: {name} has other states, or is in another group, than on rank 0"
            )
        if part.scalars != first.scalars:
            raise CheckpointError(f"{part.origin}: {name} is at {part.scalars}, on rank 0 at {first.scalars}")
    shape = _whole_shape([part.shape for part in parts], rule, f"{first.origin}: {name}")
    states: dict[str, Read] = {
        state: _Joined([part.states[state] for part in parts], rule, shape, f"{first.origin}: {name}/{state}")
        for state in first.states
    }
    return ParameterPart(
        shape=shape, origin=first.origin, states=states, group=first.group, scalars=first.scalars
    )


def _whole_shape(shapes: Sequence[tuple[int, ...]], rule: Rule, what: str) -> tuple[int, ...]:
    if rule.kind != "cat":
        if len(set(shapes)) > 1:
            raise CheckpointError(f"{what} should be {rule.kind}, but has the shapes {list(shapes)}")
        return shapes[0]
    others = {(len(s), *s[: rule.dim], *s[rule.dim + 1 :]) for s in shapes}
    if len(others) > 1 or rule.dim >= len(shapes[0]):
        raise CheckpointError(
            f"{what} can't be joined along dim {rule.dim}: its parts have the shapes {list(shapes)}"
        )
    if any(shape[rule.dim] % rule.several for shape in shapes):
        raise CheckpointError(f"{what} isn't {rule.several} in one: its parts have the shapes {list(shapes)}")
    length = sum(shape[rule.dim] for shape in shapes)
    if rule.rows is not None:
        if rule.rows > length:
            raise CheckpointError(f"{what} has {length} rows, and should have at least {rule.rows}")
        length = rule.rows
    return (*shapes[0][: rule.dim], length, *shapes[0][rule.dim + 1 :])


class _Joined:
    """A state of a parameter, read from all ranks' parts."""

    def __init__(
        self, reads: Sequence[Callable[[], Array]], rule: Rule, shape: tuple[int, ...], what: str
    ) -> None:
        self._reads, self._rule, self._shape, self._what = reads, rule, shape, what

    def __call__(self) -> Array:
        rule, parts = self._rule, [read() for read in self._reads]
        if rule.kind == "replicated":
            if any(part.tobytes() != parts[0].tobytes() for part in parts[1:]):
                raise CheckpointError(
                    f"{self._what} should be the same on all tensor-parallel ranks, and isn't"
                )
            return parts[0]
        if rule.kind == "average":
            mean: Array = np.mean(parts, axis=0, dtype=parts[0].dtype)
            return mean
        if rule.several > 1:
            cut = [np.split(part, rule.several, axis=rule.dim) for part in parts]
            return np.concatenate([c[i] for i in range(rule.several) for c in cut], axis=rule.dim)
        if rule.widths:
            return self._by_widths(parts)
        whole = np.concatenate(parts, axis=rule.dim)
        return whole[: self._shape[0]] if rule.rows is not None else whole

    def _by_widths(self, parts: Sequence[Array]) -> Array:
        dim, widths = self._rule.dim, self._rule.widths
        held = [sum(each[rank] for each in widths) for rank in range(len(parts))]
        if held != [part.shape[dim] for part in parts]:
            raise CheckpointError(
                f"{self._what} has parts of {[part.shape[dim] for part in parts]} along dim {dim}, and "
                f"should have {held}"
            )
        cuts = [np.cumsum([each[rank] for each in widths])[:-1] for rank in range(len(parts))]
        split = [np.split(part, cut, axis=dim) for part, cut in zip(parts, cuts, strict=True)]
        return np.concatenate(
            [piece for i in range(len(widths)) for piece in (s[i] for s in split)], axis=dim
        )
