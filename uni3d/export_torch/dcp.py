"""Export to a folder of torch's distributed checkpoint (DCP).

Its entries are those of `{"model": ..., "optim": ...}` with the results of
`torch.distributed.checkpoint.state_dict.get_state_dict`. torch plans them and writes its `.metadata`; each
array is a file of its own, and streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

import ckpt
from ckpt.parts import ArrayInfo
from uni3d.checkpoint.stored_weights import StoredWeights
from uni3d.export.new_folder import new_folder
from uni3d.export_torch.optimizer import read_optimizer
from uni3d.export_torch.torch_file import write_torch_file


def dcp_content(
    checkpoint: ckpt.Checkpoint, names: list[str] | None = None, *, optimizer: bool = False
) -> dict[str, Any]:
    """Return what to export: nested dicts with an `ArrayInfo` for each array.

    A tied weight is there under each of its names, and its optimizer states under the first. `names` chooses
    tensors; without it, modules' extra states are there, too.

    Raises:
        ValueError: torch can't hold the optimizer.
        ckpt.CheckpointError: an extra state is damaged.
    """
    weights = StoredWeights(checkpoint)
    kept = weights.infos.keys() if names is None else set(names)
    model: dict[str, Any] = {name: info for name, info in weights.infos.items() if name in kept}
    model |= {alias: model[first] for alias, first in weights.aliases.items() if first in model}
    if names is None:
        model |= {name: weights.extra_state(name) for name in weights.extra_states}
    if not optimizer:
        return {"model": model}
    groups, states = read_optimizer(checkpoint)
    return {"model": model, "optim": {"state": states, "param_groups": groups}}


def write_dcp(
    checkpoint: ckpt.Checkpoint,
    output: Path,
    content: Mapping[str, Any],
    *,
    dtype: str | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Path]:
    """Write `content` to a new folder that `torch.distributed.checkpoint.load` reads; return its files.

    The folder appears when all of it is on disk. Parameters are rounded to `dtype`, if given.

    Raises:
        FileExistsError: `output` exists.
        ckpt.CheckpointError: a chunk is damaged, or a number is too large for `dtype`.
        OSError: a file can't be written.
    """
    arrays: dict[int, ArrayInfo] = {}
    stand_ins: dict[ArrayInfo, Tensor] = {}

    def without_data(value: Any) -> Any:
        if isinstance(value, ArrayInfo):
            if value not in stand_ins:
                kind = getattr(torch, ckpt.exported_type(value, dtype))
                stand_ins[value] = torch.empty(value.shape, dtype=kind, device="meta")
                arrays[id(stand_ins[value])] = value
            return stand_ins[value]
        return {k: without_data(v) for k, v in value.items()} if isinstance(value, Mapping) else value

    with new_folder(output) as folder:
        writer = _StreamingWriter(folder, checkpoint, arrays, dtype, progress)
        planner = DefaultSavePlanner()
        planner.set_up_planner(without_data(content), is_coordinator=True)
        writer.set_up_storage_writer(True)
        plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
        (plan,) = writer.prepare_global_plan(plans)
        results = writer.write_data(planner.finish_plan(plan), planner).wait()
        writer.finish(metadata, [results])
        names = sorted(path.name for path in folder.iterdir())
    return [output / name for name in names]


class _StreamingWriter(FileSystemWriter):
    """Writes the arrays of a checkpoint from its chunks, and everything else as torch does."""

    def __init__(
        self,
        folder: Path,
        checkpoint: ckpt.Checkpoint,
        arrays: Mapping[int, ArrayInfo],
        dtype: str | None,
        progress: Callable[[int], None],
    ) -> None:
        """Make a writer; `arrays` maps the id of each tensor without data to what it stands for."""
        super().__init__(folder, sync_files=False)  # the folder is synced when it is whole
        self._folder, self._checkpoint, self._arrays = folder, checkpoint, arrays
        self._dtype, self._progress = dtype, progress

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write a file for each array, to which all its names refer, and one for the rest."""
        held = [self._arrays.get(id(planner.lookup_object(item.index))) for item in plan.items]  # type: ignore[attr-defined]
        rest = [item for item, info in zip(plan.items, held, strict=True) if info is None]
        results = super().write_data(replace(plan, items=rest), planner).wait() if rest else []
        files: dict[ArrayInfo, _StorageInfo] = {}
        for item, info in zip(plan.items, held, strict=True):
            if info is None:
                continue
            if info not in files:
                name = f"__0_{len(files) + 1}.distcp"
                size = write_torch_file(
                    self._checkpoint,
                    self._folder / name,
                    info,
                    dtype=self._dtype,
                    durable=False,
                    progress=self._progress,
                )
                files[info] = _StorageInfo(name, 0, size)
            stored = files[info]
            results.append(WriteResult(index=item.index, size_in_bytes=stored.length, storage_data=stored))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done
