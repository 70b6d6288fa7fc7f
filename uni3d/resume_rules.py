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

from uni3d.argument_names import OF_ENGINE, ArgumentNames
from uni3d.json_section import other_groups, other_kinds
from uni3d.manifest import OptimizerRecord, RunManifest

IMPLEMENTATION_KEYS = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
"""Entries of a parameter group that choose an implementation, not the result of a step."""

UNKNOWN = ""
"""Class of the optimizer of another framework's checkpoint that doesn't record it, and is read in place."""

_STATES = {"amsgrad": "another moment", "momentum": "a momentum", "centered": "a mean gradient"}
"""Hyperparameters that add a state to an optimizer, with the name of that state."""


@dataclass(frozen=True, kw_only=True)
class GivenOptimizer:
    """This run's optimizer."""

    type: str | None = None
    """Name of its class; None if only the script knows it."""
    members: Sequence[Mapping[str, Any]] | None = None
    """Each of several optimizers, as in the manifest; None if there is one."""
    groups: Sequence[Mapping[str, Any]] | None = None
    """Its parameter groups, as in the manifest; None if only the script knows them."""
    known: Sequence[Mapping[str, Any]] = ()
    """Values of each group that only others of the same kind can replace."""
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    """Defaults from the config for groups without their own; used if `groups` is None."""


@dataclass(frozen=True, kw_only=True)
class GivenScheduler:
    """This run's learning-rate scheduler."""

    type: str
    keys: Collection[Any]
    """Set of the keys of its `state_dict`, with `several` each in a pair with the scheduler's name."""
    state: Mapping[str, Any]
    """Known values of the `state_dict`, without those that change at each step."""
    schedule: Mapping[str, Any] | None = None
    """Type and parameters of a schedule from the config; None if the script made the scheduler."""
    every: Mapping[str, Any] = field(default_factory=dict)
    """Values of the whole `state_dict` that only others of the same kind can replace."""
    several: bool = False
    """True for several schedulers, whose states are in `state` by name."""


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
    """Seed, global batch size and version of the order of samples; None if not known."""
    dataset_length: int | None = None
    """Samples in the engine's own training data; 0 if the script brings the batches, None if not known."""
    epoch_length: int | None = None
    """Samples that an epoch of it is trained on; None if not known."""
    data: tuple[str, int, bool] | None = None
    """The script's own loader of training data: the name of its class, the number of data-parallel ranks, and
    whether a checkpoint can keep where it stands. None if it brings none, or it isn't known."""
    accepted: Collection[str] = ()
    """Changes that don't stop the run: the config's `checkpoint.accept_changes`."""
    arguments: ArgumentNames = OF_ENGINE
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
    if given.counters and saved.engine.global_steps is None:
        yield (
            f"the manifest has no global_steps: it holds weights, not a run; {given.arguments.weights_alone}"
        )
    if given.optimizer is not None:
        yield from _other_optimizer(saved.optimizer, given.optimizer, given)
    yield from _other_kinds(saved, given)
    mine, advice = given.scheduler, given.arguments.without_scheduler
    if mine is not None and saved.scheduler is None:
        yield f"the checkpoint has no scheduler, but {given.whose} has {mine.type}; {advice}"
    elif mine is not None and saved.scheduler is not None and mine.keys != _keys(saved.scheduler, mine):
        yield f"the checkpoint's scheduler isn't {given.whose}'s {mine.type}: its keys differ; {advice}"
    elif "scheduler" not in given.accepted and (differences := list(_other_schedule(saved, given))):
        yield (
            f"{'; '.join(differences)}: the learning rate would leave its curve; {advice}, or go on with "
            f"{given.whose}'s schedule at the checkpoint's step {given.arguments.accept.format('scheduler')}"
        )
    for key, difference, effect in _other_data(saved, given):
        if key not in given.accepted:
            yield f"{difference}: {effect}; go on nevertheless {given.arguments.accept.format(key)}"


def _other_kinds(saved: RunManifest, given: Given) -> Iterator[str]:
    """Yield a line for each hyperparameter or value of the scheduler that can't take its place here."""
    if given.optimizer is not None and saved.optimizer is not None:
        for i, (there, here) in enumerate(zip(saved.optimizer.groups, given.optimizer.known, strict=False)):
            yield from other_groups(there, here, f"optimizer: groups[{i}]", leave=IMPLEMENTATION_KEYS)
    if given.scheduler is not None and saved.scheduler is not None:
        yield from other_kinds(saved.scheduler, given.scheduler.every, "scheduler")


def _keys(state: Mapping[str, Any], mine: GivenScheduler) -> Collection[Any]:
    """Return the keys of a scheduler's state; of several schedulers' by name, with the names."""
    if not mine.several:
        return {*state}
    return {(name, key) for name, part in state.items() if isinstance(part, dict) for key in part}


def _other_schedule(saved: RunManifest, given: Given) -> Iterator[str]:
    """Yield the differences between two schedules from configs."""
    there, mine = saved.schedule, given.scheduler
    if there is None or mine is None or mine.schedule is None:
        return
    before, now = there.get("type"), mine.schedule["type"]
    if before != now:
        yield f"the scheduler is {now} in {given.whose}, {before} in the checkpoint"
        return
    params = there.get("params") or {}
    for key, value in mine.schedule["params"].items():
        if key in params and params[key] != value:
            yield f"the scheduler's {key} is {value} in {given.whose}, {params[key]} in the checkpoint"


def _other_data(saved: RunManifest, given: Given) -> Iterator[tuple[str, str, str]]:
    """Yield each change of the order of samples: its name in `accepted`, the difference, the effect.

    The order depends on its version, the seed and the length of the data, and the position counts samples in
    it, so another batch size changes nothing. A run that hasn't begun has no position to lose, and between
    two epochs another order loses none.
    """
    yield from _other_loader(saved, given)
    there, here, data = saved.engine.dataset_length, given.dataset_length, given.arguments.data
    if given.counters and here and saved.engine.global_steps and saved.engine.global_samples is None:
        difference = f"{data} gives the samples in {given.whose}, but the checkpoint doesn't count its own"
        yield "dataset", difference, "those of its current epoch would come again"
    position, epoch = saved.engine.global_samples, saved.engine.epoch_length or there
    if not given.counters or there is None or not position:
        return
    where = f"in {given.whose}"
    effect = "samples of the current epoch would come twice or not at all"
    if there == 0 and here:
        difference = f"{data} gives the samples {where}, but the script gave the checkpoint's"
        yield "dataset", difference, "those of its current epoch would come again"
    elif here and here != there:
        yield "dataset", f"{data} has {here} samples {where}, {there} in the checkpoint", effect
    elif there and (mine := given.epoch_length) and mine != epoch:
        yield (
            "dataset",
            f"an epoch has {mine} of the {there} samples {where}, {epoch} in the checkpoint, by "
            "dataloader_drop_last and train_batch_size",
            effect,
        )
    differences = [text for text in (_other_seed(saved, given), _other_version(saved, given)) if text]
    if epoch and here != 0 and position % epoch and differences:
        yield "seed", "; ".join(differences), effect


def _other_loader(saved: RunManifest, given: Given) -> Iterator[tuple[str, str, str]]:
    """Yield the difference between the script's loaders that have states."""
    if saved.data is None or given.data is None or not given.counters:
        return
    (kind, dp, resumes), data = given.data, given.arguments.data
    there, n = saved.data.kind, len(saved.data.states)
    effect = "it would begin anew, and samples of its current epoch would come twice or not at all"
    if resumes and kind != there:
        yield "dataset", f"{data} is a {kind} in {given.whose}, a {there} in the checkpoint", effect
    elif resumes and dp != n:
        difference = f"{data} ({kind}) has the states of {n} data-parallel ranks in the checkpoint, but"
        yield "dataset", f"{difference} {given.whose} has {dp} of these ranks", effect


def _other_seed(saved: RunManifest, given: Given) -> str | None:
    seed, mine = saved.engine.seed, given.order.get("seed")
    if None in (seed, mine) or seed == mine:
        return None
    return f"seed is {mine} in {given.whose}, {seed} in the checkpoint"


def _other_version(saved: RunManifest, given: Given) -> str | None:
    version, mine = saved.engine.sample_order, given.order.get("sample_order")
    if mine is None or version == mine:
        return None
    older = "an older one" if version is None else version
    return f"the order of samples is version {mine} in this release, {older} in the checkpoint"


def _other_optimizer(saved: OptimizerRecord | None, given: GivenOptimizer, run: Given) -> Iterator[str]:
    """Yield the first reason why the run's optimizer can't load the saved one's state, if there is one."""
    whose, alone = run.whose, run.arguments.without_optimizer
    if saved is None:
        yield f"the checkpoint has no optimizer; {alone}"
    elif given.type is not None and saved.members != given.members:
        yield (
            f"the checkpoint has {_counted(saved)}, but {whose} has {_counted(given)}: give the same ones, "
            f"of the same names, in the same order and with as many parameter groups; or {alone}"
        )
    elif given.type is not None and saved.type not in (given.type, UNKNOWN):
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


def _counted(optimizer: OptimizerRecord | GivenOptimizer) -> str:
    """Return a text that says which optimizers there are, and how many groups each of several has."""
    if optimizer.members is None:
        return f"one optimizer ({optimizer.type})"
    each = ", ".join(f"{m['name']}: {m['type']}, groups: {m['groups']}" for m in optimizer.members)
    return f"{len(optimizer.members)} optimizers ({each})"


def missing_arrays(saved: RunManifest, given: Given, *, any_states: bool) -> Iterator[str]:
    """Yield predictable reasons why a strict load would miss arrays.

    `any_states` is True if the checkpoint has optimizer states. Without any, a load leaves the optimizer new.
    """
    if left := saved.model.left_out:
        yield (
            f"{len(left)} frozen parameters were left out of it ({left[0]}, ...); load it with "
            f"{given.arguments.lenient}, into a model that has them"
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
        scheduled = given.scheduler is not None and saved.scheduler is not None
        yield from _hyperparameters(saved.optimizer, given.optimizer, given.whose, scheduled=scheduled)
        if given.scheduler is None and saved.scheduler is not None:
            rates = ", ".join(f"{group['lr']:g}" for group in saved.optimizer.groups if "lr" in group)
            rates = f"the learning rate stays at {rates}"
            yield f"{given.whose} doesn't restore the checkpoint's scheduler: {rates}"
    if given.scheduler is not None and saved.scheduler is not None:
        yield from _schedule(saved, given)
    if given.counters:
        yield from _loss_scale(saved, given)
        yield from _order(saved, given)


def _hyperparameters(
    saved: OptimizerRecord, given: GivenOptimizer, whose: str, *, scheduled: bool
) -> Iterator[str]:
    """Yield a line for each different hyperparameter, except those that a scheduler moves."""
    if given.groups is None:
        if saved.type == given.type:
            yield from _of_config(saved.groups, given.hyperparameters, whose)
        return
    for i, (there, here) in enumerate(zip(saved.groups, given.groups, strict=False)):
        for key in sorted(there.keys() & here.keys() - IMPLEMENTATION_KEYS):
            moves = f"initial_{key}" in here or (key == "lr" and scheduled)
            if not _same(here[key], there[key]) and not moves:
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


_PROGRESS = {
    *("last_epoch", "_step_count", "_last_lr", "_is_initial", "_get_lr_called_within_step"),
    *("best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i"),  # of a plateau's, of warm restarts
}


def without_progress(state: Any) -> Any:
    """Return a scheduler's state without what changes at each step, also of schedulers inside it."""
    if isinstance(state, Mapping):
        return {key: without_progress(value) for key, value in state.items() if key not in _PROGRESS}
    return [without_progress(value) for value in state] if isinstance(state, list) else state


def _schedule(saved: RunManifest, given: Given) -> Iterator[str]:
    assert given.scheduler is not None
    assert saved.scheduler is not None
    changed = list(_other_schedule(saved, given)) if "scheduler" in given.accepted else []
    yield from (f"{difference}; {given.whose}'s schedule goes on" for difference in changed)
    for key, value in given.scheduler.state.items():
        there = without_progress(saved.scheduler.get(key))
        if not _same(value, there) and not (changed and key == "base_lrs"):
            yield _kept(f"the scheduler's {key}", value, there, given.whose)


def _loss_scale(saved: RunManifest, given: Given) -> Iterator[str]:
    scale = saved.engine.loss_scale
    if scale is not None and given.loss_scale is None:
        yield f"the checkpoint's loss scale ({scale['scale']:g}) isn't used: {given.whose} isn't in fp16"
    if scale is None and given.loss_scale is not None:
        start = f"it starts at {given.loss_scale:g}"
        yield f"the checkpoint has no loss scale, as its run wasn't in fp16: {start}"


def _order(saved: RunManifest, given: Given) -> Iterator[str]:
    changed = {key: f"{difference}: {effect}" for key, difference, effect in _other_data(saved, given)}
    yield from (text for key, text in changed.items() if key in given.accepted)
    if given.data is not None and saved.engine.global_samples:
        kind, _, resumes = given.data
        why = f"{kind} has no state_dict" if not resumes else "the checkpoint has no state of it"
        if not resumes or saved.data is None:
            yield f"{given.arguments.data} begins anew: {why}"
    if "seed" not in changed:
        yield from _harmless_order(saved, given)
    batch, size = saved.engine.train_batch_size, given.order.get("train_batch_size")
    if None not in (batch, size) and batch != size:
        yield (
            f"train_batch_size is {size} in {given.whose}, {batch} in the checkpoint: the order of samples "
            f"stays, and goes on at sample {saved.engine.global_samples}"
        )
    if saved.engine.global_samples is None and given.order.get("train_batch_size"):
        at = saved.engine.samples(size or 0)
        yield f"the checkpoint doesn't count samples: {given.whose} goes on at sample {at}"
    elif saved.engine.seed is None and given.order.get("seed") is not None:  # another framework's
        yield (
            "the checkpoint doesn't say in which order its samples came: this run's own order continues at "
            f"sample {saved.engine.global_samples}"
        )


def _harmless_order(saved: RunManifest, given: Given) -> Iterator[str]:
    """Yield the changes of seed and version between two epochs, or where the data's length isn't known."""
    engine = saved.engine
    reorders = engine.global_samples and 0 not in (engine.dataset_length, given.dataset_length)
    if (difference := _other_seed(saved, given)) is not None:
        order = "the order of samples changes, and " if reorders else ""
        yield f"{difference}: {order}dropout draws other masks"
    difference = _other_version(saved, given)
    if reorders and engine.seed is not None and difference is not None:
        yield f"{difference}: from here on, samples come in another order"


def _kept(name: str, here: Any, there: Any, whose: str) -> str:
    return f"{name} is {here} in {whose}, {there} in the checkpoint; the checkpoint's is kept"


def _same(here: Any, there: Any) -> bool:
    """Compare a value with one that was stored as JSON, where tuples have become lists."""
    return bool((list(here) if isinstance(here, tuple) else here) == there)
