"""`uni3d.save` and `uni3d.load`: single calls, by a Checkpointer that the model keeps between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import ckpt
from parallel.found_model import Names, parts_of
from uni3d.checkpoint.checkpointer import Checkpointer, Restored, SaveHandle, connect
from uni3d.checkpoint.restore import newest
from uni3d.manifest import RunManifest

_KEPT = "_uni3d_checkpointer"


def save(
    run: str | Path,
    *,
    model: nn.Module | Sequence[nn.Module],
    step: int,
    optimizer: Optimizer | None = None,
    lr_scheduler: LRScheduler | None = None,
    dataloader: Any = None,
    objects: Mapping[str, Any] | None = None,
    names: Names | None = None,
    tag: str | int | None = None,
    client_state: Mapping[str, Any] | None = None,
    **settings: Any,
) -> SaveHandle:
    """Save a run that another trainer trains. Collective; see `Checkpointer`, whose `settings` it takes too.

    The model keeps a Checkpointer from call to call, so that only the first one connects and plans.
    """
    given = {
        "model": model,
        "optimizer": optimizer,
        "lr_scheduler": lr_scheduler,
        "dataloader": dataloader,
        "objects": objects,
        "names": names,
    }
    return _kept(run, given, settings).save(step, tag=tag, client_state=client_state)


def load(
    run: str | Path | ckpt.Checkpoint,
    *,
    model: nn.Module | Sequence[nn.Module],
    optimizer: Optimizer | None = None,
    lr_scheduler: LRScheduler | None = None,
    dataloader: Any = None,
    objects: Mapping[str, Any] | None = None,
    names: Names | None = None,
    tag: str | int | None = None,
    strict: bool = True,
    **settings: Any,
) -> Restored:
    """Load a run into what another trainer trains. Collective; see `Checkpointer.load`.

    `run` may be another framework's folder or file, or what each rank has opened by `uni3d.open`. Without an
    optimizer, weights and buffers are loaded.
    """
    given = {
        "model": model,
        "optimizer": optimizer,
        "lr_scheduler": lr_scheduler,
        "dataloader": dataloader,
        "objects": objects,
        "names": names,
    }
    trains = optimizer is not None
    place = run.url if isinstance(run, ckpt.Checkpoint) else run
    return _kept(place, given, settings).load(tag, strict=strict, optimizer=trains, run=run)


def stored_client_state(run: str | Path, tag: str | int | None = None) -> tuple[str, dict[str, Any]] | None:
    """Return a checkpoint's tag and client_state, by default the newest's; None if there is none. Collective.

    For what a script must know before it makes its model.
    """
    comm = connect()
    name = newest(comm, run) if tag is None else ckpt.tag_text(tag)
    if name is None:
        return None
    found = ckpt.from_rank_0(comm, lambda: RunManifest.of(ckpt.open_checkpoint(run, name)).client_state)
    return name, found


def _kept(run: str | Path, given: dict[str, Any], settings: dict[str, Any]) -> Checkpointer:
    """Return the model's Checkpointer of these objects and settings; make it if it has none. Collective."""
    model = given["model"]
    owner = vars(parts_of(model)[0])
    known: Checkpointer | None = owner.get(_KEPT)
    if known is not None and known.is_of(given, settings):
        known.run = run
        return known
    if known is not None:
        known.wait()
    made = Checkpointer(run, **given, **settings)
    owner[_KEPT] = made
    return made
