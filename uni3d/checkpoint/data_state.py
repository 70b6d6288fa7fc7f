"""States of loaders that the script brings: one for each data-parallel rank, saved and given back.

They are extra states (`uni3d.checkpoint.extra_state`), whose tensors belong to the atoms `.data.0`, `.data.1`
and so on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ckpt
from parallel import HostComm
from uni3d import state
from uni3d.checkpoint.extra_state import Extra, ExtraRecord, array_key, put_together, taken_apart
from uni3d.manifest import DATA_ATOM, DataRecord, RunManifest, data_atom
from uni3d.train_state import DataState


class DataSaver:
    """Gathers the states for each save."""

    def __init__(self, data: DataState | None, part: tuple[int, int], comm: HostComm, argument: str) -> None:
        """Take the states of `data`, which messages call `argument`."""
        self._data, self._part, self._comm, self._argument = data, part[0], comm, argument
        self._tensors: dict[ckpt.ArrayKey, Tensor] = {}

    def take(self) -> tuple[DataRecord | None, dict[ckpt.ArrayKey, Tensor]]:
        """Return what the manifest holds, and the tensors, which stay the same objects. Collective.

        Raises:
            CheckpointError: a state can't be stored, or ranks of one data-parallel index differ.
        """
        data, part = self._data, self._part
        if data is None or not data.resumes:
            return None, {}
        what = f"{self._argument} ({data.kind}): state"
        found = ckpt.merged(self._comm, lambda: [(part, taken_apart(data.state_dict(), what))], _joined)
        return ckpt.agreed(self._comm, lambda: self._put_in_order(data.kind, found))

    def _put_in_order(
        self, kind: str, found: list[tuple[int, Extra]]
    ) -> tuple[DataRecord, dict[ckpt.ArrayKey, Tensor]]:
        first: dict[int, tuple[int, Extra]] = {}
        for rank, (index, extra) in enumerate(found):
            other, expected = first.setdefault(index, (rank, extra))
            if extra.digest() != expected.digest():
                raise ckpt.CheckpointError(
                    f"{self._argument} ({kind}) stands elsewhere on rank {rank} than on rank {other}, but "
                    f"both have the data-parallel index {index} and need the same batches: let its order "
                    "depend on that index alone"
                )
        extras = {index: first[index][1] for index in sorted(first)}
        before, self._tensors = self._tensors, {}
        for index, extra in extras.items():
            for key, tensor in extra.arrays(data_atom(index)).items():
                known = before.get(key)  # kept, so that the save needs no new plan
                if known is None or (known.shape, known.dtype) != (tensor.shape, tensor.dtype):
                    known = torch.empty_like(tensor, device="cpu")
                self._tensors[key] = known.copy_(tensor)
        return DataRecord(kind, [extra.record() for extra in extras.values()]), self._tensors


def _joined(parts: list[list[tuple[int, Extra]]]) -> list[tuple[int, Extra]]:
    return [state for part in parts for state in part]


class DataLoad:
    """Load of this rank's state."""

    def __init__(
        self, data: DataState | None, part: tuple[int, int], saved: RunManifest, *, counters: bool
    ) -> None:
        self._data = data if counters else None
        self._record: ExtraRecord | None = None
        self._read: dict[ckpt.ArrayKey, Tensor] = {}
        self._atom = data_atom(part[0])
        there = saved.data
        if self._data is None or not self._data.resumes or there is None:
            return
        if (there.kind, len(there.states)) == (self._data.kind, part[1]):
            self._record = ExtraRecord.of(there.states[part[0]], "data")

    def reason(self) -> str | None:
        """Return why the tensors of the states aren't loaded on any rank; None if they are."""
        return None if self._record is not None else "the state of the checkpoint's loader isn't taken up"

    def targets(self, checkpoint: ckpt.Checkpoint) -> list[ckpt.Shard]:
        """Return the tensors that this rank reads. Local."""
        if self._record is None:
            return []
        keys = [array_key(self._atom, place) for place in self._record.tensors]
        shards = [state.whole_target(checkpoint.info(*key)) for key in keys]
        self._read = {shard.spec.key: state.to_torch(shard.data) for shard in shards}
        return shards

    def restore(self) -> None:
        """Give the loader its state, or let it begin anew. Local."""
        if self._data is None:
            return
        if self._record is None:
            self._data.begin_anew()
            return
        value: dict[str, Any] = put_together(
            self._record, lambda place: self._read[array_key(self._atom, place)]
        )
        self._data.load_state_dict(value)


def is_data(atom: str) -> bool:
    """Return whether an atom holds tensors of a loader's state."""
    return atom.startswith(f"{DATA_ATOM}.")
