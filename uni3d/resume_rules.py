"""Rules of a resume: its refusals, and the changes that it reports.

`compare` checks a checkpoint's manifest against the run that resumes from it. The engine calls it before any
tensor changes, with its own optimizer and scheduler (`uni3d.checkpoint.restore`); `uni3d doctor` calls it
with as much of the run as the config defines.

Arrays aren't compared here: `ckpt.load` finds those that are missing or have another shape, and
`missing_arrays` predicts that for the doctor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from uni3d.manifest import OptimizerRecord, RunManifest

IMPLEMENTATION_KEYS = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
"""Entries of a parameter group that choose an implementation, not the result of a step."""

_STATES = {"amsgrad": "another moment", "momentum": "a momentum", "centered": "a mean gradient"}
"""Hyperparameters that add a state to an optimizer, with the name of that state."""


@dataclass(frozen=True, kw_only=True)
class GivenOptimizer:
    """This run's optimizer."""

    type: str | None = None
    """Name of its class; None if only the script knows it."""
    groups: Sequence[Mapping[str, Any]] | None = None
    """Its parameter groups, as in the manifest; None if only the script knows them."""
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    """Defaults from the config for groups without their own; used if `groups` is None."""


@dataclass(frozen=True, kw_only=True)
class GivenScheduler:
    """This run's learning-rate scheduler."""

    type: str
    keys: Collection[str]
    """Keys of its `state_dict`."""
    state: Mapping[str, Any]
    """Known values of the `state_dict`, without those that change at each step."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """The run that resumes. A part that it lacks, or that isn't to be restored, is None."""

    whose: str
    """The subject in messages: "this run" or "the config"."""
    optimizer: GivenOptimizer | None
    scheduler: GivenScheduler | None
    counters: bool = True
    """True if steps, samples and the loss scale are to be restored."""
    order: Mapping[str, int | None] = field(default_factory=dict)
    """Seed and global batch size, on which the order of samples depends; None if not known."""
    loss_scale: float | None = None
    """Initial loss scale; None if the run isn't in fp16."""


class Comparison(NamedTuple):
    """One line for each finding."""

    refusals: list[str]
    """Reasons why the checkpoint can't be loaded."""
    changes: list[str]
    """Differences that don't stop the run, each with the value that is used."""


def compare(saved: RunManifest, given: Given) -> Comparison:
    """Compare a checkpoint's run with the one that resumes from it, except for the arrays."""
    return Comparison(list(_refusals(saved, given)), list(_changes(saved, given)))


def _refusals(saved: RunManifest, given: Given) -> Iterator[str]:
    counters = {"global_steps": saved.engine.global_steps, "global_samples": saved.engine.global_samples}
    missing = [name for name, number in counters.items() if number is None]
    if given.counters and missing:
        yield (
            f"the manifest has no {' and no '.join(missing)}: it holds weights, not a run; load them with "
            "load_module_only=True"
        )
    if given.optimizer is not None:
        yield from _other_optimizer(saved.optimizer, given.optimizer, given.whose)
    mine, advice = given.scheduler, "load it with load_lr_scheduler_states=False"
    if mine is not None and saved.scheduler is None:
        yield f"the checkpoint has no scheduler, but {given.whose} has {mine.type}; {advice}"
    elif mine is not None and saved.scheduler is not None and {*saved.scheduler} != {*mine.keys}:
        yield f"the checkpoint's scheduler isn't {given.whose}'s {mine.type}: its keys differ; {advice}"


def _other_optimizer(saved: OptimizerRecord | None, given: GivenOptimizer, whose: str) -> Iterator[str]:
    """Yield the first reason why the run's optimizer can't load the saved one's state, if there is one."""
    if saved is None:
        yield "the checkpoint has no optimizer; load it with load_optimizer_states=False"
    elif given.type is not None and saved.type != given.type:
        yield f"the checkpoint's optimizer is {saved.type}, but {whose}'s is {given.type}"
    elif given.groups is not None and len(saved.groups) != len(given.groups):
        yield (
            f"the checkpoint's optimizer has {len(saved.groups)} parameter groups, but {whose}'s has "
            f"{len(given.groups)}"
        )
    elif given.groups is not None:
        home = {name: i for i, group in enumerate(saved.groups) for name in group["params"]}
        for i, group in enumerate(given.groups):
            for name in group["params"]:
                if home.get(name) != i:
                    where = f"group {home[name]}" if name in home else "none"
                    yield f"{name} is in parameter group {i}, but in {where} of the checkpoint"
                    return


def missing_arrays(saved: RunManifest, given: Given, *, any_states: bool) -> Iterator[str]:
    """Yield predictable reasons why a strict load would miss arrays.

    `any_states` is True if the checkpoint has optimizer states. Without any, a load leaves the optimizer new.
    """
    if left := saved.model.left_out:
        yield (
            f"{len(left)} frozen parameters were left out of it ({left[0]}, ...); load it with "
            "load_module_strict=False, into a model that has them"
        )
    optimizer, mine = saved.optimizer, given.optimizer
    if optimizer is None or mine is None or optimizer.type != mine.type or not any_states:
        return
    for key, state in _STATES.items():
        values = [bool(group[key]) for group in optimizer.groups if key in group]
        value = mine.hyperparameters.get(key)
        if values and value is not None and bool(value) not in values:
            has, lacks = (given.whose, "the checkpoint") if value else ("the checkpoint", given.whose)
            yield f"with its {key} {has}'s optimizer has {state}, which {lacks}'s lacks"


# --- changes ---------------------------------------------------------------------------------------------


def _changes(saved: RunManifest, given: Given) -> Iterator[str]:
    """Yield a line for each value of the run, or of the checkpoint, that won't be used."""
    if given.optimizer is not None and saved.optimizer is not None:
        yield from _hyperparameters(saved.optimizer, given.optimizer, given.whose)
        if given.scheduler is None and saved.scheduler is not None:
            rates = ", ".join(f"{group['lr']:g}" for group in saved.optimizer.groups if "lr" in group)
            rates = f"the learning rate stays at {rates}"
            yield f"{given.whose} doesn't restore the checkpoint's scheduler: {rates}"
    if given.scheduler is not None and saved.scheduler is not None:
        yield from _schedule(saved.scheduler, given.scheduler, given.whose)
    if given.counters:
        yield from _loss_scale(saved, given)
        yield from _order(saved, given)


def _hyperparameters(saved: OptimizerRecord, given: GivenOptimizer, whose: str) -> Iterator[str]:
    """Yield a line for each different hyperparameter, except those that a scheduler moves."""
    if given.groups is None:
        if saved.type == given.type:
            yield from _of_config(saved.groups, given.hyperparameters, whose)
        return
    for i, (there, here) in enumerate(zip(saved.groups, given.groups, strict=False)):
        for key in sorted(there.keys() & here.keys() - IMPLEMENTATION_KEYS):
            if not _same(here[key], there[key]) and f"initial_{key}" not in here:
                yield _kept(f"group {i}'s {key}", here[key], there[key], whose)
        for key in sorted(there.keys() - here.keys() - IMPLEMENTATION_KEYS):
            yield f"group {i}'s {key} ({there[key]}) in the checkpoint has no counterpart in {whose}"


def _of_config(groups: Sequence[Mapping[str, Any]], given: Mapping[str, Any], whose: str) -> Iterator[str]:
    """Yield a line for each value of the config that no group has; a script may set some groups' own."""
    for key, value in given.items():
        having = [group for group in groups if key in group]
        moves = any(f"initial_{key}" in group for group in having)
        if having and not moves and not any(_same(value, group[key]) for group in having):
            yield _kept(key, value, having[0][key], whose)


def _schedule(saved: Mapping[str, Any], given: GivenScheduler, whose: str) -> Iterator[str]:
    for key, value in given.state.items():
        if not _same(value, saved.get(key)):
            yield _kept(f"the scheduler's {key}", value, saved.get(key), whose)


def _loss_scale(saved: RunManifest, given: Given) -> Iterator[str]:
    scale = saved.engine.loss_scale
    if scale is not None and given.loss_scale is None:
        yield f"the checkpoint's loss scale ({scale['scale']:g}) isn't used: {given.whose} isn't in fp16"
    if scale is None and given.loss_scale is not None:
        start = f"it starts at {given.loss_scale:g}"
        yield f"the checkpoint has no loss scale, as its run wasn't in fp16: {start}"


def _order(saved: RunManifest, given: Given) -> Iterator[str]:
    for key, there in saved.engine.order.items():
        here = given.order.get(key)
        if here is not None and here != there:
            yield (
                f"{key} is {here} in {given.whose}, {there} in the checkpoint: the order of samples changes "
                f"unless you set it to {there}"
            )
    if saved.engine.seed is None and saved.engine.global_samples is not None:  # another framework's
        yield (
            "the checkpoint doesn't say in which order its samples came: this run's own order continues at "
            f"sample {saved.engine.global_samples}"
        )


def _kept(name: str, here: Any, there: Any, whose: str) -> str:
    return f"{name} is {here} in {whose}, {there} in the checkpoint; the checkpoint's is kept"


def _same(here: Any, there: Any) -> bool:
    """Compare a value with one that was stored as JSON, where tuples have become lists."""
    return bool((list(here) if isinstance(here, tuple) else here) == there)
