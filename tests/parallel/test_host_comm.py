"""Collectives of values and bytes between the CPUs of ranks."""

from typing import Any

import numpy as np
import pytest
from marks import slow
from ranks import Ranks

from parallel import HostComm

LENGTHS = [10, 3_000, 200_000, 20, 5_000]
"""Lengths of one rank's value each: beside its length, alone, and much longer than the others'."""


def value_of(rank: int, lengths: list[int]) -> tuple[int, bytes]:
    return rank, bytes([rank + 1]) * lengths[rank]


def collectives_case(lengths: list[int]) -> Any:
    comm = HostComm()
    mine = value_of(comm.rank, lengths)
    return comm.all_gather(mine), comm.gather(mine), comm.broadcast(mine), comm.gather(comm.rank)


@pytest.mark.parametrize(
    ("size", "turn"), [(1, 2), (3, 0), (4, 3), slow(2, 1), slow(3, 1), slow(3, 2), slow(4, 0)]
)
def test_values_of_very_different_lengths(ranks: Ranks, size: int, turn: int) -> None:
    lengths = (LENGTHS[turn:] + LENGTHS[:turn])[:size]
    expected = [value_of(rank, lengths) for rank in range(size)]
    for rank, (everyone, gathered, first, later) in enumerate(ranks.run(size, collectives_case, lengths)):
        assert everyone == expected
        assert gathered == ([] if rank else expected)
        assert first == expected[0]
        assert later == ([] if rank else [*range(size)]), "what follows isn't mixed up with it"


def exchange_case(sizes: list[list[int]]) -> Any:
    comm = HostComm()
    outgoing = [np.full(n, 10 * comm.rank + r, np.uint8) for r, n in enumerate(sizes[comm.rank])]
    received = comm.exchange(outgoing, [row[comm.rank] for row in sizes])
    return [part.tolist() for part in received]


def test_bytes_for_each_rank(ranks: Ranks) -> None:
    sizes = [[0, 3, 1], [5, 0, 0], [2, 2, 7]]
    for rank, received in enumerate(ranks.run(3, exchange_case, sizes)):
        assert received == [[10 * r + rank] * sizes[r][rank] for r in range(3)]
