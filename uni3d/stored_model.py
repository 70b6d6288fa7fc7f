"""A model as checkpoints see it, whoever trains it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from parallel import Ranks
from parallel.flat_parameters import FlatParameters


class StageParts(Protocol):
    """Parts of tensors on the ranks that share a pipeline stage."""

    rank: int
    ranks: tuple[int, ...]

    def places(self, tensor: Tensor) -> Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return the offset and shape of each rank's part; the same object for tensors that are cut alike."""
        ...


class StoredModel(Protocol):
    """This rank's part of a model, as checkpoints see it.

    `parallel.ParallelModel` is one, and `parallel.found_model.FoundModel`, which others have sharded.
    """

    @property
    def module(self) -> nn.Module: ...

    @property
    def layout(self) -> StageParts: ...

    @property
    def ties(self) -> Mapping[str, str]:
        """First name of each other name of a tied parameter."""
        ...

    @property
    def copies(self) -> Collection[str]:
        """Names of tied parameters that another stage saves."""
        ...

    @property
    def rowwise(self) -> Collection[str]:
        """Names of weights that tensor parallelism of any degree cuts along their second dim."""
        ...

    @property
    def layers(self) -> list[list[str]] | None:
        """Layers at each place of the pipeline; None if it isn't known as a chain."""
        ...

    @property
    def flat(self) -> FlatParameters | None:
        """Parameters that FSDP1 keeps as slices of flat tensors; None if it wraps no part of the model."""
        ...

    @property
    def stage(self) -> int:
        """Number of this rank's pipeline stage."""
        ...

    @property
    def speaks_for_stage(self) -> bool:
        """True on the first rank of each stage."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def ranks(self) -> Ranks:
        """All ranks in numbers, for the manifest and for people."""
        ...

    @property
    def shard_group(self) -> int:
        """Ranks over which a tensor is sharded, apart from tensor parallelism."""
        ...

    @property
    def data_part(self) -> tuple[int, int]:
        """This rank's part of the data, and the number of parts."""
        ...

    def first_name(self, name: str) -> str:
        """Return the name of one of this rank's tensors in the whole model."""
        ...

    def carry_writes(self) -> None:
        """Bring what was written into whole parameters to the sharded ones."""
        ...

    def reshard(self) -> None:
        """Show sharded parameters in the modules, as the optimizer has them."""
        ...
