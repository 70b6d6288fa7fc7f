"""A checkpoint's plan on paper: what a save would write, and where, without ranks, tensors or torch.

Each rank's part of each tensor follows from the rules by which training cuts them (`parallel`): pipeline
stages as even as can be, tensor parallelism along the dim that a weight's style says, then ZeRO along the
first dim, each time into parts of `ceil(n / k)` as `torch.chunk` has them. The parts go to the planner of
every save, `ckpt.plan_arrays`. Stages that hold the same tensors, in the same order, are planned once: the
planner sees names only by their order, and ranks only by their number less the stage's first.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ckpt import ArrayKey, ArrayLayout, Box, Plan, plan_arrays
from ckpt.box import around
from ckpt.checksums import block_bytes
from ckpt.format import ZARR, array_path, atom_path, chunk_key, itemsize
from ckpt.gather import Gathering, rounds
from ckpt.plan import ArrayPlan
from parallel.degrees import Ranks
from parallel.placement import balanced_cuts, check_layers
from uni3d.estimate.gpt import GPTShape, Link

DTYPE = "float32"
STATES = ("fp32", "exp_avg", "exp_avg_sq")
"""AdamW's."""

CHECKSUM_BYTES = 4
"""At the end of each chunk's file."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a save of a model on these ranks comes to; sizes in bytes."""

    parameters: int
    arrays: int
    chunks: int
    """Files with data."""
    documents: int
    """All other files: a `zarr.json` of each array, atom and group, the manifest, `zero_to_fp32.py`."""
    written: list[int]
    """Elements that each rank writes, in bytes, the plan's balance."""
    stored: list[int]
    """Files that each rank writes: with checksums, and chunks at an array's end filled up to their size."""
    snapshot: list[int]
    """What each rank copies for an asynchronous save: all that it writes or sends."""
    sent: int
    """Between ranks, to gather small and ragged arrays."""
    exchanges: int
    """Collectives over all ranks in which that is done."""
    largest_received: int
    """The most that a rank gets in one of them, and holds in memory beside its own."""
    manifest: int
    """Estimated, without the user's `client_state`."""

    @property
    def balance(self) -> float:
        """What the rank with most to write has, in terms of the mean."""
        return max(self.written) * len(self.written) / sum(self.written)

    def save_seconds(self, bandwidth: float, ranks_per_node: int) -> float:
        """Of the files of the slowest node at `bandwidth` bytes per second and node, then the manifest."""
        nodes = range(0, len(self.stored), ranks_per_node)
        slowest = max(sum(self.stored[first : first + ranks_per_node]) for first in nodes)
        return (slowest + self.manifest) / bandwidth

    def stall_seconds(self, bandwidth: float) -> float:
        """Of the rank that copies most, at `bandwidth` bytes per second and rank."""
        return max(self.snapshot) / bandwidth


def on_paper(shape: GPTShape, ranks: Ranks, states: Sequence[str] = STATES) -> Figures:
    """Plan a save of the model by these ranks.

    Raises:
        ValueError: the model can't be split over them.
    """
    shape.check_tensor_parallel(ranks.tp)
    stages = cut_stages(shape, ranks.pp)
    known: dict[Any, _Tally] = {}
    tallies = []
    for stage, links in enumerate(stages):
        kind = tuple(link.weights for link in links)
        if kind not in known:
            members = range(stage * ranks.of_a_stage, (stage + 1) * ranks.of_a_stage)
            known[kind] = _tally(plan_arrays(stage_layout(links, ranks, stage, states), members))
        tallies.append(known[kind])
    named = [(link, weight) for links in stages for link in links for weight in link.weights]
    atoms = [f"{link.name}.{weight.name}" for link, weight in named if not weight.same_as]
    return Figures(
        parameters=shape.parameters,
        arrays=len(atoms) * len(states),
        chunks=sum(t.chunks for t in tallies),
        documents=len(atoms) * (len(states) + 1) + len(("atoms", "root", "manifest.json", "zero_to_fp32.py")),
        written=[n for t in tallies for n in t.written.values()],
        stored=[n for t in tallies for n in t.stored.values()],
        snapshot=[n for t in tallies for n in t.snapshot.values()],
        sent=sum(t.sent for t in tallies),
        exchanges=max(t.exchanges for t in tallies),
        largest_received=max(t.largest_received for t in tallies),
        manifest=_manifest_of(atoms, states) + sum(t.records for t in tallies),
    )


# --- what each rank holds ------------------------------------------------------------------------------


def cut_stages(shape: GPTShape, pp: int) -> list[list[Link]]:
    """Return the links of each pipeline stage.

    Raises:
        ValueError: there are fewer links than stages.
    """
    links = shape.links
    check_layers(len(links), pp)
    return [list(links[a:b]) for a, b in balanced_cuts([link.cost for link in links], pp)]


def stage_layout(
    links: Iterable[Link], ranks: Ranks, stage: int, states: Sequence[str] = STATES
) -> list[ArrayLayout]:
    """What each rank of a pipeline stage holds of its arrays."""
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
    """Parts of a tensor by rank of a stage, data-parallel ranks apart and tensor-parallel ones side by side.

    It is cut by `tp` along `tp_dim`, if that isn't None, and then along the first dim by `shards`, which
    divides dp. A tensor without dims is whole everywhere.
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
    """Part `i` of a span `(offset, length)` as `torch.chunk` cuts it; the last ones may be short or empty."""
    offset, length = span
    size = -(-length // parts)
    begin = min(i * size, length)
    return offset + begin, min(size, length - begin)


# --- what it comes to ----------------------------------------------------------------------------------


@dataclass
class _Tally:
    """The figures of one stage."""

    written: dict[int, int]
    stored: dict[int, int]
    snapshot: dict[int, int]
    chunks: int = 0
    sent: int = 0
    exchanges: int = 0
    largest_received: int = 0
    records: int = 0


def _tally(plan: Plan) -> _Tally:
    zeros = dict.fromkeys(plan.ranks, 0)
    tally = _Tally(zeros, dict(zeros), dict(zeros))
    alike: dict[int, list[ArrayPlan]] = defaultdict(list)  # the planner shares what is the same
    for array in plan.arrays:
        alike[id(array.chunks)].append(array)
    for arrays in alike.values():
        _add_chunks(tally, arrays[0], len(arrays))
    alike.clear()
    for array in plan.arrays:
        alike[id(array.sources or array.chunks)].append(array)
    for arrays in alike.values():
        brought = _brought(arrays[0])
        for rank, nbytes in brought.items():
            tally.snapshot[rank] += len(arrays) * nbytes
    for batch in rounds(plan):
        _add_exchange(tally, batch)
    return tally


def _add_exchange(tally: _Tally, batch: Sequence[Gathering]) -> None:
    received: dict[int, int] = defaultdict(int)
    for array, chunk, pieces in batch:
        size = itemsize(array.dtype)
        received[chunk.writer] += chunk.box.size * size
        tally.sent += sum(box.size for source, box in pieces if source != chunk.writer) * size
    tally.exchanges += 1
    tally.largest_received = max(tally.largest_received, *received.values())


def _add_chunks(tally: _Tally, array: ArrayPlan, n: int) -> None:
    """Count `n` arrays that have these chunks."""
    size, filled = itemsize(array.dtype), prod(array.chunk_shape) * itemsize(array.dtype)
    tally.chunks += n * len(array.chunks)
    tally.records += n * len(array.chunks) * len(f'"":{_record(filled)},')
    for chunk in array.chunks:
        tally.written[chunk.writer] += n * chunk.box.size * size
        tally.stored[chunk.writer] += n * (filled + CHECKSUM_BYTES)
        tally.records += n * len(chunk_key(chunk.index))


def _brought(array: ArrayPlan) -> dict[int, int]:
    """`Plan.parts` of all ranks, in bytes."""
    boxes: dict[int, list[Box]] = defaultdict(list)
    for rank, box in array.sources or ((chunk.writer, chunk.box) for chunk in array.chunks):
        boxes[rank].append(box)
    size = itemsize(array.dtype)
    return {r: (around(b) if len(b) > 1 else b[0]).size * size for r, b in boxes.items()}


def _record(chunk_bytes: int) -> str:
    """What the manifest says of a chunk (`ckpt.checksums`), but for the values of its checksums."""
    block = block_bytes(chunk_bytes)
    record: dict[str, Any] = {"size": chunk_bytes + CHECKSUM_BYTES, "crc32c": "0" * 8}
    if chunk_bytes > block:
        record |= {"block": block, "running": "0" * 8 * -(-chunk_bytes // block)}
    return json.dumps(record, separators=(",", ":"))


def _manifest_of(atoms: Sequence[str], states: Sequence[str]) -> int:
    """About how many bytes the manifest has beside what it says of chunks."""
    size = 2450  # versions, topology, counters, hyperparameters, a schedule, what the model says of itself
    document = len(f'"/{ZARR}": {{"size":350,"crc32c":"{"0" * 8}"}},')
    for atom in atoms:
        size += len(f'"{atom}":{{"requires_grad":true}},"{atom}",')
        size += len(f'"{atom}":{{"step":1000.0}},') * (len(states) > 1)
        size += len(atom_path(atom)) + document
        for state in states:
            size += 2 * len(array_path(atom, state)) + document + len('"":{},')
    return size
