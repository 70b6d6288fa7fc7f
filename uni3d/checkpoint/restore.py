"""Loads of a checkpoint into an engine: all ranks agree that it fits before anything changes."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

import ckpt
from ckpt.load import Target
from ckpt.read import WEIGHT_STATES
from parallel import HostComm
from parallel.tensors import named_parameters, persistent_buffers, whole_module
from uni3d import state
from uni3d.argument_names import OF_ENGINE, ArgumentNames
from uni3d.checkpoint.background import threads_per_rank
from uni3d.checkpoint.data_state import DataLoad, is_data
from uni3d.checkpoint.extra_load import ExtraLoad
from uni3d.checkpoint.extra_state import current_extra, restore_optimizer_extra
from uni3d.checkpoint.flat_states import FlatTarget, finish_flat, flat_targets
from uni3d.checkpoint.json_state import decoded, encoded
from uni3d.checkpoint.known_kinds import known_state, like_state
from uni3d.checkpoint.lost_ranks import told_in
from uni3d.checkpoint.optimizer_groups import (
    check_states,
    given_optimizer,
    names_by_id,
    restore_optimizer,
)
from uni3d.checkpoint.pinned import targets_of
from uni3d.checkpoint.several import SchedulerSet, optimizers_by_name, schedulers_by_name, type_of
from uni3d.checkpoint.stored_weights import StoredWeights
from uni3d.checkpoint.tied import as_stored, tie_refusals, untied
from uni3d.config.scheduler import SchedulerConfig, describe_schedule
from uni3d.importers.in_place import ForeignCheckpoint, open_together
from uni3d.manifest import DCP_ATOM, SAMPLE_ORDER, EngineRecord, RunManifest, is_extra
from uni3d.optim.lr_schedules import go_on
from uni3d.resume_rules import UNKNOWN, Given, GivenScheduler, compare, without_progress
from uni3d.state import Inventory
from uni3d.train_state import RunState

CustomLoad = Callable[[Mapping[str, Tensor], nn.Module], Any]
"""A script's own loader of the model's weights, called with the keywords `src` and `dst`."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Parts of a checkpoint to load."""

    strict: bool = True
    """True if missing or unexpected arrays are an error."""
    optimizer: bool = True
    scheduler: bool = True
    counters: bool = True
    """True for steps, samples and the loss scale."""
    custom: CustomLoad | None = None
    """Loads parameters and buffers; None loads them by name."""


class Loaded(NamedTuple):
    """Result of a load."""

    report: ckpt.LoadReport
    """The arrays that were restored, defaulted and dropped."""
    url: str
    client_state: dict[str, Any]


class Restorer:
    """Loads checkpoints into one engine. All calls are collective."""

    def __init__(
        self,
        state: RunState,
        *,
        comm: HostComm,
        inventory: Inventory,
        arguments: ArgumentNames = OF_ENGINE,
    ) -> None:
        """Load into `state`; messages name the caller's `arguments`."""
        self._state = state
        self._arguments = arguments
        self._comm = comm
        self._inventory = inventory
        self._threads = threads_per_rank(comm.size)

    def load(self, run: str | Path | ckpt.Checkpoint, tag: str | int | None, wanted: Wanted) -> Loaded:
        """Load the model, the optimizer, the scheduler and the counters; see `Engine.load_checkpoint`.

        `run` may be another framework's folder or file, or what each rank has opened.

        Raises:
            ckpt.CheckpointError: the checkpoint doesn't fit; nothing has changed.
            ckpt.PartialLoadError: the load failed half-way; the engine's state is mixed.
        """
        with told_in(
            self._comm,
            f"the load from {run.url if isinstance(run, ckpt.Checkpoint) else run}",
            ckpt.PartialLoadError,
        ):
            try:
                return self._loaded(run, tag, wanted)
            except ckpt.PartialLoadError:
                raise
            except ckpt.CheckpointError:
                # All must have been refused: none was interrupted meanwhile, so that more can be collective.
                self._comm.all_reduce(None, lambda _: None)
                raise

    def _loaded(self, run: str | Path | ckpt.Checkpoint, tag: str | int | None, wanted: Wanted) -> Loaded:
        self._state.model.reshard()  # parameters are looked up as the optimizer has them
        model = self._state.model
        buffers = [model.first_name(name) for name, _ in persistent_buffers(model.module)]
        order = self._order() if wanted.optimizer else None
        checkpoint = open_together(
            self._comm,
            run,
            tag,
            buffers=buffers,
            ties=model.ties,
            optimizer=order,
            states=wanted.optimizer,
        )
        saved = ckpt.agreed(self._comm, lambda: RunManifest.of(checkpoint))
        try:
            report = self._load(checkpoint, saved, wanted)
        except ckpt.CheckpointError as error:
            text = str(error) if checkpoint.url in str(error) else f"{checkpoint.url}: {error}"
            if isinstance(checkpoint, ForeignCheckpoint) and checkpoint.left_out:
                text += f"; left out of {checkpoint.url}: {'; '.join(checkpoint.left_out)}"
            raise type(error)(text) from error
        if self._comm.rank == 0:
            print(f"uni3d: loaded {checkpoint.url}: {report}", file=sys.stderr, flush=True)
            self._tell_resize(saved)
        return Loaded(report, checkpoint.url, saved.client_state)

    def _order(self) -> list[list[str]] | None:
        """Return the names of the optimizer's parameters, by group."""
        if self._state.optimizer is None:
            return None
        names = names_by_id(self._state.model)
        return [[names.get(id(p), "") for p in g["params"]] for g in self._state.optimizer.param_groups]

    def _tell_resize(self, saved: RunManifest) -> None:
        """Print a line if another topology wrote the checkpoint."""
        now, before = self._state.model.ranks, saved.written_on
        if before is not None and before != now:
            print(f"uni3d: new topology: {before.text} -> {now.text}", file=sys.stderr, flush=True)

    def _load(self, checkpoint: ckpt.Checkpoint, saved: RunManifest, wanted: Wanted) -> ckpt.LoadReport:
        optimizer = self._state.optimizer if wanted.optimizer else None
        scheduler = self._state.lr_scheduler if wanted.scheduler else None
        # All ranks refuse together, before any of them changes a tensor.
        changes = ckpt.agreed(self._comm, lambda: self._check_fits(saved, optimizer, scheduler, wanted))
        model_too = wanted.custom is None
        objects = self._state.objects if wanted.counters else {}
        extra = ExtraLoad(
            self._state.model, optimizer, saved, self._comm, model_too=model_too, objects=objects
        )
        extra.check(checkpoint.url, strict=wanted.strict)
        data = DataLoad(self._state.data, self._state.model.data_part, saved, counters=wanted.counters)
        report = self._load_arrays(checkpoint, saved, optimizer, wanted, extra, data)
        try:
            if wanted.custom is not None:
                self._load_model(checkpoint, wanted.custom)
            ckpt.agreed(self._comm, lambda: self._restore_rest(saved, optimizer, scheduler))
            ckpt.agreed(self._comm, extra.restore)
            ckpt.agreed(self._comm, data.restore)
        except ckpt.CheckpointError as error:  # too late to leave the engine as it was
            raise ckpt.PartialLoadError(str(error)) from error
        extra.tell(report)
        if isinstance(checkpoint, ForeignCheckpoint):
            report.left_out = checkpoint.left_out
        if wanted.counters:
            self._restore_counters(saved.engine, saved.run_id)
        if changes and self._comm.rank == 0:
            warnings.warn(f"{checkpoint.url}: {'; '.join(changes)}", stacklevel=4)
        return report

    def _load_model(self, checkpoint: ckpt.Checkpoint, load: CustomLoad) -> None:
        """Run the script's loader on the whole module; each rank keeps its part of the parameters."""
        with whole_module(self._state.model.module) as module:
            vars(module).pop("__deepcopy__", None)  # the live module's refusal; the script may copy this one
            src = StoredWeights(checkpoint)
            ckpt.agreed(self._comm, lambda: load(src=src, dst=module))  # type: ignore[call-arg]

    def _restore_rest(
        self, saved: RunManifest, optimizer: Optimizer | None, scheduler: LRScheduler | None
    ) -> None:
        """Restore the optimizer's hyperparameters and scalars, and the scheduler."""
        if optimizer is not None and saved.optimizer is not None:
            restore_optimizer(self._state.model, optimizer, saved.optimizer)
        if scheduler is not None and saved.scheduler is not None:
            rates = [float(rate) for rate in getattr(scheduler, "base_lrs", ())]  # a SequentialLR has none
            scheduler.load_state_dict(like_state(decoded(saved.scheduler), scheduler.state_dict()))
            if self._state.schedule is not None and isinstance(scheduler, LambdaLR):
                same = saved.schedule in (None, describe_schedule(self._state.schedule))
                go_on(scheduler, self._state.schedule, None if same else rates)
            if optimizer is None:  # its groups weren't restored, and they hold the next step's rate
                for one in schedulers_by_name(scheduler).values():
                    for group, lr in zip(one.optimizer.param_groups, one.get_last_lr(), strict=True):
                        group["lr"] = lr

    def _restore_counters(self, saved: EngineRecord, run_id: str | None) -> None:
        """Restore the counters, the run's identifier and, if both runs are in fp16, the loss scale."""
        progress, scaler = self._state.progress, self._state.scaler
        assert saved.global_steps is not None, "compared before"
        progress.global_steps = saved.global_steps
        progress.global_samples = saved.samples(progress.train_batch)
        progress.skipped_steps = saved.skipped_steps
        progress.run_id = run_id or progress.run_id
        if scaler is not None and saved.loss_scale is not None:
            scaler.load_state_dict(saved.loss_scale)

    def _check_fits(
        self,
        saved: RunManifest,
        optimizer: Optimizer | None,
        scheduler: LRScheduler | None,
        wanted: Wanted,
    ) -> list[str]:
        """Compare everything but the arrays; return the changes to report.

        Raises:
            ckpt.CheckpointError: the checkpoint can't be loaded; the text lists all reasons.
        """
        model, scaler, progress = self._state.model, self._state.scaler, self._state.progress
        given = Given(
            whose="this run",
            optimizer=None if optimizer is None else given_optimizer(model, optimizer, saved.optimizer),
            scheduler=None if scheduler is None else _given(scheduler, self._state.schedule),
            counters=wanted.counters,
            order={
                "seed": self._state.seed,
                "train_batch_size": progress.train_batch or None,
                "sample_order": None if self._state.seed is None else SAMPLE_ORDER,
            },
            dataset_length=progress.dataset_length,
            epoch_length=progress.epoch_length,
            data=_given_data(self._state),
            accepted=self._state.settings.accept_changes,
            arguments=self._arguments,
            loss_scale=None if scaler is None else scaler.scale,
        )
        refusals, changes = compare(saved, given)
        if wanted.custom is None:
            strict, has_states = wanted.strict, optimizer is not None
            refusals[:0] = tie_refusals(model, saved, self._arguments, strict=strict, optimizer=has_states)
        if refusals:
            raise ckpt.CheckpointError("; ".join(refusals))
        return changes

    def _load_arrays(
        self,
        checkpoint: ckpt.Checkpoint,
        saved: RunManifest,
        optimizer: Optimizer | None,
        wanted: Wanted,
        extra: ExtraLoad,
        data: DataLoad,
    ) -> ckpt.LoadReport:
        def leave(key: ckpt.ArrayKey) -> str | None:
            if is_data(key.atom):
                return data.reason()
            if key.atom == DCP_ATOM:
                return "of the script that saved it by uni3d.dcp, neither the model's nor the optimizer's"
            if is_extra(key.state):
                return extra.reason(key.atom)
            if not _is_moment(key):
                return None if wanted.custom is None else "custom_load_fn loads the model"
            return "optimizer states were not requested" if optimizer is None else None

        model, before, had = self._state.model, None, set[int]()
        stored = {key.atom for key in checkpoint.arrays if _is_moment(key)}  # they have states
        if optimizer is not None and saved.optimizer is not None:
            stored |= saved.optimizer.scalars.keys()
        try:
            if optimizer is not None and stored:  # the same on all ranks, while `lacking` may differ
                lacking = self._lacking(optimizer, stored)
                had = {id(key) for key, states in optimizer.state.items() if states}
                before = ckpt.agreed(
                    self._comm, lambda: _with_states(optimizer, lacking) if lacking else None
                )
            held, targets, flat = ckpt.agreed(
                self._comm, lambda: self._targets(optimizer, stored, None if wanted.custom else saved)
            )
            if isinstance(checkpoint, ForeignCheckpoint):
                checkpoint = ckpt.agreed(
                    self._comm, partial(self._fitted, checkpoint, optimizer, saved, targets)
                )
            report = ckpt.load(
                checkpoint,
                [*targets, *extra.targets(checkpoint), *data.targets(checkpoint)],
                comm=self._comm,
                strict=wanted.strict,
                leave=leave,
                threads=self._threads,
            )
        except ckpt.CheckpointError:
            if optimizer is not None and before is not None:
                for key in [key for key in optimizer.state if id(key) not in had]:
                    del optimizer.state[key]
                restore_optimizer_extra(optimizer, before)
            raise
        state.finish_load(held, targets)
        finish_flat(model, flat)
        if optimizer is not None:
            state.forget_states(model, optimizer, but=stored)
        return report

    def _fitted(
        self,
        checkpoint: ForeignCheckpoint,
        optimizer: Optimizer | None,
        saved: RunManifest,
        targets: list[Target],
    ) -> ForeignCheckpoint:
        """Return the checkpoint in the types of the targets, as far as these are the source's own."""
        if optimizer is not None and saved.optimizer is not None and saved.optimizer.type == UNKNOWN:
            check_states(self._state.model, optimizer, saved.optimizer, checkpoint)
        return checkpoint.in_types({target.spec.key: target.spec.dtype for target in targets})

    def _lacking(self, optimizer: Optimizer, stored: set[str]) -> list[Tensor]:
        """Return the optimizer's parameters whose states are stored, but not there: unused or frozen yet."""
        model, mine = self._state.model, {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [
            parameter
            for name, parameter in named_parameters(model.module)
            if id(parameter) in mine
            and model.first_name(name) in stored
            and not optimizer.state.get(parameter)
        ]

    def _targets(
        self, optimizer: Optimizer | None, stored: set[str], saved: RunManifest | None
    ) -> tuple[list[state.Held], list[Target], list[FlatTarget]]:
        """Return what this rank reads; without `saved`, the script loads the model itself."""
        flat = flat_targets(self._state.model, optimizer, stored)
        held = self._inventory.arrays(optimizer, with_states=stored, flat=state.FlatView({}, {}))
        held += [target.held for target in flat]
        if saved is None:
            held = [array for array in held if _is_moment(array.spec.key)]
        else:
            held = as_stored(held, untied(self._state.model, saved))
        return held, targets_of(held, self._state.model.device), flat


def _with_states(optimizer: Optimizer, lacking: list[Tensor]) -> Mapping[str, Any]:
    """Create the states of parameters; return the extra state from before, to which it is set back."""
    before = copy.deepcopy(current_extra(optimizer))
    wanted = {id(parameter) for parameter in lacking}
    for member in optimizers_by_name(optimizer).values():
        mine = [p for group in member.param_groups for p in group["params"] if id(p) in wanted]
        if mine:
            state.create_states(member, mine)
    restore_optimizer_extra(optimizer, copy.deepcopy(before))
    return before


def _is_moment(key: ckpt.ArrayKey) -> bool:
    return key.state not in WEIGHT_STATES and not is_extra(key.state)


def _given_data(state: RunState) -> tuple[str, int, bool] | None:
    data = state.data
    return None if data is None else (data.kind, state.model.data_part[1], data.resumes)


def _given(scheduler: LRScheduler, schedule: SchedulerConfig | None) -> GivenScheduler:
    """Return the scheduler's description, to compare with the saved one."""
    state = encoded(scheduler.state_dict(), "the scheduler's state")
    several = isinstance(scheduler, SchedulerSet)
    return GivenScheduler(
        type=type_of(scheduler),
        keys={(name, key) for name in state for key in state[name]} if several else {*state},
        state=without_progress(state),
        every=known_state(scheduler, state),
        several=several,
        schedule=describe_schedule(schedule),
    )
