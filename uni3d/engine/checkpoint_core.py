"""The engine's calls that save and load: checkpoints, and weights alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

import ckpt
from uni3d.checkpoint import live_weights
from uni3d.checkpoint.newest_tag import newest
from uni3d.checkpoint.restore import CustomLoad, Restorer, Wanted
from uni3d.engine.training_core import TrainingCore


class CheckpointCore(TrainingCore):
    """Trains one model, and keeps it. See `Engine`."""

    def __init__(self, **given: Any) -> None:
        """Collective. Takes what `TrainingCore` takes."""
        super().__init__(**given)
        self.last_load: ckpt.LoadReport | None = None
        self.client_state: dict[str, Any] | None = None
        self._restorer = Restorer(self._state, comm=self._comm, inventory=self._inventory)

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | int | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write a checkpoint that any topology can load.

        Between the micro batches of a step it is that of the last step's end: a warning says so, and a resume
        computes these micro batches again.

        Returns when everything has been copied; it is written and committed while training goes on. The next
        save or load, `wait_for_checkpoint` and the end of the process wait for it. If it fails, the engine's
        next call raises. With the config's `checkpoint.async_save` false it is committed on return.

        Args:
            save_dir, tag: the run's folder, seen by all ranks, or a URL that fsspec knows; the checkpoint's
                name in it, by default `global_step<N>`.
            client_state: the script's own state: dicts, lists, strings, numbers, booleans, None.
            save_latest: whether `latest` shall name it.
            exclude_frozen_parameters: leave them out; load with `load_module_strict=False` then.

        Raises:
            ckpt.CheckpointError: it failed, or the save before did; the same on all ranks. An older one of
                this tag is as it was, and training may go on.
        """
        if self._micro.losses and self.global_rank == 0:
            warnings.warn(
                f"save_checkpoint() between a step's micro batches saves the end of step "
                f"{self._progress.global_steps}; the gradients accumulated since are not saved",
                stacklevel=2,
            )
        frozen = not exclude_frozen_parameters
        self._settle()
        self._saver.save(save_dir, tag, client_state or {}, update_latest=save_latest, frozen=frozen)
        return True

    def wait_for_checkpoint(self) -> None:
        """Wait until the last save is committed; raises CheckpointError, on all ranks, if it failed."""
        self._saver.wait()

    @property
    def last_save(self) -> ckpt.SaveReport | None:
        """Report of the last save that has ended."""
        return self._saver.report

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | int | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: CustomLoad | None = None,
    ) -> tuple[str, dict[str, Any]]:
        """Take up a checkpoint, whatever topology wrote it. Returns its folder and its client_state.

        Args:
            load_dir, tag: the run's folder or URL, and a checkpoint in it, by default the one `latest` names.
            load_module_strict: require the same arrays in both; else `last_load` lists the differences.
            load_optimizer_states, load_lr_scheduler_states, load_module_only: what else than weights and
                buffers is loaded; by default everything.
            custom_load_fn: called as `custom_load_fn(src=state_dict, dst=module)` to load the parameters.
                `src` reads each tensor when asked for it, whole and in fp32; `dst` has whole plain tensors in
                the host's memory, into which all ranks must write the same.

        Raises:
            ckpt.CheckpointError: nothing is there, or something doesn't fit; the engine is as it was.
            ckpt.PartialLoadError: data is damaged, and the engine of no more use.
            parallel.RankFailedError: all is loaded, but a rank was lost while parameters were gathered.
        """
        self._check_usable()
        self._micro.check_none("load_checkpoint")
        self._micro.drop()
        self._stepper.settle()
        wanted = Wanted(
            strict=load_module_strict,
            optimizer=load_optimizer_states and not load_module_only,
            scheduler=load_lr_scheduler_states and not load_module_only,
            counters=not load_module_only,
            custom=custom_load_fn,
        )
        self._saver.wait()
        try:
            loaded = self._restorer.load(load_dir, tag, wanted)
        except ckpt.PartialLoadError as error:
            self._guard.unusable = f"a load failed half-way ({error})"
            raise  # without a collective, as some rank may be lost
        except ckpt.CheckpointError:  # on all ranks
            self._show_parameters()
            raise
        self._show_parameters()
        self._saver.forget_plan()
        self._source.moved()
        self.last_load, self.client_state = loaded.report, loaded.client_state
        return loaded.url, loaded.client_state

    def _show_parameters(self) -> None:
        """Gather what the script may read, after a load; as in a step, the group's timeout ends the wait."""
        with self._guard.together("load_checkpoint", begun=True):
            self.model.zero.show_parameters()

    def resume(self, run: str | Path) -> dict[str, Any] | None:
        """Load the newest checkpoint of the folder `run`: its client_state, or None if there is none."""
        self._saver.wait()
        return None if newest(self._comm, run) is None else self.load_checkpoint(run)[1]

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any]:
        """Return this stage's part of the whole model's `state_dict`: fp32, in the host's memory."""
        self._settle()
        return live_weights.state_dict_of(self.model, frozen=not exclude_frozen_parameters)

    def save_16bit_model(
        self,
        save_dir: str | Path,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the whole model's `state_dict` as one `torch.save` file, through the memory of rank 0's host.

        Parameters have the type that training computes in; for fp32 there is `uni3d export`. Raises
        CheckpointError, the same on all ranks, if it can't be written; the older file is as it was then.
        """
        frozen = not exclude_frozen_parameters
        self._settle()
        live_weights.save_16bit(self.model, self._comm, save_dir, save_filename, frozen=frozen)
        return True

    def consolidated_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor] | None:
        """Return the whole model's `state_dict` on rank 0, in the type of computation; None elsewhere."""
        frozen, dtype = not exclude_frozen_parameters, self.model.zero.compute_dtype
        self._settle()
        whole = live_weights.whole_on_first_rank(self.model, self._comm, dtype, frozen=frozen)
        return whole if self.global_rank == 0 else None

    def _settle(self) -> None:
        """Make the state that of the last step's end. It may be looked at amid the next one."""
        self._check_usable()
        self._stepper.settle()
