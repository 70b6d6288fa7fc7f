"""Checkpoints for any trainer: the model, optimizer, scheduler and loader as another library made them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import ckpt
from parallel import HostComm
from parallel.found_model import FoundModel, Names, parts_of
from parallel.tensors import WRAPPED
from uni3d.checkpoint.model_spec import declared
from uni3d.checkpoint.restore import Restorer, Wanted, newest
from uni3d.checkpoint.save import Saver
from uni3d.config.sections import CheckpointConfig
from uni3d.config.strict import validate
from uni3d.state import Inventory
from uni3d.train_state import Progress, RunState

T = TypeVar("T")


class Restored(NamedTuple):
    """Result of a load."""

    report: ckpt.LoadReport
    """The arrays that were restored, defaulted and dropped."""
    client_state: dict[str, Any]


class SaveHandle:
    """A save that goes on in the background."""

    def __init__(self, saver: Saver, tag: str) -> None:
        self.tag = tag
        self._saver = saver

    def wait(self) -> ckpt.SaveReport:
        """Wait until the checkpoint is committed. Collective.

        Raises:
            ckpt.CheckpointError: the save failed; an older checkpoint of this tag is as it was.
        """
        self._saver.wait()
        report = self._saver.report
        if report is None or report.tag != self.tag:
            raise ckpt.CheckpointError(f"the save of {self.tag} failed, and its error was raised before")
        return report


class Checkpointer:
    """Saves and restores what another trainer trains, in one run's folder. Calls are collective.

    The model is plain, or wrapped and sharded by any of DistributedDataParallel, `fully_shard`,
    `parallelize_module`, `torch.compile`, activation checkpointing: which part of a tensor a rank has is read
    off the tensors. Make it once, when all that is done; buffers and plans are kept from save to save.

    Attributes:
        last_load: report of the last load.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Optimizer | None = None,
        lr_scheduler: LRScheduler | None = None,
        dataloader: Any = None,
        objects: Mapping[str, Any] | None = None,
        names: Names | None = None,
        **settings: Any,
    ) -> None:
        """Collective over all ranks of the default process group; a process without one is alone.

        Args:
            run: the run's folder, seen by all ranks, or a URL that fsspec knows.
            model, optimizer: this rank's; a list of modules if it has several pipeline stages.
            lr_scheduler: a scheduler of torch, or any object with its `state_dict` and `load_state_dict`.
            dataloader: an object with `state_dict` and `load_state_dict`, as torchdata's StatefulDataLoader.
            objects: by name, further objects with `state_dict` and `load_state_dict` whose state is the same
                on all ranks: values of JSON and plain tensors. No pickle is written.
            names: from the names in this rank's model to those in the whole one, where they differ: a
                function, or a mapping. For pipeline stages that number their layers from 0.
            settings: options of the config's section `checkpoint`: `async_save`, `durable`, `files`,
                `keep_last`, `keep_every`, `accept_changes`.

        Raises:
            ValueError: a tensor doesn't say which part of a whole it is, two stages have the same name, or a
                state can't be saved; the same on all ranks.
            TypeError: an argument is of another type.
        """
        self._comm = comm = connect()
        options = _together(comm, lambda: _checked(model, optimizer, dataloader, objects, settings))
        self.run, self._settings = run, settings
        given: dict[str, Any] = {"model": model, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
        given |= {"dataloader": dataloader, "objects": objects, "names": names}
        # A script may make the same list or dict anew for each call.
        self._given = {key: _members(value) for key, value in given.items()}
        self._model = FoundModel(model, comm, names)
        self._state = RunState(
            model=self._model,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            progress=Progress(train_batch=0),
            data=None if dataloader is None else _Loader(dataloader),
            objects=dict(objects or {}),
            settings=options,
        )
        self._state.progress.run_id = comm.broadcast(self._state.progress.run_id)
        inventory = Inventory(self._model)
        self._saver = Saver(
            self._state,
            comm=comm,
            writing=connect(),
            inventory=inventory,
            model_spec=_described(self._model.module),
            compare_copies=True,
        )
        self._restorer = Restorer(self._state, comm=comm, inventory=inventory)
        self.last_load: ckpt.LoadReport | None = None

    def __reduce__(self) -> Any:
        """A copy of a model that has one has None."""
        return type(None), ()

    @property
    def step(self) -> int:
        """Step of the last save or load; 0 before."""
        return self._state.progress.global_steps

    @property
    def last_save(self) -> ckpt.SaveReport | None:
        """Report of the last save that has ended."""
        return self._saver.report

    def save(
        self,
        step: int,
        *,
        tag: str | int | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> SaveHandle:
        """Write a checkpoint that any topology and any trainer can load.

        Returns when everything has been copied; it is written and committed while training goes on. The next
        call and the end of the process wait for it: if it fails, the next call raises, and a process that
        ends without one exits with 1. With `async_save=False` it is committed on return.

        Args:
            step: number of optimizer steps taken.
            tag: the checkpoint's name, by default `global_step<N>`.
            client_state: the script's own state: dicts, lists, strings, numbers, booleans, None.
            save_latest: whether `latest` shall name it.
            exclude_frozen_parameters: leave them out; load with `strict=False` then.

        Raises:
            ckpt.CheckpointError: it failed, or the save before did; the same on all ranks. An older one of
                this tag is as it was.
            TypeError: an argument is of another type on some rank; the same on all.
        """
        kept = _together(self._comm, lambda: _checked_save(step, client_state))
        self._state.progress.global_steps = step
        frozen = not exclude_frozen_parameters
        self._saver.save(self.run, tag, kept, update_latest=save_latest, frozen=frozen)
        return SaveHandle(self._saver, f"global_step{step}" if tag is None else str(tag))

    def restore(self, tag: str | int | None = None, *, strict: bool = True) -> Restored | None:
        """Load a checkpoint, by default the newest; None if the run has none. See `load`."""
        self._saver.wait()
        if tag is None and newest(self._comm, self.run) is None:
            return None
        return self.load(tag, strict=strict)

    def load(
        self, tag: str | int | None = None, *, strict: bool = True, optimizer: bool = True, run: Any = None
    ) -> Restored:
        """Load a checkpoint into the model and all else that was given, whatever saved it.

        Args:
            tag: its name, by default the one that `latest` names.
            strict: require the same arrays in both; else the report lists the differences.
            optimizer: whether all but the model is restored too.
            run: the folder to load from, by default the run's own; also another framework's folder or file,
                or what each rank has opened by `uni3d.open`.

        Raises:
            ckpt.CheckpointError: nothing is there, or something doesn't fit; nothing has changed.
            ckpt.PartialLoadError: data is damaged, and the model half loaded.
        """
        self._saver.wait()
        wanted = Wanted(strict=strict, optimizer=optimizer, scheduler=optimizer, counters=optimizer)
        loaded = self._restorer.load(self.run if run is None else run, tag, wanted)
        self._saver.forget_plan()
        self.last_load = loaded.report
        return Restored(loaded.report, loaded.client_state)

    def wait(self) -> None:
        """Wait until the last save is committed; raises CheckpointError, on all ranks, if it failed."""
        self._saver.wait()

    def is_of(self, given: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
        """Return whether it was made of these very objects, and with these settings. Local."""
        same = all(_alike(self._given[key], _members(value)) for key, value in given.items())
        return same and self._settings == settings


class _Loader:
    """A loader with a state, given by the script. Each rank has its own."""

    problem: str | None = None
    resumes = True

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.kind = type(loader).__name__

    def state_dict(self) -> dict[str, Any]:
        return cast("dict[str, Any]", self.loader.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)

    def begin_anew(self) -> None:
        """Leave it as it is: the script has just made it."""


def _members(value: Any) -> dict[Any, Any]:
    """Return the members of a mapping or a sequence; of anything else, itself."""
    if isinstance(value, Mapping):
        return dict(value)
    return dict(enumerate(value)) if isinstance(value, Sequence) else {None: value}


def _alike(mine: dict[Any, Any], given: dict[Any, Any]) -> bool:
    """Return whether the members are the same objects, or the same names."""
    return mine.keys() == given.keys() and all(
        item is given[key] or (isinstance(item, str) and item == given[key]) for key, item in mine.items()
    )


def _together(comm: HostComm, check: Callable[[], T]) -> T:
    """Return this rank's result of `check`; raise the error of the first rank that has one. Collective."""
    found: list[T] = []
    errors: list[Exception] = []
    try:
        found.append(check())
    except (TypeError, ValueError) as error:
        errors.append(error)
    everyone = comm.all_reduce(errors, lambda parts: [error for part in parts for error in part][:1])
    if everyone:
        raise everyone[0]
    return found[0]


def _checked_save(step: Any, client_state: Any) -> dict[str, Any]:
    """Return a copy of the client state."""
    if type(step) is not int or step < 0:
        raise TypeError(f"step must be the number of optimizer steps taken; got {step!r}")
    if client_state is not None and not isinstance(client_state, Mapping):
        raise TypeError(f"client_state must be a dict; got {client_state!r}")
    return dict(client_state or {})


def _checked(
    model: Any, optimizer: Any, dataloader: Any, objects: Any, settings: Mapping[str, Any]
) -> CheckpointConfig:
    """Return the settings, once all arguments are of the right types."""
    parts_of(model)
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be one torch.optim.Optimizer; got {type(optimizer).__name__}")
    for method in ("state_dict", "load_state_dict"):
        if dataloader is not None and not callable(getattr(dataloader, method, None)):
            raise TypeError(
                f"dataloader is a {type(dataloader).__name__}, which has no {method}: give one that has a "
                "state, as torchdata's StatefulDataLoader, or leave it out"
            )
    for name, item in (objects or {}).items():
        if not isinstance(name, str) or not name.isidentifier():
            raise TypeError(f"objects has the name {name!r}; expected letters, digits and _, as in Python")
        if not all(callable(getattr(item, method, None)) for method in ("state_dict", "load_state_dict")):
            raise TypeError(
                f"objects[{name!r}] is a {type(item).__name__}, which has no state_dict and load_state_dict"
            )
    return validate(CheckpointConfig, dict(settings), "checkpoint")


def connect() -> HostComm:
    """Connect all ranks. Collective."""
    if dist.is_initialized():
        return HostComm()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise RuntimeError(
            f"WORLD_SIZE is {ranks}, but there is no process group, so each process would take itself for "
            "the only one: call torch.distributed.init_process_group first"
        )
    return HostComm.of(dist.HashStore(), 0, 1)  # type: ignore[attr-defined]


def _described(module: nn.Module) -> dict[str, Any]:
    """Return the manifest's description of a rank's model."""
    parts = list(module.children())
    plain = _unwrapped(parts[0])
    said = declared(plain) if len(parts) == 1 else {}
    kind = type(plain).__mro__[2] if isinstance(plain, FSDPModule) else type(plain)
    return said | {"class": kind.__name__}


def _unwrapped(module: nn.Module) -> nn.Module:
    while True:
        name = next((name for name in WRAPPED if name in module._modules), None)
        if isinstance(module, DistributedDataParallel):
            name = "module"
        if name is None:
            return module
        module = cast(nn.Module, module._modules[name])
