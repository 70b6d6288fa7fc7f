"""`deepspeed.runtime.pipe.topology`: places of ranks on named axes. The last axis has neighbouring ranks."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any


class ProcessTopology:
    """Ranks on a grid, numbered row by row; a rank's place is a named tuple with a number for each axis."""

    def __init__(self, axes: Sequence[str], dims: Sequence[int]) -> None:
        if len(axes) != len(dims):
            raise ValueError(
                f"ProcessTopology got {len(axes)} axes and {len(dims)} dims; expected one for each"
            )
        self.axes, self.dims = list(axes), list(dims)
        self.ProcessCoord: Any = namedtuple("ProcessCoord", axes)  # type: ignore[misc]  # axes vary
        places: Iterable[Any] = product(*(range(dim) for dim in dims))
        self.mapping = {self.ProcessCoord(*place): rank for rank, place in enumerate(places)}

    def world_size(self) -> int:
        return len(self.mapping)

    def get_dim(self, axis: str) -> int:
        """Return the length of an axis, 0 of one that there isn't."""
        return self.dims[self.axes.index(axis)] if axis in self.axes else 0

    def get_axis_names(self) -> list[str]:
        return self.axes

    def get_rank(self, **place: int) -> int:
        """Return the rank at a place: `get_rank(pipe=1, data=0)`."""
        if sorted(place) != sorted(self.axes):
            raise ValueError(
                f"get_rank() needs {', '.join(self.axes)}; got {', '.join(place)}. See filter_match()"
            )
        return self.mapping[self.ProcessCoord(**place)]

    def get_coord(self, rank: int) -> Any:
        """Return the place of a rank."""
        for place, there in self.mapping.items():
            if there == rank:
                return place
        raise ValueError(f"rank {rank} isn't in the topology, which has {self.world_size()} ranks")

    def get_rank_repr(
        self,
        rank: int,
        omit_axes: Sequence[str] = ("data", "pipe"),
        inner_sep: str = "_",
        outer_sep: str = "-",
    ) -> str:
        """Return a rank's place as text for names of files, such as `model_01`."""
        place = self.get_coord(rank)
        shown = [axis for axis in self.axes if axis not in omit_axes]
        return outer_sep.join(f"{axis}{inner_sep}{getattr(place, axis):02d}" for axis in shown)

    def filter_match(self, **wanted: int) -> list[int]:
        """Return the ranks whose places have these numbers, in their order."""
        return [
            rank
            for place, rank in self.mapping.items()
            if all(getattr(place, axis) == number for axis, number in wanted.items())
        ]

    def get_axis_list(self, axis: str, idx: int) -> list[int]:
        """Return the ranks that have the number `idx` on an axis."""
        return self.filter_match(**{axis: idx})

    def get_axis_comm_lists(self, axis: str) -> list[list[int]]:
        """Return the groups of ranks that differ on one axis alone; none for an axis that there isn't."""
        if axis not in self.axes:
            return []
        groups: dict[tuple[int, ...], list[int]] = {}
        at = self.axes.index(axis)
        for place, rank in self.mapping.items():
            groups.setdefault((*place[:at], *place[at + 1 :]), []).append(rank)
        return list(groups.values())


class PipeDataParallelTopology(ProcessTopology):
    """Pipeline stages times data-parallel ranks."""

    def __init__(self, num_pp: int, num_dp: int) -> None:
        super().__init__(axes=["pipe", "data"], dims=[num_pp, num_dp])


class PipeModelDataParallelTopology(ProcessTopology):
    """Pipeline stages times data-parallel times tensor-parallel ranks."""

    def __init__(self, num_pp: int, num_mp: int, num_dp: int) -> None:
        super().__init__(axes=["pipe", "data", "model"], dims=[num_pp, num_dp, num_mp])
