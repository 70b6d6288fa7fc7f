"""DCP's storage reader on universal checkpoints."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

import ckpt
from ckpt import Checkpoint, CheckpointError
from uni3d.checkpoint.background import threads_per_rank
from uni3d.dcp.arrays import target_of
from uni3d.dcp.names import KeptValue, Stored, StoredBytes, StoredNames, StoredValue
from uni3d.dcp.values import in_place_of
from uni3d.dcp.writer import split_id
from uni3d.state import to_torch

_BATCH_BYTES = 256 << 20
"""Most bytes that are read at a time into memory other than the tensors' own, except for one tensor."""


class StorageReader(storage.StorageReader):
    """Storage reader for `torch.distributed.checkpoint.load`, of any checkpoint of uni3d.

    It fills the state_dict of a model and an optimizer, as `get_state_dict` of
    `torch.distributed.checkpoint.state_dict` or torchtitan makes it, on any number of ranks. What is read has
    been verified. Of each parameter group, `foreach`, `fused`, `capturable` and `differentiable` stay as they
    are: they choose an implementation, and no checkpoint of uni3d has them.
    """

    def __init__(self, run: str | Path | None = None, tag: str | int | None = None) -> None:
        """Read the checkpoint `tag` of the run at `run`, a folder or any fsspec URL; by default the latest.

        `run` may also be a checkpoint's own folder, and may be left out if the load has a `checkpoint_id`,
        the path of `<run>/<tag>`.
        """
        self._run, self._tag = run, tag
        self._checkpoint: Checkpoint | None = None
        self._names: StoredNames | None = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether `checkpoint_id` can be the path of a checkpoint."""
        return bool(Path(checkpoint_id).name)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a load; `checkpoint_id` is the path of `<run>/<tag>`."""
        if checkpoint_id is not None:
            self._run, self._tag = split_id(checkpoint_id)

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Open the checkpoint and return DCP's description of it.

        Raises:
            CheckpointError: there is no such checkpoint, or its manifest is damaged.
        """
        if self._run is None:
            raise CheckpointError("StorageReader has no run; give it one, or give the load a checkpoint_id")
        self._checkpoint = ckpt.open_checkpoint(ckpt.check_run(self._run), self._tag)
        self._names = StoredNames(self._checkpoint)
        return Metadata(
            state_dict_metadata=_Described(self._checkpoint, self._names),
            planner_data={name: path for name, (path, _) in self._names.own.items()},
            storage_meta=StorageMeta(checkpoint_id=self._checkpoint.url),
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Take up the role of one rank."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Add the identity of the checkpoint that this rank has opened."""
        content = json.dumps(self._open.manifest, sort_keys=True).encode()
        return replace(plan, storage_data=(self._open.url, blake2b(content, digest_size=16).hexdigest()))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Check that all ranks have opened the same checkpoint: a save may have come between.

        Raises:
            CheckpointError: they haven't.
        """
        first = plans[0].storage_data
        for rank, plan in enumerate(plans):
            url, digest = plan.storage_data
            if digest != first[1]:
                raise CheckpointError(
                    f"rank {rank} has opened {url}, but rank 0 {first[0]}, which isn't the same checkpoint; "
                    "name a tag, and load again"
                )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill this rank's tensors and values.

        Raises:
            CheckpointError: data is damaged, or a tensor's type or a parameter group is another one.
        """
        tensors = [item for item in plan.items if item.type == LoadItemType.TENSOR]
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                self._load_value(item, planner)
        batch: list[tuple[ReadItem, Tensor, ckpt.Shard]] = []
        size = 0
        for item in tensors:
            batch.append(self._target(item, planner))
            size += 0 if _direct(*batch[-1][1:]) else batch[-1][2].data.nbytes
            if size >= _BATCH_BYTES:
                self._read(batch, planner)
                batch, size = [], 0
        self._read(batch, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @property
    def _open(self) -> Checkpoint:
        assert self._checkpoint is not None, "read_metadata comes first"
        return self._checkpoint

    def _stored(self, item: ReadItem) -> Stored:
        assert self._names is not None, "read_metadata comes first"
        stored = self._names.find(item.storage_index.fqn)
        assert stored is not None, f"{item.storage_index.fqn} was planned"
        return stored

    def _target(self, item: ReadItem, planner: LoadPlanner) -> tuple[ReadItem, Tensor, ckpt.Shard]:
        key = self._stored(item)
        assert isinstance(key, ckpt.ArrayKey), item.storage_index.fqn
        tensor = planner.resolve_tensor(item)
        info = self._open.arrays[key]
        kept: torch.dtype = getattr(torch, info.dtype)
        if kept.is_floating_point != tensor.dtype.is_floating_point:
            raise CheckpointError(
                f"{item.dest_index.fqn} is {info.dtype} in {self._open.url}, but {tensor.dtype} in the "
                "state_dict; give it a tensor of that kind"
            )
        if tuple(tensor.shape) != tuple(item.lengths):
            raise CheckpointError(
                f"{item.dest_index.fqn}: the planner gave {list(tensor.shape)} for {list(item.lengths)}"
            )
        return item, tensor, target_of(info, tuple(item.storage_offsets), tensor.detach())

    def _read(self, batch: list[tuple[ReadItem, Tensor, ckpt.Shard]], planner: LoadPlanner) -> None:
        threads = threads_per_rank(_world_size())
        shards = [shard for _, _, shard in batch]
        ckpt.load(self._open, shards, comm=ckpt.Solo(), strict=False, threads=threads)
        for item, tensor, shard in batch:
            if not _direct(tensor, shard):
                with torch.no_grad():
                    tensor.copy_(to_torch(shard.data))
            planner.commit_tensor(item, tensor)

    def _load_value(self, item: ReadItem, planner: LoadPlanner) -> None:
        """Hand a value to the planner, in the form of the one that it replaces."""
        name, stored = item.dest_index.fqn, self._stored(item)
        current = getattr(planner, "state_dict", {}).get(name)
        if isinstance(stored, StoredBytes):
            value: Any = self._open.read(*stored.key).tobytes()
        elif isinstance(stored, StoredValue):
            if name.endswith(".params") and isinstance(current, list) and {*current} != {*stored.value}:
                other = sorted({*current} ^ {*stored.value})
                raise CheckpointError(
                    f"{name}: the state_dict's parameter group isn't that of {self._open.url}: {other[0]} "
                    "is in only one of them; group the parameters as they were"
                )
            try:
                value = in_place_of(current, stored.value, stored.kinds)
            except TypeError as error:
                raise CheckpointError(f"{name} is in {self._open.url} {error} in the state_dict") from None
        else:
            assert isinstance(stored, KeptValue), name
            return
        if value is not current or not isinstance(value, Tensor):
            buffer = io.BytesIO()
            torch.save(value, buffer)  # in memory: planners take values in no other form
            buffer.seek(0)
            planner.load_bytes(item, buffer)


def _direct(tensor: Tensor, shard: ckpt.Shard) -> bool:
    """Return whether the shard's memory is the tensor's."""
    return to_torch(shard.data).data_ptr() == tensor.data_ptr()


def _world_size() -> int:
    on = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if on else 1


class _Described(dict[str, STORAGE_TYPES]):
    """DCP's description of each name; also of those that aren't the saved state_dict's own."""

    def __init__(self, checkpoint: Checkpoint, names: StoredNames) -> None:
        self._checkpoint, self._names = checkpoint, names
        super().__init__(self._all())

    def _all(self) -> Iterator[tuple[str, STORAGE_TYPES]]:
        for name, (_, stored) in self._names.own.items():
            yield name, self._of(stored)

    def __contains__(self, name: object) -> bool:
        return self._names.find(str(name)) is not None

    def __getitem__(self, name: str) -> STORAGE_TYPES:
        stored = self._names.find(name)
        if stored is None:
            raise KeyError(name)
        return self._of(stored)

    def _of(self, stored: Stored) -> STORAGE_TYPES:
        if not isinstance(stored, ckpt.ArrayKey):
            return BytesStorageMetadata()
        info = self._checkpoint.arrays[stored]
        shape = torch.Size(info.shape)
        whole = ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=shape)
        return TensorStorageMetadata(TensorProperties(dtype=getattr(torch, info.dtype)), shape, [whole])
