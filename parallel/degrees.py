"""Degrees of parallelism, and the arithmetic that ties them to the number of ranks. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

Degree = int | Literal["auto"]
ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Number of pipeline stages, data-parallel replicas and tensor-parallel parts."""

    pp: int
    dp: int
    tp: int

    def __post_init__(self) -> None:
        """Raises ValueError for a degree below 1."""
        _check_positive({"pp": self.pp, "dp": self.dp, "tp": self.tp})

    def __str__(self) -> str:
        return f"(pp, dp, tp) = ({self.pp}, {self.dp}, {self.tp})"

    @property
    def of_a_stage(self) -> int:
        """Number of ranks that share a pipeline stage."""
        return self.dp * self.tp

    @property
    def total(self) -> int:
        """Number of ranks."""
        return self.pp * self.of_a_stage


@dataclass(frozen=True, kw_only=True)
class Ranks(Degrees):
    """Degrees and the ZeRO stage. Ranks are numbered with pp outermost and tp innermost."""

    zero: int
    """ZeRO stage. Stages 1 to 3 keep the same shards from step to step; stage 0 keeps copies."""

    def __post_init__(self) -> None:
        """Raises ValueError for a degree below 1 or an unknown ZeRO stage."""
        super().__post_init__()
        check_zero_stage(self.zero)

    def __str__(self) -> str:
        return f"pp{self.pp} dp{self.dp} tp{self.tp} zero{self.zero}"

    @property
    def text(self) -> str:
        """The number of ranks and their degrees, as a sentence has them."""
        ranks = self.pp * self.dp * self.tp
        plural = "" if ranks == 1 else "s"
        return f"{ranks} rank{plural} (pp {self.pp} x dp {self.dp} x tp {self.tp}, ZeRO {self.zero})"

    def shards(self, shard_group: int | None = None) -> int:
        """Return the number of data-parallel ranks over which ZeRO shards."""
        return shard_count(self.dp, self.zero, shard_group)


def resolve_degrees(
    world_size: int | None, *, pp: Degree = 1, dp: Degree = "auto", tp: Degree = 1
) -> Degrees:
    """Fill in the one degree that is "auto", and check that the degrees multiply to the world size.

    Without a world size, "auto" is 1.

    Raises:
        ValueError: two degrees are "auto", one is below 1, or they don't multiply to `world_size`.
    """
    given: dict[str, Degree] = {"pp": pp, "dp": dp, "tp": tp}
    auto = [axis for axis, degree in given.items() if degree == "auto"]
    known = {axis: degree for axis, degree in given.items() if isinstance(degree, int)}
    if len(auto) > 1:
        raise ValueError(f"{' and '.join(auto)} are both 'auto'; give at least two of pp, dp, tp as numbers")
    _check_positive(known)
    if world_size is not None:
        check_world_size(world_size, known)
    left = 1 if world_size is None else world_size // prod(known.values())
    return Degrees(**{**known, **dict.fromkeys(auto, left)})


def check_world_size(world_size: int, degrees: Mapping[str, int]) -> None:
    """Check that the given degrees, one, two or all three of pp, dp and tp, suit a number of ranks.

    Raises:
        ValueError: their product doesn't divide it or, with all three, isn't equal to it.
    """
    product = prod(degrees.values())
    equation = " * ".join(f"{axis}({degree})" for axis, degree in degrees.items())
    result = f" = {product}" if len(degrees) > 1 else ""
    if len(degrees) == 3 and product != world_size:
        raise ValueError(f"{equation}{result}, but the world size is {world_size}; change one of them")
    if world_size % product:
        raise ValueError(f"{equation}{result} doesn't divide the world size {world_size}; change one of them")


def shard_count(dp: int, zero_stage: int, shard_group: int | None = None) -> int:
    """Return the number of data-parallel ranks over which ZeRO shards: the shard group, by default all."""
    return 1 if zero_stage == 0 else shard_group or dp


def check_shard_group(dp: int, zero_stage: int, shard_group: int | None) -> None:
    """Check that `dp` data-parallel ranks can shard in groups of `shard_group`; None means all of them.

    Raises:
        ValueError: the group doesn't divide dp, or the ZeRO stage shards nothing.
    """
    if shard_group is None:
        return
    if zero_stage == 0:
        raise ValueError(
            f"a shard group of {shard_group} needs ZeRO stage 1, 2 or 3, because stage 0 shards nothing; "
            "choose another stage, or leave the shard group out"
        )
    if shard_group < 1 or dp % shard_group:
        raise ValueError(
            f"a shard group of {shard_group} doesn't divide dp({dp}); choose a shard group that does"
        )


def check_zero_stage(stage: int) -> None:
    """Raises ValueError for an unknown ZeRO stage."""
    if stage not in ZERO_STAGES:
        raise ValueError(f"ZeRO stage {stage} doesn't exist; expected 0, 1, 2 or 3")


def _check_positive(degrees: Mapping[str, int]) -> None:
    for axis, degree in degrees.items():
        if degree < 1:
            raise ValueError(f"{axis}({degree}) must be at least 1")
