"""Checkpoints for the Trainer of Hugging Face's transformers, which resume on any number of ranks.

    keeper = CheckpointCallback("runs/mine")
    trainer = Trainer(model, args, train_dataset=data, callbacks=[keeper])
    trainer.train(resume_from_checkpoint=keeper.resume(trainer))

The Trainer says when to save (`save_strategy`, `save_steps`), and does all else as before. Its checkpoints
are those of a `uni3d.Checkpointer`, with the Trainer's state in `client_state`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from uni3d.checkpoint.checkpointer import Checkpointer
from uni3d.checkpoint.functions import stored_client_state
from uni3d.checkpoint.random_states import RandomStates

_STATE_FILE = "trainer_state.json"
_CALL = "trainer.train(resume_from_checkpoint=callback.resume(trainer))"
_REPLACED = ("_save_checkpoint", "_load_from_checkpoint")
"""The Trainer's methods that save, and that load weights before `on_train_begin`."""


class CheckpointCallback(TrainerCallback):
    """Saves a Trainer's run in the background whenever the Trainer saves, and resumes it.

    Restored are the model, the optimizer, the scheduler, fp16's loss scale, the Trainer's state with its
    callbacks', the random generators, and the place in the data. `save_total_limit` is `keep_last`.
    """

    def __init__(self, run: str | Path, **settings: Any) -> None:
        """Local.

        Args:
            run: the run's folder, seen by all ranks, or a URL that fsspec knows.
            settings: those of `uni3d.Checkpointer`: `async_save`, `durable`, `keep_last`, `keep_every`, ...
        """
        self.run = run
        self._settings = settings
        self._trainer: Any = None
        self._keeper: Checkpointer | None = None
        self._random: RandomStates | None = None
        self._tag: str | None = None
        self._folder: str | None = None
        self._ready = False
        self._read = False  # whether the Trainer was given the folder
        self._draws_anew = False

    def resume(self, trainer: Trainer, tag: str | int | None = None) -> str | None:
        """Prepare a Trainer for one call of its `train`: it saves through this callback alone. Collective.

        Args:
            trainer: has this callback.
            tag: the checkpoint to go on from, by default the newest one.

        Returns:
            The `resume_from_checkpoint` of `train`: a folder with the Trainer's state, or None if the
            run has no checkpoint. `train` is to be called at once.

        Raises:
            ValueError: the Trainer is set to something that these checkpoints can't do, its data isn't that
                of the checkpoint, or another trainer wrote it.
            ckpt.CheckpointError: the checkpoint can't be read.
        """
        _check(trainer, self)
        self._remove_folder()
        self._trainer, self._ready, self._read = trainer, True, False
        for name, own in zip(_REPLACED, (self._save, self._load_weights), strict=True):
            setattr(trainer, name, own)
        found = stored_client_state(self.run, tag)
        if found is None:
            self._tag = None
            return None
        self._tag, client_state = found
        saved = client_state.get("transformers")
        if saved is None:
            raise ValueError(
                f"{self.run}: {self._tag} has no state of transformers' Trainer: another trainer saved it. "
                "Load its weights with uni3d.load before you make the Trainer, and give an empty folder here"
            )
        _check_data(saved["data"], trainer)
        state = json.loads(saved["state"]) | {"train_batch_size": trainer.args.train_batch_size}
        self._folder = tempfile.mkdtemp(prefix="uni3d-trainer-")
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)  # if train isn't called
        Path(self._folder, _STATE_FILE).write_text(json.dumps(state))
        return self._folder

    # --- the Trainer's events ----------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **has: Any
    ) -> None:
        """Load the checkpoint: model, optimizer and scheduler are as they will be trained. Collective."""
        if not self._ready:
            raise RuntimeError(f"CheckpointCallback must see the Trainer before each train: call {_CALL}")
        self._ready = False
        self._remove_folder()  # the Trainer has read it
        if self._tag is not None and not self._read:
            raise RuntimeError(
                f"{self.run} has {self._tag}, but the Trainer begins anew: call {_CALL}, or give a folder "
                "without checkpoints"
            )
        if self._keeper is not None:
            self._keeper.wait()
        self._random = RandomStates()
        objects: dict[str, Any] = {"random": self._random}
        scaler = getattr(self._trainer.accelerator, "scaler", None)
        if scaler is not None:
            objects["loss_scale"] = scaler
        settings = dict(self._settings)
        if args.save_total_limit is not None:
            settings.setdefault("keep_last", args.save_total_limit)
        optimizer = has["optimizer"]
        self._keeper = Checkpointer(
            self.run,
            model=has["model"],
            optimizer=getattr(optimizer, "optimizer", optimizer),
            lr_scheduler=has["lr_scheduler"],
            objects=objects,
            **settings,
        )
        if self._tag is not None:
            self._keeper.load(self._tag)
            self._draws_anew = True

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **has: Any
    ) -> None:
        """Restore the random generators, as the Trainer does at the start of an epoch."""
        if self._draws_anew:
            assert self._random is not None
            self._random.apply()
            self._draws_anew = not args.ignore_data_skip and not float(state.epoch or 0).is_integer()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **has: Any
    ) -> None:
        """Restore the random generators after the batches that have been trained on were skipped."""
        if self._draws_anew:
            assert self._random is not None
            self._random.apply()
            self._draws_anew = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **has: Any
    ) -> None:
        """Wait until the last checkpoint is committed. Collective."""
        if self._keeper is not None:
            self._keeper.wait()

    # --- in the place of the Trainer's own methods -------------------------------------------------------

    def _save(self, model: Any, trial: Any) -> None:
        """Save in the place of `Trainer._save_checkpoint`. Collective."""
        assert self._keeper is not None
        assert self._random is not None
        trainer = self._trainer
        if trial is not None:
            raise ValueError("CheckpointCallback keeps one run, but this is a search of hyperparameters")
        trainer.store_flos()
        state = trainer.state
        kept: dict[str, Any] = {}
        for callback in (*trainer.callback_handler.callbacks, trainer.control):
            if isinstance(callback, ExportableState):
                kept.setdefault(type(callback).__name__, []).append(callback.state())
        state.stateful_callbacks = {name: of[0] if len(of) == 1 else of for name, of in kept.items()}
        self._random.take()
        # The state is kept as text: a logged norm may be infinite, and the Trainer reads it as JSON anyway.
        saved = {"state": json.dumps(dataclasses.asdict(state)), "data": _data(trainer)}
        self._keeper.save(state.global_step, client_state={"transformers": saved})

    def _load_weights(self, folder: str, model: Any = None) -> None:
        """Stand in the place of `Trainer._load_from_checkpoint`: `on_train_begin` loads all at once."""
        if self._folder is None or os.fspath(folder) != self._folder:
            raise ValueError(
                f"train was given the checkpoint {folder}, but CheckpointCallback resumes {self.run}: "
                f"call {_CALL}"
            )
        self._read = True

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _check(trainer: Any, callback: CheckpointCallback) -> None:
    """Check that all that the Trainer is set to can be done; raises ValueError."""
    args = trainer.args
    missing = [name for name in _REPLACED if not callable(getattr(trainer, name, None))]
    if missing:
        raise ValueError(
            f"{type(trainer).__name__} has no {' and no '.join(missing)}: CheckpointCallback is for "
            "transformers' Trainer, release 5.24 and the like"
        )
    if callback not in trainer.callback_handler.callbacks:
        raise ValueError(f"the Trainer doesn't have this callback: pass callbacks=[callback], then {_CALL}")
    refused = {
        "deepspeed": trainer.is_deepspeed_enabled and "the engine saves then: use its own checkpoints",
        "fsdp": trainer.is_fsdp_enabled
        and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 2) == 1
        and 'its version 1 is untested in the Trainer: set fsdp_config={"fsdp_version": 2}',
        "load_best_model_at_end": args.load_best_model_at_end
        and "keep enough checkpoints, and load the one of state.best_global_step with uni3d.load",
        "save_only_model": args.save_only_model and "`uni3d export` writes a checkpoint's weights alone",
        "auto_find_batch_size": args.auto_find_batch_size and "the data of a resume must be that of the run",
        "push_to_hub": args.push_to_hub
        and args.hub_strategy != "end"
        and "only hub_strategy='end' pushes without the Trainer's own checkpoints",
    }
    for name, reason in refused.items():
        if reason:
            raise ValueError(f"{name} is set, which CheckpointCallback refuses: {reason}")


def _data(trainer: Any) -> dict[str, Any]:
    """Return all on which the place in the data depends, besides the number of steps."""
    args, data = trainer.args, trainer.train_dataset
    return {
        "samples per step": trainer.get_total_train_batch_size(args),
        "samples": len(data) if hasattr(data, "__len__") else None,
        "seed of the order": args.seed if args.data_seed is None else args.data_seed,
    }


def _check_data(saved: dict[str, Any], trainer: Any) -> None:
    """Check that the Trainer's data comes in the order of the checkpoint's run; raises ValueError."""
    if trainer.args.ignore_data_skip:
        return
    for name, now in _data(trainer).items():
        if saved.get(name) != now:
            raise ValueError(
                f"{name}: {saved.get(name)} in the checkpoint, {now} now, so it can't go on at its place "
                "in the data: keep per_device_train_batch_size * gradient_accumulation_steps * ranks, the "
                "dataset and the seed, or set ignore_data_skip=True to begin with an epoch"
            )
