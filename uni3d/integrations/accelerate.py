"""Checkpoints of all that an Accelerator of Hugging Face's accelerate has prepared, for any number of ranks.

    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    keeper = AcceleratorCheckpointer(accelerator, "runs/mine")
    restored = keeper.restore()
    keeper.save(step, client_state={"epoch": 3, "batches": 250})

Such a checkpoint is one of `uni3d.Checkpointer`, and holds what `accelerator.save_state` would write, without
pickles.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler

from uni3d.checkpoint.checkpointer import Checkpointer, Restored, SaveHandle
from uni3d.checkpoint.functions import stored_client_state
from uni3d.checkpoint.random_states import RandomStates

_OWN = "accelerate"
"""Key of the client_state that isn't the script's."""


class AcceleratorCheckpointer:
    """Saves and restores what an Accelerator has prepared and registered. Calls are collective.

    That is one model, its optimizers and their schedulers, fp16's loss scale, the order and the epoch of each
    loader, the random generators, and all objects of `register_for_checkpointing`.
    """

    def __init__(
        self, accelerator: Accelerator, run: str | Path, *, dataloader: Any = None, **settings: Any
    ) -> None:
        """Collective. Make it once, after `prepare` and `register_for_checkpointing`.

        Args:
            accelerator: has prepared the model and all else.
            run: the run's folder, seen by all ranks, or a URL that fsspec knows.
            dataloader: a loader that was prepared with `use_stateful_dataloader`, whose state of each rank is
                then kept.
            settings: those of `uni3d.Checkpointer`: `async_save`, `durable`, `keep_last`, `keep_every`, ...

        Raises:
            ValueError: the accelerator has no model, or several, or its objects can't be saved.
        """
        self._accelerator = accelerator
        self._made_of = _ids(accelerator)
        self._random = RandomStates()
        objects: dict[str, Any] = {"random": self._random, "loaders": _Orders(accelerator)}
        scaler = getattr(accelerator, "scaler", None)
        if scaler is not None:
            objects["loss_scale"] = scaler
        objects |= {f"registered_{i}": item for i, item in enumerate(accelerator._custom_objects)}
        optimizers, schedulers = _different(accelerator._optimizers), _different(accelerator._schedulers)
        self._schedule = {"scheduler_steps": _scheduler_steps(accelerator, schedulers)}
        self._keeper = Checkpointer(
            run,
            model=_only_model(accelerator),
            optimizer=[getattr(item, "optimizer", item) for item in optimizers] or None,
            lr_scheduler=[getattr(item, "scheduler", item) for item in schedulers] or None,
            dataloader=dataloader,
            objects=objects,
            **settings,
        )

    @property
    def step(self) -> int:
        """Step of the last save or load; 0 before."""
        return self._keeper.step

    def save(
        self,
        step: int,
        *,
        tag: str | int | None = None,
        client_state: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> SaveHandle:
        """Write a checkpoint in the background; see `Checkpointer.save`.

        Raises:
            RuntimeError: gradients are being accumulated, or the accelerator has got further objects.
            ValueError: client_state has the key `accelerate`.
            ckpt.CheckpointError: it failed, or the save before did; the same on all ranks.
        """
        if not self._accelerator.sync_gradients:
            raise RuntimeError(
                "gradients are being accumulated, and a checkpoint doesn't keep them: save after a step, "
                "`if accelerator.sync_gradients:`"
            )
        if _ids(self._accelerator) != self._made_of:
            raise RuntimeError(
                "the Accelerator has prepared or registered more since: make the AcceleratorCheckpointer "
                "after all calls of prepare and register_for_checkpointing"
            )
        if _OWN in (client_state or {}):
            raise ValueError(f"client_state has the key {_OWN!r}, which is this class's own; rename it")
        self._random.take()
        state = {**(client_state or {}), _OWN: self._schedule}
        return self._keeper.save(step, tag=tag, client_state=state, **options)

    def restore(self, tag: str | int | None = None, *, strict: bool = True) -> Restored | None:
        """Load a checkpoint, by default the newest; None if the run has none. See `Checkpointer.load`.

        A loader begins with the epoch at which it stood, in its order: leave out the batches that have been
        trained on by `accelerator.skip_first_batches`.

        Raises:
            ValueError: the scheduler counts otherwise than in the checkpoint; nothing has changed.
            ckpt.CheckpointError: something doesn't fit; nothing has changed.
        """
        self._keeper.wait()
        found = stored_client_state(self._keeper.run, tag)
        if found is None:
            return None
        name, state = found
        _check_schedule(state.get(_OWN, self._schedule), self._schedule)
        restored = self._keeper.load(name, strict=strict)
        self._random.apply()
        self._accelerator.step = 0  # no gradients are accumulated
        own = {key: value for key, value in restored.client_state.items() if key != _OWN}
        return restored._replace(client_state=own)

    def wait(self) -> None:
        """Wait until the last save is committed; raises CheckpointError, on all ranks, if it failed."""
        self._keeper.wait()


class _Orders:
    """Epochs of an Accelerator's loaders, and the seeds of those with `use_seedable_sampler`."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._loaders = list(accelerator._dataloaders)

    def state_dict(self) -> dict[str, Any]:
        return {"loaders": [{"epoch": n.iteration, "seed": _seed(n)} for n in self._loaders]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for loader, saved in zip(self._loaders, state["loaders"], strict=False):
            loader.iteration = saved["epoch"]  # which the next pass through it tells the sampler
            sampler = _sampler(loader)
            if saved["seed"] is not None and sampler is not None:
                sampler.initial_seed = saved["seed"]


def _seed(loader: Any) -> int | None:
    sampler = _sampler(loader)
    return None if sampler is None else int(sampler.initial_seed)


def _sampler(loader: Any) -> Any:
    """Return a loader's sampler if a seed and the epoch decide its order, else None."""
    batches = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):  # one rank's part of another
        batches = batches.batch_sampler
    sampler = getattr(batches, "sampler", None)
    return sampler if isinstance(sampler, SeedableRandomSampler) else None


def _scheduler_steps(accelerator: Accelerator, schedulers: list[Any]) -> int | None:
    """Return the steps that accelerate takes of each scheduler for each of the optimizer's."""
    if not schedulers:
        return None
    often = schedulers[0].step_with_optimizer and not schedulers[0].split_batches
    return int(accelerator.num_processes) if often else 1


def _check_schedule(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    there, here = saved["scheduler_steps"], now["scheduler_steps"]
    if None not in (there, here) and there != here:
        raise ValueError(
            f"accelerate takes {here} steps of the scheduler for each of the optimizer's here, {there} in "
            "the checkpoint, so the schedule would be elsewhere: let it count the optimizer's steps on any "
            "number of ranks, by Accelerator(step_scheduler_with_optimizer=False)"
        )


def _different(found: Iterable[Any]) -> list[Any]:
    """Return prepared objects, each once."""
    return list({id(item): item for item in found}.values())


def _only_model(accelerator: Any) -> Any:
    models = _different(accelerator._models)
    if len(models) != 1:
        raise ValueError(
            f"the Accelerator has prepared {len(models)} models; expected one. A run has one: save others by "
            "a uni3d.Checkpointer each, in a folder of its own"
        )
    return models[0]


def _ids(accelerator: Any) -> list[list[int]]:
    parts = ("_models", "_optimizers", "_schedulers", "_dataloaders", "_custom_objects")
    return [[id(item) for item in getattr(accelerator, part)] for part in parts]
