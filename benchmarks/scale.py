"""Measure what a checkpoint costs one rank at thousands of ranks: planning, agreement, commit, load, start.

    python benchmarks/scale.py [--only 70e9] [--ranks 1024]
    python benchmarks/scale.py --connections [--ranks 128]

No rank runs. The real code plans the save of a GPT with AdamW for the ranks of one pipeline stage, which is
all that a rank plans; puts together on "rank 0" what all ranks would send it; writes and reads the documents
of the checkpoint in memory; lists the chunks that one rank reads on half as many ranks; and draws the initial
weights of the rank that keeps most, from normal distributions. Each case runs in a process of its own. CPU
seconds, once, not a median: they are to show how costs grow.

With `--connections`: the ranks that one rank talks to, and would if a save's parts were sent directly; the
Python time of one agreement; and the open descriptors of ranks that are threads of one process and do talk.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from torch.distributed import HashStore

from ckpt import Plan, plan_arrays
from ckpt.comm import Seen, counted
from ckpt.commit import Planned, Record, described
from ckpt.format import encode_document
from ckpt.gather import rounds
from ckpt.parts import ArrayInfo, consolidated, decode_part, encode_part
from ckpt.read import pieces
from ckpt.save import PlanId, check_same_plans
from parallel import HostComm
from parallel.degrees import Ranks
from parallel.routes import Routes
from uni3d.estimate.gpt import GPTShape, derive
from uni3d.estimate.job import cut_stages
from uni3d.estimate.save import on_paper, part_boxes, stage_layout

T = TypeVar("T")

STAGES = {7e9: 1, 70e9: 8, 405e9: 16}
"""Parameters -> pipeline stages, with tp 8 and ZeRO 1."""
WORLDS = (64, 1024, 8192, 16384)
ONE_STAGE = (70e9, 1, 1024)
"""70B on 1,024 ranks of a single stage: the largest plan per rank."""

COLUMNS = {
    "plan": "first save: layout, plan, digest, parts (s)",
    "rounds": "in the background: which chunks are gathered when (s)",
    "agree": "agreeing on the plans: the busiest rank's Python (ms)",
    "commit": "rank 0: put together, encode (s)",
    "files": "files",
    "documents_mb": "manifest and its parts (MB)",
    "read_mb": "of it, read by a rank on a load (MB)",
    "load": "half the ranks: decode, list chunks (s)",
    "load_gb": "bytes read by a rank there (GB)",
    "wanted": "... of those that it wants",
    "peak_mb": "peak memory of the process (MB), up to here",
    "draw": "initial weights of the largest rank (s)",
    "kept": "... elements that it keeps (millions)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", type=float, help="number of parameters")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--connections", action="store_true")
    parser.add_argument("--case", nargs=3, type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case[0], int(args.case[1]), int(args.case[2]))))
        return
    if args.connections:
        show_connections(args.ranks or 128)
        return
    cases = [
        (size, stages, world) for size, stages in STAGES.items() for world in WORLDS if world >= 8 * stages
    ]
    for size, stages, world in [*cases, ONE_STAGE]:
        if args.only in (None, size) and args.ranks in (None, world):
            command = [sys.executable, __file__, "--case", str(size), str(stages), str(world)]
            row = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            print(f"\n{size / 1e9:.0f}B on {world:,} ranks: pp {stages}, dp {world // stages // 8}, tp 8")
            for key, what in COLUMNS.items():
                print(f"  {row[key]:>10,.3g}  {what}" if row[key] < 1000 else f"  {row[key]:>10,.0f}  {what}")


def measure(parameters: float, stages: int, world: int) -> dict[str, Any]:
    """Return one row of the table."""
    shape, ranks = derive(int(parameters)), Ranks(pp=stages, dp=world // stages // 8, tp=8, zero=1)
    plan, seconds = timed(lambda: plan_of(shape, ranks, 0))
    _, background = timed(lambda: sum(1 for _ in rounds(plan)))
    agree = agreement(world, ranks.of_a_stage)
    records = [record for stage in range(stages) for record in records_of(plan_of(shape, ranks, stage))]
    (parts, size), commit = timed(lambda: documents(records))
    whole = on_paper(shape, ranks)
    main_document = whole.manifest - sum(map(len, parts))
    half = Ranks(pp=stages, dp=max(1, ranks.dp // 2), tp=8, zero=1)
    (read, wanted), load = timed(lambda: read_by_a_rank(shape, half, parts[0]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    kept, draw = draw_a_rank(shape, ranks)
    return {
        "plan": seconds,
        "rounds": background,
        "agree": 1e3 * agree,
        "commit": commit,
        "files": whole.files + whole.documents,
        "documents_mb": (whole.manifest + size) / 1e6,
        "read_mb": (len(parts[0]) + main_document) / 1e6,
        "load": load,
        "load_gb": read / 1e9,
        "wanted": read / wanted,
        "peak_mb": peak,
        "draw": draw,
        "kept": kept / 1e6,
    }


def agreement(world: int, of_a_stage: int) -> float:
    """Return the CPU seconds of rank 0, the busiest, to agree on all ranks' plans, without sending them."""
    routes = Routes(0, world)
    plans = [PlanId(rank - rank % of_a_stage, of_a_stage, "0" * 32) for rank in range(world)]

    def outcome(first: int, end: int) -> bytes:
        found: dict[PlanId, Seen] = {}
        for rank in range(first, end):
            seen = found.setdefault(plans[rank], Seen(rank, 0))
            found[plans[rank]] = Seen(seen.first, seen.times + 1)
        return pickle.dumps(found)

    bounds = [0, *(routes.children or []), world]
    told = [outcome(first, end) for first, end in pairwise(bounds)]

    def agree() -> None:
        whole = pickle.dumps(counted([pickle.loads(part) for part in told]))  # what the children sent
        check_same_plans(pickle.loads(whole))

    return timed(agree)[1]


def show_connections(threads: int) -> None:
    print("connections of the busiest rank: of HostComm, and for a save's parts if each went to its writer")
    for size, stages, world in [(7e9, 1, 1024), (70e9, 1, 1024), (70e9, 8, 1024), (70e9, 8, 16384)]:
        ranks = Ranks(pp=stages, dp=world // stages // 8, tp=8, zero=1)
        direct = direct_peers(plan_of(derive(int(size)), ranks, 0))
        few = max(len(connected(rank, world)) for rank in range(0, world, 1 + world // 1024))
        agree = 1e3 * agreement(world, ranks.of_a_stage)
        place = f"({ranks.pp}, {ranks.dp}, {ranks.tp})"
        print(f"  {size / 1e9:.0f}B {place}: {few}, {direct}; one agreement, without I/O: {agree:.2f} ms")
    opened, most = open_descriptors(threads)
    print(f"{threads} threads as ranks: {opened:.1f} open descriptors each, with {most:.1f} connections")


def connected(rank: int, world: int) -> set[int]:
    return {peer for peers in Routes(rank, world).peers for peer in peers}


def direct_peers(plan: Plan) -> int:
    """Return the largest number of ranks with which one rank would exchange parts."""
    peers: dict[int, set[int]] = {rank: set() for rank in plan.ranks}
    for array, chunk, sources in (gathering for batch in rounds(plan) for gathering in batch):
        assert array.chunk_plan.sources is sources
        for source, _ in sources.of_chunk(chunk.box):
            peers[source].add(chunk.writer)
            peers[chunk.writer].add(source)
    return max(len(found - {rank}) for rank, found in peers.items())


def open_descriptors(size: int) -> tuple[float, float]:
    """Connect `size` threads as ranks; return the descriptors and the connections of a rank, on average."""
    before, store, comms = len(os.listdir("/proc/self/fd")), HashStore(), []

    def one(rank: int) -> None:
        comm = HostComm.of(store, rank, size)
        comm.exchange({peer: np.ones(100, np.uint8) for peer in range(size)})
        comms.append(comm)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    opened = len(os.listdir("/proc/self/fd")) - before
    return opened / size, sum(len(connected(rank, size)) for rank in range(size)) / size


def plan_of(shape: GPTShape, ranks: Ranks, stage: int) -> Plan:
    """Plan a stage's save, with everything of the plan that a rank uses while training waits."""
    links = cut_stages(shape, ranks.pp)[stage].links
    first = stage * ranks.of_a_stage
    plan = plan_arrays(stage_layout(links, ranks, stage), range(first, first + ranks.of_a_stage))
    _ = plan.digest, plan.parts(first)  # computed when they are first used
    return plan


def records_of(plan: Plan) -> list[Record]:
    """Return what each rank of a plan tells rank 0."""
    counts = dict.fromkeys(plan.ranks, 0)
    for array in plan.arrays:
        for rank, chunks in array.chunk_plan.by_writer.items():
            counts[rank] += len(chunks)
    arrays = [Planned(a.key, a.dtype, a.grid, a.chunk_plan.writers) for a in plan.arrays]
    return [
        Record(np.zeros(counts[rank], np.uint32), 0, 0, arrays if rank == plan.ranks[0] else None)
        for rank in plan.ranks
    ]


def documents(records: list[Record]) -> tuple[list[bytes], int]:
    """Return the parts of the manifest, and the size of the consolidated `zarr.json`."""
    groups = described(records)
    return [encode_part(group) for group in groups], len(encode_document(consolidated(groups)))


def read_by_a_rank(shape: GPTShape, ranks: Ranks, part: bytes) -> tuple[int, int]:
    """Return the bytes that the first rank of the first stage reads, and those that it wants."""
    listed = {atom: list(states) for atom, states in json.loads(part).items()}
    arrays: dict[str, list[ArrayInfo]] = {}
    for key, info in decode_part(part, "the part", listed).items():
        arrays.setdefault(key.atom, []).append(info)
    read = wanted = 0
    for link in cut_stages(shape, ranks.pp)[0].links:
        for weight in (weight for weight in link.weights if not weight.same_as):
            degrees = {"dp": ranks.dp, "tp": ranks.tp, "shards": ranks.shards()}
            box = part_boxes(weight.shape, weight.tp_dim, **degrees)[0]
            for info in arrays[f"{link.name}.{weight.name}"]:
                read += sum(1 for _ in pieces(info, box)) * info.grid.payload
                wanted += box.size * info.grid.itemsize
    return read, wanted


def draw_a_rank(shape: GPTShape, ranks: Ranks) -> tuple[int, float]:
    """Draw what the first rank of the largest stage keeps; return the number of elements and the seconds."""
    import torch  # here, as it would count in the memory of what comes before

    from parallel.dtensor_layout import LocalPart
    from parallel.initial_weights import draw
    from parallel.recorded_init import record

    torch.set_num_threads(1)
    degrees = {"dp": ranks.dp, "tp": ranks.tp, "shards": ranks.shards()}
    stages = [
        {
            f"{link.name}.{weight.name}": (
                weight.shape,
                part_boxes(weight.shape, weight.tp_dim, **degrees)[0],
            )
            for link in stage.links
            for weight in link.weights
        }
        for stage in cut_stages(shape, ranks.pp)
    ]
    largest = max(stages, key=lambda stage: sum(box.size for _, box in stage.values()))

    def init_parameter(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0.0, 0.02, generator=generator)

    def draw_all() -> int:
        for name, (whole, box) in largest.items():
            operations = record(init_parameter, name, whole, torch.float32, torch.Generator())
            assert operations is not None
            draw(LocalPart(torch.empty(box.shape), whole, box.offset), operations, 0, name)
        return sum(box.size for _, box in largest.values())

    return timed(draw_all)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Return the result and the CPU seconds."""
    begin = time.process_time()
    result = work()
    return result, time.process_time() - begin


if __name__ == "__main__":
    main()
