"""What an engine saves and loads: shards through `ckpt`, everything else in the manifest."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import ckpt
from ckpt.threads import cores
from parallel import HostComm
from uni3d import state
from uni3d.checkpoint.background import Background
from uni3d.checkpoint.optimizer_groups import describe
from uni3d.checkpoint.restore import Restorer, Wanted
from uni3d.checkpoint.snapshot import Snapshot
from uni3d.manifest import SCRIPT, EngineRecord, RunManifest, WriterRecord

if TYPE_CHECKING:
    from uni3d.engine.engine import Engine


class Checkpointer:
    """Saves and loads one engine. Every call is collective, but for `failed`."""

    def __init__(self, engine: Engine) -> None:
        """Collective.

        Raises:
            ValueError: the engine has a scheduler whose state can't be saved; better now than at a save.
        """
        self._engine = engine
        if engine.lr_scheduler is not None:
            try:
                ckpt.check_json(engine.lr_scheduler.state_dict(), "its state")
            except ckpt.CheckpointError as error:
                kind = type(engine.lr_scheduler).__name__
                raise ValueError(f"{kind} can't be saved: {error}") from None
        self.declared: dict[str, Any] = {}
        """What the model says of itself."""
        self.comm = HostComm()
        self._writing = HostComm()  # a save's own, as it goes on while others use the first
        self._inventory = state.Inventory(engine.model)
        self._held: list[state.Held] = []
        self._plan: ckpt.Plan | None = None
        self._wanted: dict[ckpt.ArrayKey, ckpt.Box] = {}
        self._snapshot = Snapshot(engine.model.topology.device)
        self._background: Background[ckpt.SaveReport] = Background("uni3d's last save_checkpoint")
        self._agreed_failure = False
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", self.comm.size))
        self._threads = max(1, cores() // local_ranks)

    # --- saving ----------------------------------------------------------------------------------------

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
        asynchronous = self._engine.config.checkpoint.async_save
        if "://" not in str(run):
            run = Path(run).absolute()  # the script may change its folder meanwhile
        taken: list[tuple[ckpt.Plan, list[tuple[ckpt.ShardSpec, Tensor]], RunManifest]] = []

        def take() -> str:
            ckpt.check_tag(tag)
            plan, parts = self._parts(frozen)
            if asynchronous:  # the one thing that training waits for
                copies = self._snapshot.take([tensor for _, tensor in parts])
                parts = [(spec, copy) for (spec, _), copy in zip(parts, copies, strict=True)]
            taken.append((plan, parts, self._manifest(client_state, frozen)))
            return tag

        tags = set(ckpt.gathered(self.comm, take))
        if len(tags) > 1:
            raise ckpt.CheckpointError(
                f"the ranks were asked to save different tags: {', '.join(sorted(tags))}; use one"
            )
        if asynchronous:
            self._background.start(lambda: self._write(run, tag, *taken[0], update_latest))
        else:
            self._engine.last_save = self._write(run, tag, *taken[0], update_latest)

    def wait(self) -> None:
        """Wait for the save that goes on in the background, if any; raises what it raised."""
        self._agreed_failure = False
        report = self._background.wait()
        if report is not None:
            self._engine.last_save = report

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

    def _parts(self, frozen: bool) -> tuple[ckpt.Plan, list[tuple[ckpt.ShardSpec, Tensor]]]:
        """The plan, made anew only if what is saved has changed, and this rank's parts by it. Local."""
        held = self._inventory.arrays(self._engine.optimizer, frozen=frozen)
        same = len(held) == len(self._held) and all(a is b for a, b in zip(held, self._held, strict=True))
        if self._plan is None or not same:
            self._plan = ckpt.make_plan(self._inventory.layout(held))
            self._wanted = self._plan.parts(self.comm.rank)
            self._held = held
        return self._plan, state.parts_to_save(held, self._wanted)

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
        settings = self._engine.config.checkpoint
        ckpt.together(
            self._writing, lambda: ckpt.check_json(manifest.document(), "the checkpoint's document")
        )
        described = self._writing.gather(manifest if self._engine.model.topology.speaks_for_stage else None)
        stages = [part for part in described if part is not None]  # on rank 0, whose word counts
        whole = ckpt.together(
            self._writing, lambda: stages[0].merged(stages[1:]).document() if stages else {}
        )
        shards = ckpt.together(self._writing, lambda: [state.on_host(*part) for part in parts])
        return ckpt.save(
            run,
            tag,
            shards,
            plan=plan,
            comm=self._writing,
            document=whole,
            files={SCRIPT.name: SCRIPT.read_bytes()},
            durable=settings.durable,
            update_latest=update_latest,
            retention=ckpt.Retention(keep_last=settings.keep_last, keep_every=settings.keep_every),
            threads=self._threads,
        )

    def _manifest(self, client_state: dict[str, Any], frozen: bool) -> RunManifest:
        """Return the manifest as this rank's stage has it. Local.

        Copies what training may change before it is written.
        """
        engine = self._engine
        topology, scheduler = engine.model.topology, engine.lr_scheduler
        degrees = topology.degrees
        ckpt.check_json(client_state, "the checkpoint's document['client_state']")
        model, optimizer = describe(engine.model, engine.optimizer, self.declared, frozen=frozen)
        return RunManifest(
            step=engine.global_steps,
            writer=WriterRecord(
                torch=str(torch.__version__),
                topology={"pp": degrees.pp, "dp": degrees.dp, "tp": degrees.tp},
                zero_stage=engine.model.zero.stage,
                shard_group=topology.mesh["shard"].size(),
                layers=engine.model.layers,
            ),
            model=model,
            optimizer=optimizer,
            aliases=engine.model.ties,
            scheduler=None if scheduler is None else copy.deepcopy(scheduler.state_dict()),
            engine=EngineRecord(
                global_steps=engine.global_steps,
                global_samples=engine.global_samples,
                skipped_steps=engine.skipped_steps,
                loss_scale=None if engine.scaler is None else engine.scaler.state_dict(),
                seed=engine.config.seed,
                train_batch_size=engine.triad.train_batch,
            ),
            client_state=copy.deepcopy(client_state),
        )

    # --- loading ---------------------------------------------------------------------------------------

    def load(
        self, run: str | Path, tag: str | None, wanted: Wanted
    ) -> tuple[ckpt.LoadReport, ckpt.Checkpoint]:
        """Fill the engine from a checkpoint; see `Engine.load_checkpoint`."""
        self.wait()
        Background.join_all()  # another engine of this process may be writing what this one looks for
        checkpoint = self._open(run, tag)
        restorer = Restorer(self._engine, self.comm, self._inventory, self._threads)
        report = restorer.load(checkpoint, wanted)
        self._held, self._plan = [], None  # don't keep alive what a load may replace
        return report, checkpoint

    def latest(self, run: str | Path) -> str | None:
        """The newest committed tag, the same on all ranks whatever their file systems show them yet."""
        self.wait()
        Background.join_all()
        return ckpt.from_first(self.comm, lambda: ckpt.read_latest(run))

    def _open(self, run: str | Path, tag: str | None) -> ckpt.Checkpoint:
        def find() -> str:
            store, folder = ckpt.find_checkpoint(run, tag)
            return store.where(folder)

        chosen = ckpt.from_first(self.comm, find)
        return ckpt.together(self.comm, lambda: ckpt.open_checkpoint(chosen))
