"""The engine's checkpoints: what a script calls. How they are made is in `uni3d.checkpoint.save`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import Tensor

import ckpt
from parallel import ParallelModel
from uni3d.checkpoint import live_weights as weights_out
from uni3d.checkpoint.restore import CustomLoad, Wanted
from uni3d.checkpoint.save import Checkpointer
from uni3d.engine.data import TrainingLoader
from uni3d.engine.step import Stepper


class Saving:
    """Base of `Engine`: saves and loads it. Every method is collective.

    Attributes:
        last_load: what the last load restored, defaulted and dropped.
        last_save: what the last save that has ended wrote.
    """

    model: ParallelModel
    global_steps: int
    training_dataloader: TrainingLoader | None
    checkpointer: Checkpointer
    last_load: ckpt.LoadReport | None = None
    last_save: ckpt.SaveReport | None = None
    _stepper: Stepper
    _unusable: str | None = None

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write a checkpoint that any topology can load.

        Returns when everything has been copied, and training can go on; it is written, made durable and
        committed in the background. The next save or load, `wait_for_checkpoint` and the end of the process
        wait for it. If it fails, the next call of the engine raises the error. With `"async_save": false`
        in the config's section `checkpoint`, it is committed on return.

        Args:
            save_dir: the run's folder, on a file system that all ranks see, or a URL that fsspec knows.
            tag: its name; `global_step<N>` by default.
            client_state: what the script wants to keep: dicts, lists, strings, numbers, booleans, None.
            save_latest: whether `latest` shall name it.
            exclude_frozen_parameters: leave out parameters that don't require a gradient. Such a checkpoint
                loads with `load_module_strict=False`, which leaves the engine's own as they are.

        Raises:
            ckpt.CheckpointError: the same on all ranks; there is no such checkpoint then, an older one of
                this tag is as it was, and training may go on. It may be the save before that failed.
        """
        self._check_ready("save_checkpoint")
        name = f"global_step{self.global_steps}" if tag is None else str(tag)
        self.checkpointer.save(
            save_dir,
            name,
            client_state or {},
            update_latest=save_latest,
            frozen=not exclude_frozen_parameters,
        )
        return True

    def wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is committed, if it is still being written.

        Raises:
            ckpt.CheckpointError: it failed; the same on all ranks.
        """
        self.checkpointer.wait()

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: CustomLoad | None = None,
    ) -> tuple[str, dict[str, Any]]:
        """Take up a checkpoint, whatever topology wrote it. Returns its folder and its client_state.

        `tag` None is the one that `latest` names. With `load_module_strict`, everything that the model and
        the optimizer have must be there, and nothing else; without, the report in `last_load` says what
        was defaulted and dropped. With `load_module_only`, weights and buffers are loaded and nothing
        else. One line of what was done is printed on rank 0.

        `custom_load_fn(src=state_dict, dst=module)` loads parameters in the engine's stead: `src` reads each
        tensor of the checkpoint, whole and in fp32, when it is asked for; `dst` is this rank's part of the
        model, whose parameters are whole plain tensors meanwhile (in each rank's host memory). All ranks must
        write the same into it.

        Raises:
            ckpt.CheckpointError: nothing is there, or something doesn't fit; the same on all ranks, and the
                engine is as it was.
            ckpt.PartialLoadError: data is damaged; the same on all ranks, which refuse to go on from there.
        """
        self._check_ready("load_checkpoint")
        try:
            report, checkpoint = self.checkpointer.load(
                load_dir,
                tag,
                Wanted(
                    strict=load_module_strict,
                    optimizer=load_optimizer_states and not load_module_only,
                    scheduler=load_lr_scheduler_states and not load_module_only,
                    counters=not load_module_only,
                    custom=custom_load_fn,
                ),
            )
        except ckpt.PartialLoadError as error:
            self._unusable = f"a load failed half-way ({error})"
            raise
        self._data_moved()
        self.last_load = report
        if self.model.topology.rank == 0:
            print(f"uni3d: loaded {checkpoint.url}: {report}", file=sys.stderr, flush=True)
        return checkpoint.url, checkpoint.manifest["client_state"]

    def resume(self, run: str | Path) -> dict[str, Any] | None:
        """Load the newest checkpoint of the folder `run`: its client_state, or None if there is none."""
        if self.checkpointer.latest(run) is None:
            return None
        return self.load_checkpoint(run)[1]

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor]:
        """This stage's part of the whole model's `state_dict`: fp32 tensors in the host's memory.

        Collective over the ranks of a stage, each of which gets whole tensors. Without pipeline stages that
        is the `state_dict` of the model that was given to `initialize`.
        """
        self._check_ready("module_state_dict")
        return weights_out.state_dict_of(self.model, frozen=not exclude_frozen_parameters)

    def save_16bit_model(
        self,
        save_dir: str | Path,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the whole model's `state_dict` as one file of `torch.save`, at every topology and ZeRO stage.

        Parameters are of the type that training computes in: bf16 or fp16 (fp32 where neither is enabled),
        buffers as they are. A file of that name is replaced when the new one is whole. Rank 0 holds the model
        in that type in its host's memory; for larger ones there is `uni3d export`.

        Raises:
            ckpt.CheckpointError: it can't be written; the same on all ranks.
        """
        self._check_ready("save_16bit_model")
        if "://" in str(save_dir):
            raise ckpt.CheckpointError(f"save_16bit_model writes into folders, not to {save_dir}")
        dtype = self.model.zero.compute_dtype
        comm, path = self.checkpointer.comm, Path(save_dir) / save_filename
        weights = weights_out.whole_on_first_rank(
            self.model, comm, dtype, frozen=not exclude_frozen_parameters
        )
        ckpt.together(comm, lambda: weights_out.write(path, weights) if comm.rank == 0 else None)
        return True

    def _check_ready(self, call: str) -> None:
        """That the engine is usable, and between two steps."""
        raise NotImplementedError

    def _data_moved(self) -> None:
        """The position in the training data has jumped."""
        raise NotImplementedError
