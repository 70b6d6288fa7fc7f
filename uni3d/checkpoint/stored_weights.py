"""The weights in a checkpoint as a mapping of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import ckpt
from uni3d import state
from uni3d.checkpoint.extra_state import OBJECT, ExtraRecord, array_key, put_together
from uni3d.manifest import RunManifest


class StoredWeights(Mapping[str, Tensor]):
    """The checkpoint's `state_dict`. A tensor is whole, in fp32, and read and verified on access."""

    def __init__(self, checkpoint: ckpt.Checkpoint, *, frozen: bool = True) -> None:
        self._checkpoint = checkpoint
        manifest, infos = RunManifest.of(checkpoint), ckpt.weights(checkpoint)
        self.infos = {name: info for name, info in infos.items() if frozen or manifest.model.trains(name)}
        """The stored arrays, each tied weight once."""
        self.aliases = {k: v for k, v in manifest.aliases.items() if v in self.infos}
        """Further names of tied weights -> their name in `infos`."""
        saved = manifest.model.extra_state or {}
        self.extra_states = {name: v for name, v in saved.items() if not name.startswith(OBJECT)}
        """Extra states of modules by torch's names; they aren't in the mapping."""

    def __getitem__(self, name: str) -> Tensor:
        info = self.infos[self.aliases.get(name, name)]
        return state.to_torch(self._checkpoint.read(*info.key))

    def __contains__(self, name: object) -> bool:  # Mapping's own would read it
        return name in self.infos or name in self.aliases

    def __iter__(self) -> Iterator[str]:
        yield from self.infos
        yield from self.aliases

    def __len__(self) -> int:
        return len(self.infos) + len(self.aliases)

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self.infos[self.aliases.get(name, name)].shape)

    def extra_state(self, name: str) -> Any:
        """Read a module's extra state; its tensors are on the CPU."""
        return put_together(
            ExtraRecord.of(self.extra_states[name], name),
            lambda place: state.to_torch(self._checkpoint.read(*array_key(name, place))),
        )
