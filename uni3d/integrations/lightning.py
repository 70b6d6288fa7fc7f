"""Universal checkpoints for PyTorch Lightning: a callback that saves a run, and resumes it on other ranks.

Lightning restores its loops from the counters that they have in `on_train_batch_end`, so these are what a
checkpoint holds. All else is taken when nothing of that batch is left to do: after its validation, after the
schedulers have stepped, right before the next batch or epoch begins, or at the end of training.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import Callback, LightningModule, Trainer, __version__
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher, _PrefetchDataFetcher
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import RandomSampler

import ckpt
from uni3d.checkpoint.checkpointer import Checkpointer, Restored
from uni3d.checkpoint.json_state import decoded, encoded

STRATEGIES = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)
"""Strategies whose model keeps parameters that say which part of a whole they are."""

_KEY = "lightning"
_OWN = ("epoch", "global_step", "pytorch-lightning_version", "callbacks")
"""Keys of the dict that `on_save_checkpoint` is given."""


class UniversalCheckpoint(Callback):  # type: ignore[misc]
    """Saves a run of `Trainer.fit` into a folder, and resumes the newest checkpoint there when it starts.

    Any number of ranks and any of `STRATEGIES` can resume what any other has saved. Put it first in the
    Trainer's `callbacks`, and pass `enable_checkpointing=False` unless you want Lightning's own files too.

    Attributes:
        checkpointer: the `uni3d.Checkpointer` of the fit that runs or ran last; None before the first.
        restored: what this fit began with; None if it began anew.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        resume: bool = True,
        **settings: Any,
    ) -> None:
        """Without `every_n_steps` and `every_n_epochs`, it saves at the end of each epoch.

        A checkpoint of the last step is saved in any case, where `max_steps` or `max_epochs` name it.

        Args:
            run: the run's folder, seen by all ranks, or a URL that fsspec knows.
            every_n_steps: save after each n-th step of the optimizer.
            every_n_epochs: save at the end of each n-th epoch.
            resume: go on from the newest checkpoint of `run`, if there is one.
            settings: as `uni3d.Checkpointer` takes them: `async_save`, `keep_last`, `keep_every` and so on.

        Raises:
            ValueError: a number isn't positive.
        """
        for name, number in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs)):
            if number is not None and (type(number) is not int or number < 1):
                raise ValueError(f"{name} must be a positive int or None; got {number!r}")
        self.run, self.resume, self.settings = run, resume, settings
        self.every_n_steps = every_n_steps
        self.every_n_epochs = 1 if every_n_steps is None and every_n_epochs is None else every_n_epochs
        self.checkpointer: Checkpointer | None = None
        self.restored: Restored | None = None
        self._data = TrainingLoaders([])
        self._step = 0
        self._due: dict[str, Any] | None = None
        self._begun: dict[str, Any] | None = None

    # --- the start -------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Connect, and resume unless this Trainer has trained before. Collective.

        With `fast_dev_run`, nothing is resumed nor saved, as with Lightning's own checkpoints.
        """
        if self.checkpointer is not None:
            self.checkpointer.wait()
        self.checkpointer = self._due = self._begun = self.restored = None
        if trainer.fast_dev_run:
            return
        _check(trainer)
        trainer.fit_loop.setup_data()  # Lightning does the same for Trainer.estimated_stepping_batches
        self._data = TrainingLoaders(_stateful(trainer))
        schedules = trainer.lr_scheduler_configs
        self.checkpointer = Checkpointer(
            self.run,
            model=trainer.strategy.model,
            optimizer=list(trainer.optimizers) or None,
            lr_scheduler=[config.scheduler for config in schedules] or None,
            dataloader=self._data if self._data.loaders else None,
            **self.settings,
        )
        if self.resume and trainer.global_step == 0:
            self.restored = self.checkpointer.restore()
        if self.restored is not None:
            self._begun = self._take_up(trainer, self.restored.client_state)
        self._step = trainer.global_step

    def _take_up(self, trainer: Trainer, client_state: dict[str, Any]) -> dict[str, Any]:
        """Give Lightning's objects their states; return the record. Local."""
        if _KEY not in client_state:
            raise ckpt.CheckpointError(
                f"{self.run} wasn't saved by UniversalCheckpoint, so it lacks the state of the loops; "
                "to begin with its weights, pass resume=False and another run, and call uni3d.load in the "
                "module's on_fit_start"
            )
        record: dict[str, Any] = decoded(client_state[_KEY])
        checkpoint = _Hooked(record["hooks"])
        call._call_lightning_module_hook(trainer, "on_load_checkpoint", checkpoint)
        if (states := record["datamodule"]) is not None and trainer.datamodule is not None:
            call._call_lightning_datamodule_hook(trainer, "load_state_dict", states)
        call._call_callbacks_on_load_checkpoint(trainer, checkpoint)
        call._call_callbacks_load_state_dict(trainer, checkpoint)
        precision = trainer.precision_plugin
        if record["precision"] is not None and record["precision"][0] == type(precision).__qualname__:
            precision.load_state_dict(record["precision"][1])
        loop = trainer.fit_loop
        loop.load_state_dict(record["loops"])
        if record["epoch_ended"]:  # the loops would take it for an epoch that goes on
            loop._restarting = loop.epoch_loop.restarting = False
        return record

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the loaders go on where they were. Local."""
        if self.restored is not None and trainer.ckpt_path is not None:
            raise ValueError(
                f"fit was given ckpt_path={str(trainer.ckpt_path)!r}, and {self.run} has a checkpoint too: "
                "leave ckpt_path out to resume the run, or pass resume=False and another run"
            )
        if self._begun is not None:
            record, self._begun = self._begun, None
            self._go_on(trainer, record)

    def _go_on(self, trainer: Trainer, record: dict[str, Any]) -> None:
        loop = trainer.fit_loop
        done = 0 if record["epoch_ended"] else loop.epoch_loop.batch_progress.current.ready
        now = _batches(trainer)
        if done and record["batches"] != now:
            raise ckpt.CheckpointError(
                f"the checkpoint is of batch {done} of an epoch of {record['batches']} batches, and an epoch "
                f"now has {now}: keep the number of samples that all ranks together take per batch "
                "(batch_size x data-parallel ranks), or resume from the end of an epoch"
            )
        if done and isinstance(loop._data_fetcher, _DataLoaderIterDataFetcher):
            raise ckpt.CheckpointError(
                f"the checkpoint is of batch {done} of an epoch, and training_step takes dataloader_iter, so "
                "that nobody knows which batches it took: resume from the end of an epoch"
            )
        for loader in loop._combined_loader.flattened:
            _set_sampler_epoch(loader, trainer.current_epoch)
        self._data.loaders = _stateful(trainer)
        self._data.go_on()
        iter(loop._data_fetcher)  # anew: workers fetch at once, in the order of the epoch
        plain = [x for x in loop._combined_loader.flattened if not _has_state(x)]
        if not done or not plain:
            return
        if self._data.loaders:
            raise ValueError(
                "some of the training loaders have a state_dict and some haven't, so they can't go on within "
                "an epoch together: give all of them a state, or resume from the end of an epoch"
            )
        if any(isinstance(getattr(loader, "sampler", None), RandomSampler) for loader in plain):
            rank_zero_warn(
                f"the run goes on at batch {done} of an epoch whose order was drawn from torch's global "
                "generator: samples may come twice or not at all in this epoch. A DistributedSampler, or a "
                "loader with a state_dict, repeats its order"
            )
        for _ in range(done):
            next(loop._data_fetcher)
        loop._data_fetcher.fetched -= done  # the loop adds them again

    # --- saves -----------------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Note the counters, if a checkpoint is due."""
        if self.checkpointer is None:
            return
        before, self._step = self._step, trainer.global_step
        ended = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        if self._is_due(trainer, before, ended=ended):
            self._due = {
                "loops": _counters(trainer, ended=ended),
                "epoch_ended": ended,
                "batches": _batches(trainer),
            }
            self._data.note()

    def _is_due(self, trainer: Trainer, before: int, *, ended: bool) -> bool:
        step, epoch, most = trainer.global_step, trainer.current_epoch + 1, trainer.max_steps
        # A batch takes several steps if there are several optimizers.
        by_step = self.every_n_steps is not None and step // self.every_n_steps > before // self.every_n_steps
        by_epoch = ended and self.every_n_epochs is not None and epoch % self.every_n_epochs == 0
        last = before < most <= step or (ended and epoch == trainer.max_epochs)
        return by_step or by_epoch or last

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Save if it is due. Collective."""
        self._save(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if it is due. Collective."""
        self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if it is due, and wait until all is committed. Collective."""
        self._save(trainer)
        if self.checkpointer is not None:
            self.checkpointer.wait()

    def _save(self, trainer: Trainer) -> None:
        if self._due is None:
            return
        assert self.checkpointer is not None, "on_fit_start has run"
        record, self._due = self._due, None
        precision = trainer.precision_plugin
        scaling = precision.state_dict()
        record |= {
            "hooks": _hooks(trainer),
            "datamodule": None
            if trainer.datamodule is None
            else call._call_lightning_datamodule_hook(trainer, "state_dict"),
            "precision": [type(precision).__qualname__, scaling] if scaling else None,
        }
        self.checkpointer.save(self._step, client_state={_KEY: encoded(record, "the Trainer's state")})


def _check(trainer: Trainer) -> None:
    """Check that a Checkpointer can keep all that this Trainer trains.

    Raises:
        ValueError: it can't; the same on all ranks.
    """
    if not isinstance(trainer.strategy, STRATEGIES):
        known = ", ".join(strategy.__name__ for strategy in STRATEGIES)
        raise ValueError(
            f"the strategy is {type(trainer.strategy).__name__}; UniversalCheckpoint takes {known}; "
            "to shard parameters, use the last with fully_shard in configure_model"
        )
    others = [c for c in trainer.callbacks if isinstance(c, UniversalCheckpoint)]
    if len(others) > 1:
        raise ValueError(f"the Trainer has {len(others)} callbacks UniversalCheckpoint; give it one")


# --- Lightning's loops and loaders ------------------------------------------------------------------------


def _counters(trainer: Trainer, *, ended: bool) -> dict[str, Any]:
    """Return the fit loop's state: that of `on_train_batch_end`, or of the end of an epoch."""
    state: dict[str, Any] = copy.deepcopy(_without_loaders(trainer.fit_loop))
    if ended:
        state["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
        for scope in ("total", "current"):
            epoch, batch = state["epoch_progress"][scope], state["epoch_loop.batch_progress"][scope]
            epoch["processed"] = epoch["completed"] = epoch["ready"]
            batch["completed"] = batch["ready"]
    return state


def _without_loaders(loop: Any) -> dict[str, Any]:
    """Return a fit loop's state without that of its loaders, which are this rank's own."""
    loader, loop._combined_loader = loop._combined_loader, None
    try:
        state: dict[str, Any] = loop.state_dict()
    finally:
        loop._combined_loader = loader
    return state


def _batches(trainer: Trainer) -> int | None:
    """Return the number of batches of an epoch; None if nobody knows."""
    number = trainer.num_training_batches
    return None if math.isinf(number) else int(number)


def _has_state(loader: Any) -> bool:
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))


def _stateful(trainer: Trainer) -> list[Any]:
    """Return the training loaders that have a state."""
    combined = trainer.fit_loop._combined_loader
    found = [] if combined is None else [x for x in combined.flattened if _has_state(x)]
    fetcher = trainer.fit_loop._data_fetcher
    if found and isinstance(fetcher, _PrefetchDataFetcher) and fetcher.length is None:
        raise ValueError(
            f"{type(found[0]).__name__} has a state but no length, so Lightning fetches a batch in advance, "
            "and the state is that of the next batch: give it a __len__"
        )
    return found


class TrainingLoaders:
    """Training loaders with a state, as a Checkpointer takes one."""

    def __init__(self, loaders: list[Any]) -> None:
        self.loaders = loaders
        self._noted: list[Any] = []
        self._given: list[Any] | None = None

    def note(self) -> None:
        """Keep the states for the next save."""
        self._noted = [copy.deepcopy(loader.state_dict()) for loader in self.loaders]

    def state_dict(self) -> dict[str, Any]:
        return {"loaders": self._noted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._given = state["loaders"]

    def go_on(self) -> None:
        """Give the loaders the states that were loaded, if any were."""
        if self._given is None:
            return
        if len(self._given) != len(self.loaders):
            raise ckpt.CheckpointError(
                f"the checkpoint has states of {len(self._given)} training loaders, and {len(self.loaders)} "
                "have one now: make the same loaders"
            )
        for loader, state in zip(self.loaders, self._given, strict=True):
            loader.load_state_dict(state)
        self._given = None


# --- states of hooks ----------------------------------------------------------------------------------------


class _Hooked(dict[str, Any]):
    """Dict that the hooks `on_save_checkpoint` fill and `on_load_checkpoint` read."""

    def __missing__(self, key: str) -> Any:
        raise KeyError(f"{key}: UniversalCheckpoint's hooks see {', '.join(_OWN)} and what they put in")


def _hooks(trainer: Trainer) -> dict[str, Any]:
    """Return what callbacks and the module want kept, by Lightning's hooks."""
    checkpoint = _Hooked(
        {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "pytorch-lightning_version": __version__,
            "callbacks": call._call_callbacks_state_dict(trainer),
        }
    )
    call._call_callbacks_on_save_checkpoint(trainer, checkpoint)
    call._call_lightning_module_hook(trainer, "on_save_checkpoint", checkpoint)
    return checkpoint
