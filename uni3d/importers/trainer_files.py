"""Files that loops of transformers and accelerate write beside the weights.

    optimizer.pt, optimizer.bin     the optimizer's state_dict: by parameter name, or numbered
    scheduler.pt, scheduler.bin     the schedule's state_dict
    trainer_state.json              the Trainer's number of steps

Numbered states have no names of parameters. They are read where it is certain which parameter each belongs
to: by the order of a given optimizer, or by shapes that no two parameters share.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from ckpt import CheckpointError
from uni3d.importers.dcp import counted_steps
from uni3d.importers.dcp.names import Steps
from uni3d.importers.dcp.optimizer import read_optimizer
from uni3d.importers.pickles import plain
from uni3d.importers.source import PARAMETER, Array, Options, Source
from uni3d.importers.torch_files import load
from uni3d.importers.torch_tensors import StoredTensor, item

_OPTIMIZER, _SCHEDULER = ("optimizer.pt", "optimizer.bin"), ("scheduler.pt", "scheduler.bin")
_STATE = "trainer_state.json"


def with_optimizer(source: Source, folder: Path, options: Options) -> Source:
    """Return the source of a folder's weights with the optimizer in a file beside them, if it can be read.

    Else the reason is in `left_out`.
    """
    file = _one_of(folder, _OPTIMIZER)
    if file is None or options.weights_only:
        return with_counters(source, folder, options)
    try:
        content = _Optimizer(file, options)
        content.name(source, options.optimizer_order)
        arrays, optimizer = read_optimizer(content, content.steps, dict.fromkeys(_shapes(source)))
    except CheckpointError as error:
        left_out = [*source.left_out, f"{file.name}: optimizer state, not read: {error}"]
        return with_counters(replace(source, left_out=left_out, files=source.files | {file}), folder, options)
    grouped = {name for group in optimizer.groups for name in group["params"]}
    found = replace(
        source,
        arrays=[*source.arrays, *arrays],
        optimizer=optimizer,
        frozen=frozenset(_shapes(source).keys() - grouped),
        step=counted_steps({}, optimizer) or 0,
        left_out=[*source.left_out, *content.notes],
        files=source.files | {file},
    )
    return with_counters(found, folder, options)


def with_counters(source: Source, folder: Path, options: Options) -> Source:
    """Return the source with the Trainer's step and, if it has an optimizer, the state of its schedule."""
    state, file = folder / _STATE, _one_of(folder, _SCHEDULER)
    left_out, files, step, schedule = list[str](), set(source.files), source.step, source.scheduler
    if state.is_file():
        counted = _step(state)
        step = step if counted is None else counted
        what = "not read" if counted is None else "not read but for its number of steps"
        left_out.append(f"{_STATE}: {what}")
        files.add(state)
    if file is not None and source.optimizer is not None:
        files.add(file)
        try:
            schedule = plain(_items(load(file, options)))
        except (CheckpointError, TypeError) as error:
            left_out.append(f"{file.name}: LR schedule, not read: {error}")
    at = schedule.get("last_epoch") if isinstance(schedule, Mapping) else None
    if isinstance(at, int) and step and at != step:
        left_out.append(
            f"{file and file.name}: stands at {at} after {step} steps; accelerate counts one for each process"
        )
    kept = schedule if isinstance(schedule, dict) else source.scheduler
    lines = [*source.left_out, *left_out]
    return replace(source, step=step, scheduler=kept, left_out=lines, files=frozenset(files))


class _Optimizer:
    """A file of an optimizer's state_dict, in DCP's flat form (`dcp.names.Content`)."""

    without = ""

    def __init__(self, file: Path, options: Options) -> None:
        self.where, self.notes = str(file), list[str]()
        content = load(file, options)
        if not isinstance(content, Mapping) or not {"state", "param_groups"} <= content.keys():
            raise CheckpointError("not the state_dict of an optimizer")
        self._states: Mapping[Any, Mapping[str, Any]] = content["state"]
        self._groups: list[dict[str, Any]] = [dict(group) for group in content["param_groups"]]
        self.tensors: dict[str, StoredTensor] = {}
        self.steps: dict[str, Steps] = {}
        self._objects: dict[str, Any] = {}

    def name(self, source: Source, order: Sequence[Sequence[str]] | None) -> None:
        """Fill in the entries, with the names of the source's parameters.

        Raises:
            CheckpointError: the states are numbered, and their parameters aren't certain.
        """
        keys = [*chain.from_iterable(group["params"] for group in self._groups)]
        names = {key: key for key in keys}
        if any(isinstance(key, int) for key in keys):
            names = self._by_order(source, order) if order else self._by_shape(source)
        groups = [{**group, "params": [names[key] for key in group["params"]]} for group in self._groups]
        self._add(("param_groups",), groups)
        for key, states in self._states.items():
            if key not in names:
                raise CheckpointError(f"it has states of {key}, which is in no parameter group")
            for state, value in states.items():
                self._add(("state", names[key], state), value)

    def _by_order(self, source: Source, order: Sequence[Sequence[str]]) -> dict[Any, str]:
        """Return the names by number, as torch's `load_state_dict` matches them."""
        there, here = [len(group["params"]) for group in self._groups], [len(names) for names in order]
        if there != here:
            raise CheckpointError(
                f"its states are numbered, in groups of {there} parameters; the given optimizer's have {here}"
            )
        numbers = chain.from_iterable(group["params"] for group in self._groups)
        names = dict(zip(numbers, chain.from_iterable(order), strict=True))
        shapes = _shapes(source)
        for key, shape in self._shapes().items():
            if shapes.get(names[key]) != shape:
                raise CheckpointError(
                    f"its states are numbered, and number {key} has shape {list(shape)}; the given "
                    f"optimizer's is {names[key]}, whose shape is {list(shapes.get(names[key], ()))}"
                )
        return names

    def _by_shape(self, source: Source) -> dict[Any, str]:
        """Return the names by number if each shape is one parameter's and one state's alone."""
        states, weights = self._shapes(), _shapes(source)
        times = Counter(weights.values())
        alone = {shape: name for name, shape in weights.items() if times[shape] == 1}
        numbers = {key for group in self._groups for key in group["params"]}
        certain = {key: alone[shape] for key, shape in states.items() if shape in alone}
        if certain.keys() != numbers or len({*certain.values()}) < len(certain):
            raise CheckpointError(
                "its states are numbered, and it isn't certain which parameter each belongs to; load it in "
                "place with the optimizer that it was saved from"
            )
        self.notes.append(f"{Path(self.where).name}: its numbered states were matched by their shapes")
        return certain

    def _shapes(self) -> dict[Any, tuple[int, ...]]:
        """Return the shape of each number's states; raises CheckpointError if they differ."""
        found: dict[Any, tuple[int, ...]] = {}
        for key, states in self._states.items():
            shapes = {v.shape for v in states.values() if isinstance(v, StoredTensor) and v.shape}
            if len(shapes) > 1:
                raise CheckpointError("its states are numbered, and have several shapes for one parameter")
            found |= dict.fromkeys([key] if shapes else [], *shapes)
        return found

    def _add(self, steps: Steps, value: Any) -> None:
        key = ".".join(map(str, steps))
        self.steps[key] = steps
        if isinstance(value, StoredTensor):
            self.tensors[key] = value
        else:
            self._objects[key] = value

    def read(self, name: str) -> Array:
        return self.tensors[name].read()

    def read_part(self, name: str, part: tuple[slice, ...]) -> Array:
        return self.tensors[name].read_part(part)

    def number(self, name: str) -> Any:
        return item(self.tensors[name])

    def object(self, name: str) -> Any:
        return self._objects[name]

    def tied(self, name: str, owner: str) -> bool:
        return False

    def leave_out(self, name: str, reason: str) -> None:
        self.notes.append(f"{name}: {reason}")

    def note(self, line: str) -> None:
        self.notes.append(line)


def _shapes(source: Source) -> dict[str, tuple[int, ...]]:
    return {array.name: array.shape for array in source.arrays if array.state == PARAMETER}


def _one_of(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _step(file: Path) -> int | None:
    try:
        step = json.loads(file.read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if type(step) is int else None


def _items(value: Any) -> Any:
    """Return nested containers with numbers in the place of tensors of one element."""
    if isinstance(value, Mapping):
        return {key: _items(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_items(each) for each in value]
    return item(value) if isinstance(value, StoredTensor) and value.size == 1 else value
