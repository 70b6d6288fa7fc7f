"""Plan of a save, computed without ranks, tensors or torch: files, their writers and their sizes.

Each rank's part of each tensor follows from the rules of training (`parallel`): balanced pipeline stages,
tensor parallelism along the dim of a weight's style, then ZeRO along the first dim. Each cut makes parts of
`ceil(n / k)`, as `torch.chunk` does. The parts go to `ckpt.plan_arrays`, the planner of every save. Stages
with the same tensors in the same order are planned once, since the planner depends only on the order of names
and on ranks relative to the stage's first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ckpt import ArrayKey, ArrayLayout, Box, Files, Plan, plan_arrays
from ckpt.format import encode_document, itemsize
from ckpt.gather import rounds
from ckpt.parts import array_record
from ckpt.plan import ArrayPlan, ChunkPlan
from parallel.degrees import Ranks
from uni3d.estimate.gpt import GPTShape, Link
from uni3d.estimate.job import cut_stages

DTYPE = "float32"
STATES = ("fp32", "exp_avg", "exp_avg_sq")
"""States that a save with AdamW writes."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of a planned save; sizes in bytes."""

    parameters: int
    arrays: int
    chunks: int
    files: int
    """Number of files with data."""
    documents: int
    """Number of other files: the `zarr.json` of arrays, atoms and groups, the manifest with its parts,
    `zero_to_fp32.py`."""
    written: list[int]
    """Bytes of elements that each rank writes."""
    stored: list[int]
    """Bytes in files by rank: chunks with their checksums and with padding, and indices."""
    snapshot: list[int]
    """Bytes that each rank copies for an asynchronous save: all that it writes or sends."""
    sent: int
    """Bytes sent between ranks to gather small and ragged arrays."""
    exchanges: int
    """Number of collectives over all ranks for that."""
    largest_received: int
    """Most bytes that a rank receives in one collective, and holds in addition to its own."""
    manifest: int
    """Estimated size of the manifest and its parts, without the user's `client_state`."""

    @property
    def balance(self) -> float:
        """Bytes written by the busiest rank, divided by the mean."""
        return max(self.written) * len(self.written) / sum(self.written)

    def save_seconds(self, bandwidth: float, ranks_per_node: int, file_rate: float) -> float:
        """Return the time to make all files, to write the slowest node's bytes and then the manifest.

        `bandwidth` is in bytes per second and node, `file_rate` in files per second.
        """
        nodes = range(0, len(self.stored), ranks_per_node)
        slowest = max(sum(self.stored[first : first + ranks_per_node]) for first in nodes)
        return (self.files + self.documents) / file_rate + (slowest + self.manifest) / bandwidth

    def stall_seconds(self, bandwidth: float) -> float:
        """Return the time of the rank that copies most, at `bandwidth` bytes per second and rank."""
        return max(self.snapshot) / bandwidth


def on_paper(
    shape: GPTShape, ranks: Ranks, states: Sequence[str] = STATES, files: Files = "array"
) -> Figures:
    """Plan a save of the model by these ranks. `files` says what a file holds.

    Raises:
        ValueError: the model can't be split over them.
    """
    shape.check_tensor_parallel(ranks.tp)
    stages = [stage.links for stage in cut_stages(shape, ranks.pp)]
    known: dict[Any, _Tally] = {}
    tallies = []
    for stage, links in enumerate(stages):
        kind = tuple(link.weights for link in links)
        if kind not in known:
            members = range(stage * ranks.of_a_stage, (stage + 1) * ranks.of_a_stage)
            layout = stage_layout(links, ranks, stage, states)
            known[kind] = _tally(plan_arrays(layout, members, files=files))
        tallies.append(known[kind])
    named = [(link, weight) for links in stages for link in links for weight in link.weights]
    atoms = [f"{link.name}.{weight.name}" for link, weight in named if not weight.same_as]
    return Figures(
        parameters=shape.parameters,
        arrays=len(atoms) * len(states),
        chunks=sum(t.chunks for t in tallies),
        files=sum(t.files for t in tallies),
        documents=len(atoms) * (len(states) + 1)
        + len(("atoms", "root", "manifest.json", "zero_to_fp32.py"))
        + len(stages),
        written=[n for t in tallies for n in t.written.values()],
        stored=[n for t in tallies for n in t.stored.values()],
        snapshot=[n for t in tallies for n in t.snapshot.values()],
        sent=sum(t.sent for t in tallies),
        exchanges=max(len(t.received) for t in tallies),
        largest_received=max((n for t in tallies for n in t.received), default=0),
        manifest=_manifest_of(atoms, states) + sum(t.records for t in tallies),
    )


# --- parts of each rank --------------------------------------------------------------------------------


def stage_layout(
    links: Iterable[Link], ranks: Ranks, stage: int, states: Sequence[str] = STATES
) -> list[ArrayLayout]:
    """Return the arrays of a pipeline stage, with the box of each of its ranks."""
    boxes: dict[Any, dict[int, Box]] = {}
    arrays = []
    for link in links:
        for weight in (weight for weight in link.weights if not weight.same_as):
            alike = (weight.shape, weight.tp_dim)
            if alike not in boxes:
                first = stage * ranks.of_a_stage
                parts = part_boxes(*alike, dp=ranks.dp, tp=ranks.tp, shards=ranks.shards())
                boxes[alike] = {first + i: box for i, box in enumerate(parts)}
            fine_dim = 1 if weight.tp_dim == 1 else None
            for state in states:
                key = ArrayKey(f"{link.name}.{weight.name}", state)
                arrays.append(ArrayLayout(key, DTYPE, weight.shape, boxes[alike], fine_dim))
    return arrays


def part_boxes(shape: tuple[int, ...], tp_dim: int | None, *, dp: int, tp: int, shards: int) -> list[Box]:
    """Return the part of a tensor on each rank of a stage, with tensor-parallel ranks side by side.

    The tensor is cut by `tp` along `tp_dim`, if that isn't None, and then along the first dim by `shards`,
    which divides dp. A tensor without dims is whole on every rank.
    """
    boxes = []
    for d in range(dp):
        for t in range(tp):
            spans = [(0, n) for n in shape]
            if tp_dim is not None:
                spans[tp_dim] = _part(spans[tp_dim], tp, t)
            if spans:
                spans[0] = _part(spans[0], shards, d % shards)
            offset, length = tuple(o for o, _ in spans), tuple(n for _, n in spans)
            boxes.append(Box(offset if prod(length) else (0,) * len(length), length))
    return boxes


def _part(span: tuple[int, int], parts: int, i: int) -> tuple[int, int]:
    """Return part `i` of a span `(offset, length)` cut like `torch.chunk`: the last may be empty."""
    offset, length = span
    size = -(-length // parts)
    begin = min(i * size, length)
    return offset + begin, min(size, length - begin)


# --- figures -------------------------------------------------------------------------------------------


class _Tally(NamedTuple):
    """Figures of one stage."""

    written: dict[int, int]
    stored: dict[int, int]
    snapshot: dict[int, int]
    chunks: int
    files: int
    records: int
    sent: int
    received: list[int]
    """Most bytes that a rank receives, in each exchange."""


def _tally(plan: Plan) -> _Tally:
    written, stored, snapshot = (dict.fromkeys(plan.ranks, 0) for _ in range(3))
    chunks = files = records = sent = 0
    for array, n in _alike(plan, lambda array: array.chunk_plan):
        grid, size = array.grid, itemsize(array.dtype)
        chunks += n * len(array.chunk_plan.chunks)
        files += n * sum(1 for _ in grid.files())
        sums = np.zeros(len(array.chunk_plan.chunks), np.uint32)
        records += n * len(encode_document(array_record(array.dtype, grid, sums)))
        for rank, mine in array.chunk_plan.by_writer.items():
            written[rank] += n * sum(chunk.box.size for chunk in mine) * size
        for rank, nbytes in _stored(array.chunk_plan):
            stored[rank] += n * nbytes
    for array, n in _alike(plan, lambda array: array.chunk_plan.sources or array.chunk_plan):
        for rank, box in array.chunk_plan.parts.items():
            snapshot[rank] += n * box.size * itemsize(array.dtype)
    received = []
    for batch in rounds(plan):
        arriving: dict[int, int] = defaultdict(int)
        for array, chunk, sources in batch:
            size = itemsize(array.dtype)
            arriving[chunk.writer] += chunk.box.size * size
            pieces = sources.of_chunk(chunk.box)
            sent += sum(box.size for source, box in pieces if source != chunk.writer) * size
        received.append(max(arriving.values()))
    return _Tally(written, stored, snapshot, chunks, files, records, sent, received)


def _stored(chunk_plan: ChunkPlan) -> Iterator[tuple[int, int]]:
    """Yield the writer and the bytes of each chunk in its file, with the index for a file's last chunk."""
    grid = chunk_plan.grid
    for file, _ in grid.files():
        places = [grid.place(index)[1] for index in grid.chunks(file)] + [grid.index_offset(file)]
        sizes = [end - begin for begin, end in pairwise(places)]
        sizes[-1] += grid.file_bytes(file) - places[-1]
        numbers = [grid.number(index) for index in grid.chunks(file)]
        yield from zip(chunk_plan.writers[numbers].tolist(), sizes, strict=True)


def _alike(plan: Plan, part: Callable[[ArrayPlan], object]) -> Iterable[tuple[ArrayPlan, int]]:
    """Return one array of each kind and their number. Equal arrays share one object as this part."""
    kinds: dict[int, list[ArrayPlan]] = defaultdict(list)
    for array in plan.arrays:
        kinds[id(part(array))].append(array)
    return [(arrays[0], len(arrays)) for arrays in kinds.values()]


def _manifest_of(atoms: Sequence[str], states: Sequence[str]) -> int:
    """Estimate the bytes of the manifest and its parts without the arrays' records."""
    size = 2900  # versions, topology, counters, hyperparameters, a schedule, the model's own description
    for atom in atoms:
        size += len(f'"{atom}":{{"requires_grad":true}},"{atom}",')
        size += len(f'"{atom}":{{"step":1000.0}},') * (len(states) > 1)
        size += 2 * len(f'"{atom}":[],')
        size += sum(len(f'"{state}","{state}":,') for state in states)
    return size
