"""Connections between ranks for small messages: few for each rank, and few hops from any rank to any other.

A rank's number is written in octal, as a node has 8 GPUs. A rank talks to those that differ from it in one
digit: 22 of 1,024 ranks, 31 of 16,384. A parcel goes to its target digit by digit, lowest first, so that it
leaves the node once, together with the others of its direction. What goes to rank 0 or comes from it takes
the tree of those ranks that have had their low digits cleared.

A square (a row and a column) would be two hops less, but 62 connections at 1,024 ranks. Direct connections
are more than 300 there for a save: a small array's one writer receives from every rank that holds a part.
"""

from __future__ import annotations

from functools import cached_property

RADIX = 8
"""Number of values of a digit."""


class Routes:
    """Peers of one rank among `size` ranks, and the way of parcels and of the tree through it."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._strides = [1]  # of each digit, and the end of the highest one
        while self._strides[-1] * RADIX < size:
            self._strides.append(self._strides[-1] * RADIX)
        highest = self._strides[-1]
        self._strides.append(-(-size // highest) * highest)

    @property
    def hops(self) -> int:
        """Number of hops of a parcel, each of which may lead to the same rank."""
        return len(self._strides) - 1

    def after(self, hop: int, source: int, target: int) -> int:
        """Return the rank at which a parcel from `source` to `target` is after a hop."""
        end = self._strides[hop + 1]
        return self._host(source - source % end + target % end)

    @cached_property
    def peers(self) -> list[list[int]]:
        """Other ranks to which this one sends in each hop; the same ones send to it."""
        places = [self.rank, self.rank + self._strides[-2]]
        mine = [place for place in places if place < self._strides[-1] and self._host(place) == self.rank]
        found = []
        for stride, end in zip(self._strides, self._strides[1:], strict=False):
            firsts = [place - place % end + place % stride for place in mine]
            row = {self._host(first + i) for first in firsts for i in range(0, end, stride)}
            found.append(sorted(row - {self.rank}))
        return found

    @property
    def all_peers(self) -> list[int]:
        """Other ranks to which this one ever talks."""
        return sorted({*(p for row in self.peers for p in row), *self.children, self.parent} - {self.rank})

    @property
    def parent(self) -> int:
        """Rank to which this one reports; rank 0 has none, and is its own."""
        return self.rank - self.rank % self._reach_and_end[1]

    @cached_property
    def children(self) -> list[int]:
        """Ranks that report to this one, which speak for ranks in ascending order."""
        reach = self._reach_and_end[0]
        spans = [s for s in zip(self._strides, self._strides[1:], strict=False) if s[1] <= reach]
        children = (self.rank + i for stride, end in spans for i in range(stride, end, stride))
        return [child for child in children if child < self.size]

    @property
    def _reach_and_end(self) -> tuple[int, int]:
        """Number of ranks that report through this one, itself included, and the parent's number."""
        lowest = next((i for i, end in enumerate(self._strides[1:]) if self.rank % end), self.hops)
        return self._strides[lowest], self._strides[min(lowest + 1, self.hops)]

    def _host(self, place: int) -> int:
        """Return the rank at a place; for places beyond the last rank, the one with the next lower digit."""
        return place if place < self.size else place - self._strides[-2]
