"""Degrees and the places of ranks on the mesh."""

from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from marks import slow
from ranks import Ranks
from torch.distributed import distributed_c10d

from parallel import Degrees, Topology, resolve_degrees
from parallel.topology import AXES

DEGREES = st.integers(1, 6)


@given(DEGREES, DEGREES, DEGREES)
def test_degrees_that_multiply(pp: int, dp: int, tp: int) -> None:
    world = pp * dp * tp
    expected = Degrees(pp=pp, dp=dp, tp=tp)
    assert resolve_degrees(world, pp=pp, dp=dp, tp=tp) == expected
    assert resolve_degrees(world, pp="auto", dp=dp, tp=tp) == expected
    assert resolve_degrees(world, pp=pp, dp="auto", tp=tp) == expected
    assert resolve_degrees(world, pp=pp, dp=dp, tp="auto") == expected
    with pytest.raises(ValueError, match=f"= {world}, but the world size is {world + 1}; change one"):
        resolve_degrees(world + 1, pp=pp, dp=dp, tp=tp)


def test_by_default_all_ranks_are_data_parallel() -> None:
    assert resolve_degrees(6) == Degrees(pp=1, dp=6, tp=1)
    assert str(resolve_degrees(6, tp=2)) == "(pp, dp, tp) = (1, 3, 2)"
    assert resolve_degrees(None, pp=2) == Degrees(pp=2, dp=1, tp=1), "without a world size"


@pytest.mark.parametrize(
    ("world", "degrees", "message"),
    [
        (8, (2, 2, 3), "pp(2) * dp(2) * tp(3) = 12, but the world size is 8; change one of them"),
        (4, (1, 2, 1), "pp(1) * dp(2) * tp(1) = 2, but the world size is 4; change one of them"),
        (8, (3, "auto", 1), "pp(3) * tp(1) = 3 doesn't divide the world size 8; change one of them"),
        (2, ("auto", 4, 1), "dp(4) * tp(1) = 4 doesn't divide the world size 2; change one of them"),
        (4, ("auto", "auto", 2), "pp and dp are both 'auto'; give at least two of pp, dp, tp as numbers"),
        (4, (0, "auto", 1), "pp(0) must be at least 1"),
        (4, (-2, -2, 1), "pp(-2) must be at least 1"),
        (4, (2, 2, -1), "tp(-1) must be at least 1"),
    ],
)
def test_degrees_that_do_not(world: int, degrees: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared
        resolve_degrees(world, **dict(zip(("pp", "dp", "tp"), degrees, strict=True)))
    assert str(caught.value) == message


PLACES = [(1, 4, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)]


def places_case() -> list[dict[str, Any]]:
    """Return this rank's place on each topology."""
    places = []
    for pp, dp, tp in PLACES:
        for zero_stage in (0, 3):
            topology = Topology(Degrees(pp=pp, dp=dp, tp=tp), zero_stage=zero_stage)
            places.append(
                {
                    "coordinates": (topology.pp_rank, topology.dp_rank, topology.tp_rank),
                    "pp_group": dist.get_process_group_ranks(topology.pp_group),
                    "tp_mesh": topology.tp_mesh.mesh.tolist(),
                    "zero_mesh": topology.zero_mesh.mesh.tolist(),
                    "world": (topology.rank, topology.world_size),
                }
            )
    dist.barrier()
    return places


def test_ranks_are_where_an_arange_puts_them(ranks: Ranks) -> None:
    for rank, places in enumerate(ranks.run(4, places_case)):
        found = iter(places)
        for pp, dp, tp in PLACES:
            for zero_stage in (0, 3):
                shape = (pp, dp, 1, tp) if zero_stage == 0 else (pp, 1, dp, tp)
                grid = np.arange(4).reshape(shape)
                p, r, s, t = (int(i[0]) for i in np.nonzero(grid == rank))
                assert next(found) == {
                    "coordinates": (p, r + s, t),  # one of the two data-parallel axes is of size 1
                    "pp_group": grid[:, r, s, t].tolist(),
                    "tp_mesh": grid[p, r, s, :].tolist(),
                    "zero_mesh": grid[p, :, :, t].tolist(),
                    "world": (rank, 4),
                }


def timeouts_case() -> set[timedelta]:
    """Return the timeouts of all groups of two topologies, of which some axes aren't the whole world."""
    # As if it had been given to init_process_group.
    distributed_c10d._set_pg_timeout(timedelta(seconds=71), dist.group.WORLD)
    groups = []
    for degrees in (Degrees(pp=2, dp=1, tp=2), Degrees(pp=1, dp=2, tp=2)):
        topology = Topology(degrees, zero_stage=1)
        groups += [topology.mesh.get_group(axis) for axis in AXES] + [topology.group("pp", "tp")]
    dist.barrier()
    return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


def test_the_timeout_of_the_process_group_holds_on_all_axes(ranks: Ranks) -> None:
    assert ranks.run(4, timeouts_case) == [{timedelta(seconds=71)}] * 4


def mismatch_case() -> str:
    with pytest.raises(ValueError, match="world size") as caught:
        Topology(Degrees(pp=2, dp=2, tp=1), zero_stage=1)
    return str(caught.value)


def test_a_topology_of_another_size_is_refused(ranks: Ranks) -> None:
    for message in ranks.run(2, mismatch_case):
        assert message == "pp(2) * dp(2) * tp(1) = 4, but the world size is 2; change one of them"


def refused_case(zero: int, group: int) -> str:
    with pytest.raises(ValueError, match="shard") as caught:
        Topology(Degrees(pp=1, dp=2, tp=2), zero_stage=zero, shard_group=group)
    return str(caught.value)


@pytest.mark.parametrize(
    ("zero", "group", "message"),
    [
        slow(1, 3, "a shard group of 3 doesn't divide dp(2); choose a shard group that does"),
        (3, 4, "a shard group of 4 doesn't divide dp(2); choose a shard group that does"),
        slow(2, 0, "a shard group of 0 doesn't divide dp(2); choose a shard group that does"),
        (
            0,
            2,
            "a shard group of 2 needs ZeRO stage 1, 2 or 3, because stage 0 shards nothing; "
            "choose another stage, or leave the shard group out",
        ),
    ],
)
def test_a_shard_group_that_cannot_be(ranks: Ranks, zero: int, group: int, message: str) -> None:
    assert ranks.run(4, refused_case, zero, group) == [message] * 4


def shard_group_case() -> tuple[int, list[int], list[int]]:
    topology = Topology(Degrees(pp=1, dp=4, tp=1), zero_stage=2, shard_group=2)
    mesh = topology.zero_mesh
    groups = [dist.get_process_group_ranks(mesh.get_group(axis)) for axis in ("replicate", "shard")]
    dist.barrier()  # or one that ends early closes connections that another is still making
    return topology.dp_rank, groups[0], groups[1]


def test_neighbours_shard_and_groups_of_them_replicate(ranks: Ranks) -> None:
    found = ranks.run(4, shard_group_case)
    assert found == [(0, [0, 2], [0, 1]), (1, [1, 3], [0, 1]), (2, [0, 2], [2, 3]), (3, [1, 3], [2, 3])]
