"""Saving a run: shards through `ckpt`, everything else in the manifest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ckpt
from parallel import HostComm
from uni3d.checkpoint.background import Background, Snapshot, threads_per_rank
from uni3d.checkpoint.optimizer_groups import describe
from uni3d.config import Config
from uni3d.manifest import SCRIPT, EngineRecord, RunManifest, WriterRecord
from uni3d.state import Held, Inventory, on_host, parts_to_save
from uni3d.train_state import TrainState


class Saver:
    """Saves a run. Every call is collective, but for `failed` and `agree`.

    Attributes:
        report: what the last save that has ended wrote, or None.
    """

    def __init__(
        self,
        state: TrainState,
        config: Config,
        *,
        comm: HostComm,
        inventory: Inventory,
        model_spec: dict[str, Any],
    ) -> None:
        """`model_spec` is the model's own description for the manifest.

        Raises:
            ValueError: the schedule's state can't be saved; better now than at the first save.
        """
        if state.lr_scheduler is not None:
            try:
                ckpt.check_json(state.lr_scheduler.state_dict(), "its state")
            except ckpt.CheckpointError as error:
                kind = type(state.lr_scheduler).__name__
                raise ValueError(f"{kind} can't be saved: {error}") from None
        self.report: ckpt.SaveReport | None = None
        self._state = state
        self._config = config
        self._model_spec = model_spec
        self._comm = comm
        self._writing = HostComm()  # a save's own, as it goes on while others use the first
        self._inventory = inventory
        self._held: list[Held] = []
        self._plan: ckpt.Plan | None = None
        self._wanted: dict[ckpt.ArrayKey, ckpt.Box] = {}
        self._snapshot = Snapshot(state.model.topology.device)
        self._background: Background[ckpt.SaveReport] = Background("uni3d's last save_checkpoint")
        self._agreed_failure = False

    def save(
        self,
        run: str | Path,
        tag: str,
        client_state: dict[str, Any],
        *,
        update_latest: bool,
        frozen: bool = True,
    ) -> None:
        """Write checkpoint `tag`, or with `async_save` begin to; see `Engine.save_checkpoint`.

        Without `frozen`, parameters that don't require a gradient are left out.
        """
        self.wait()
        Background.join_all()  # at most one save may be going on in a run's folder
        asynchronous = self._config.checkpoint.async_save
        if "://" not in str(run):
            run = Path(run).absolute()  # the script may change its folder meanwhile
        taken: list[tuple[ckpt.Plan, list[tuple[ckpt.ShardSpec, Tensor]], RunManifest]] = []

        def take() -> str:
            plan, parts = self._parts(frozen)
            if asynchronous:  # the one thing that training waits for
                copies = self._snapshot.take([tensor for _, tensor in parts])
                parts = [(spec, copy) for (spec, _), copy in zip(parts, copies, strict=True)]
            taken.append((plan, parts, self._manifest(client_state, frozen)))
            return tag

        ckpt.check_same_tag(ckpt.agreed_by_all(self._comm, take))
        if asynchronous:
            self._background.start(lambda: self._write(run, tag, *taken[0], update_latest))
        else:
            self.report = self._write(run, tag, *taken[0], update_latest)

    def wait(self) -> None:
        """Wait for the save that goes on in the background, if any; raises what it raised."""
        self._agreed_failure = False
        report = self._background.wait()
        if report is not None:
            self.report = report

    def committed(self) -> str | None:
        """Return the tag of the last save that has ended well, waited for or not. Local."""
        report = self._background.result or self.report
        return None if report is None else report.tag

    @property
    def failed(self) -> bool:
        """Whether the save in the background has failed, as far as this rank knows. Local."""
        return self._background.failed

    def agree(self, failed: bool) -> None:
        """All ranks have learnt that the save failed on some; so the next `check` raises on all."""
        self._agreed_failure |= failed

    def check(self) -> None:
        """Raise what the save in the background raised, if all ranks know that it failed."""
        if self._agreed_failure:
            self.wait()
            raise ckpt.CheckpointError("the save in the background failed on another rank; save again")

    def forget_plan(self) -> None:
        """Let go of the tensors of the last save, which a load may replace. Local."""
        self._held, self._plan = [], None

    def _parts(self, frozen: bool) -> tuple[ckpt.Plan, list[tuple[ckpt.ShardSpec, Tensor]]]:
        """The plan, made anew only if what is saved has changed, and this rank's parts by it. Local."""
        held = self._inventory.arrays(self._state.optimizer, frozen=frozen)
        same = len(held) == len(self._held) and all(a is b for a, b in zip(held, self._held, strict=True))
        if self._plan is None or not same:
            self._plan = ckpt.make_plan(self._inventory.layout(held))
            self._wanted = self._plan.parts(self._comm.rank)
            self._held = held
        return self._plan, parts_to_save(held, self._wanted)

    def _write(
        self,
        run: str | Path,
        tag: str,
        plan: ckpt.Plan,
        parts: list[tuple[ckpt.ShardSpec, Tensor]],
        manifest: RunManifest,
        update_latest: bool,
    ) -> ckpt.SaveReport:
        """The save itself, in whichever thread. Torch's process groups may be gone by then."""
        settings = self._config.checkpoint
        described = self._writing.gather(manifest if self._state.model.topology.speaks_for_stage else None)
        stages = [part for part in described if part is not None]  # on rank 0, whose word counts
        whole = ckpt.agreed(self._writing, lambda: stages[0].merged(stages[1:]) if stages else manifest)
        shards = ckpt.agreed(self._writing, lambda: [on_host(*part) for part in parts])
        return ckpt.save(
            run,
            tag,
            shards,
            plan=plan,
            comm=self._writing,
            document=whole.document(),
            files={SCRIPT.name: SCRIPT.read_bytes()},
            durable=settings.durable,
            update_latest=update_latest,
            retention=ckpt.Retention(keep_last=settings.keep_last, keep_every=settings.keep_every),
            threads=threads_per_rank(self._comm.size),
        )

    def _manifest(self, client_state: dict[str, Any], frozen: bool) -> RunManifest:
        """Return the manifest as this rank's stage has it. Local.

        Copies what training may change before it is written.
        """
        model, scheduler, progress = self._state.model, self._state.lr_scheduler, self._state.progress
        scaler, topology = self._state.scaler, model.topology
        degrees = topology.degrees
        about_model, optimizer = describe(model, self._state.optimizer, self._model_spec, frozen=frozen)
        # Now, so that the script's mistake is raised by its call; the rest is checked while it is written.
        ckpt.check_json(client_state, "the checkpoint's document['client_state']")
        return RunManifest(
            step=progress.global_steps,
            writer=WriterRecord(
                torch=str(torch.__version__),
                topology={"pp": degrees.pp, "dp": degrees.dp, "tp": degrees.tp},
                zero_stage=model.zero.stage,
                shard_group=topology.mesh["shard"].size(),
                layers=model.layers,
            ),
            model=about_model,
            optimizer=optimizer,
            aliases=model.ties,
            scheduler=None if scheduler is None else copy.deepcopy(scheduler.state_dict()),
            engine=EngineRecord(
                global_steps=progress.global_steps,
                global_samples=progress.global_samples,
                skipped_steps=progress.skipped_steps,
                loss_scale=None if scaler is None else scaler.state_dict(),
                seed=self._config.seed,
                train_batch_size=progress.train_batch,
            ),
            client_state=copy.deepcopy(client_state),
        )
