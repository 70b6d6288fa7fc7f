"""Writing a checkpoint: agree, write, agree, commit.

Each rank writes the chunks that the plan gave it, straight from the memory they lie in. Ragged and small
arrays are first gathered to their writers in a few flat exchanges. Then all ranks agree that everything is on
the disk, and rank 0 adds the metadata, the manifest last, and commits. If anything fails, on whichever rank
and in whichever phase, every rank raises the same error, nothing is committed, and no rank is left waiting.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from ckpt import gather
from ckpt.begin import Wish, begin
from ckpt.comm import Comm, Seen, agreed, distinct, from_rank_0, merged, union
from ckpt.commit import SaveReport, commit, record
from ckpt.errors import CheckpointError
from ckpt.format import DTYPES, Json, check_json, check_same_tag, numpy_dtype
from ckpt.plan import ArrayPlan, Plan
from ckpt.shards import ArrayKey, Shard, UnreadShard
from ckpt.stores import Store, open_store
from ckpt.tags import KEEP_ALL, Retention
from ckpt.write import Write, Writer

NO_FILES: Mapping[str, bytes] = MappingProxyType({})

Held = Mapping[ArrayKey, Shard | UnreadShard]


def save(
    run: str | Path,
    tag: str,
    shards: Sequence[Shard | UnreadShard],
    *,
    plan: Plan,
    comm: Comm,
    document: Json,
    files: Mapping[str, bytes] = NO_FILES,
    durable: bool = True,
    update_latest: bool = True,
    incremental: bool = True,
    retention: Retention = KEEP_ALL,
    threads: int | None = None,
) -> SaveReport:
    """Write and commit checkpoint `tag` of the run at `run`, a folder or any fsspec URL. Collective.

    Args:
        shards: at least the parts in `plan.parts(comm.rank)`.
        document: the manifest's content besides the arrays; rank 0's is written. Its `run_id`, if there is
            one, protects the checkpoints of other runs from being replaced or deleted.
        files: name -> content of further files in the checkpoint's folder; rank 0's are written.
        durable: sync every file and folder to the disk before the commit. A save that replaces a durable
            checkpoint always does, as a power cut could lose both else.
        incremental: hard-link files that are byte for byte those of the latest checkpoint, if the store can.
        retention: checkpoints to keep; the others are deleted after the commit, if `latest` is updated.

    A committed tag stays readable until its replacement is committed. Stores that can't replace it in one
    step (all but file systems) refuse to. While another process writes into the run, a save is refused.

    Raises:
        CheckpointError: the same on all ranks. The checkpoint then doesn't exist, and an older one of the
            same tag is untouched; or the message says that it is committed, but that `latest` could not be
            updated. Leftovers and older checkpoints that can't be removed are reported once, by the log.
    """
    held = {shard.spec.key: shard for shard in shards}
    rounds = list(gather.rounds(plan))
    most = _check_arguments(comm, tag, held, plan, document, len(rounds))
    if retention.keep_last is not None and not durable:
        raise CheckpointError(
            "a save that isn't durable can't delete older checkpoints; save with durable=True"
        )
    store, run_id = agreed(comm, lambda: _open(run, plan)), document.get("run_id")
    asked = Wish(tag, uuid.uuid4().hex, run_id, durable=durable, update_latest=update_latest)
    try:
        begun = from_rank_0(comm, lambda: begin(store, asked, incremental=incremental))
        agreed(comm, lambda: _check_same_folder(store, tag, begun.token))
        writer = Writer(store, tag, plan, comm.rank, begun=begun, threads=threads)
        _write_own(writer, plan, held, comm, incremental=begun.base is not None)
        _write_gathered(rounds, most, writer, held, comm)
        if begun.durable:  # on every rank, as each machine has its own page cache
            agreed(comm, lambda: store.sync(tag, begun.token))
        everything = comm.gather(record(writer, plan, comm.rank))
        return from_rank_0(comm, lambda: commit(store, asked, begun, everything, document, files, retention))
    except CheckpointError:
        if comm.rank == 0:
            store.abandon(tag, asked.token)
        raise
    finally:
        store.release()  # rank 0's; the others have none


def _check_arguments(comm: Comm, tag: str, held: Held, plan: Plan, document: Json, rounds: int) -> int:
    """Check the ranks' arguments; return the most rounds of exchanges that any of them has. Collective."""
    checks = distinct(comm, lambda: (tag, _check(held, plan, comm.rank, document), rounds))
    check_same_tag([check[0] for check in checks])
    check_same_plans({check[1]: ranks for check, ranks in checks.items()})
    return max(check[2] for check in checks)


def _check(held: Held, plan: Plan, rank: int, document: Json) -> PlanId:
    """Check this rank's arguments; return what is compared with the others' plans."""
    check_json(document, "the checkpoint's document")
    for array in plan.arrays:
        if array.dtype not in DTYPES:
            raise CheckpointError(
                f"{'/'.join(array.key)} has dtype {array.dtype}, which can't be stored; "
                f"use one of {', '.join(sorted(DTYPES))}"
            )
    for key, box in plan.parts(rank).items():
        shard = held.get(key)
        if shard is None or not box.within(shard.spec.box):
            raise CheckpointError(
                f"the plan expects {list(box.offset)}+{list(box.shape)} of {'/'.join(key)} from this rank, "
                "which doesn't hold it"
            )
        found = (shard.data.shape, shard.data.dtype)
        assert found == (shard.spec.box.shape, numpy_dtype(shard.spec.dtype)), f"{shard.spec} has {found}"
    assert rank in plan.ranks, f"rank {rank} has a plan of the ranks {plan.ranks}"
    return PlanId(plan.ranks[0], len(plan.ranks), plan.digest)


class PlanId(NamedTuple):
    """Identity of a plan, which ranks compare."""

    first: int
    """First rank of the plan."""
    size: int
    """Number of its ranks."""
    digest: str
    """Covers the ranks, each of which has checked that it is one of them."""


def check_same_plans(plans: Mapping[PlanId, Seen]) -> None:
    """Check that ranks that share arrays have the same plan for them, given the plans and their ranks."""
    for plan, ranks in plans.items():
        if ranks.times != plan.size:
            raise CheckpointError(
                f"rank {ranks.first} and a rank that shares its arrays have different plans for them; "
                "their models or optimizers differ"
            )


def _open(run: str | Path, plan: Plan) -> Store:
    """Open the store, and check that it can have the planned files."""
    store = open_store(run)
    if plan.files == "array" and len(plan.ranks) > 1 and not store.shares_files:
        raise CheckpointError(
            f"several ranks can't write one object of {store.where('')}; plan with files='writer'"
        )
    return store


def _check_same_folder(store: Store, tag: str, token: str) -> None:
    """Check that this rank sees the folder that rank 0 made.

    If each machine had a folder of its own, a checkpoint would be committed without the others' chunks.
    """
    if not store.begun(tag, token):
        raise CheckpointError(
            f"{store.where('')} is not the same folder as rank 0's; save to a shared file system"
        )


def _write_own(writer: Writer, plan: Plan, held: Held, comm: Comm, *, incremental: bool) -> None:
    """Write the chunks that this rank holds whole and the metadata of the arrays it owns. Collective."""
    writes = list(_in_place(plan, held, comm.rank))
    arrays = plan.arrays if plan.files == "array" else ()  # else each file has one writer, who decides
    alone = [array for array in arrays if array.chunk_plan.sources is None]  # no chunk comes from others
    shared = {array.key: array for array in alone if len(array.chunk_plan.by_writer) > 1}
    linked = _agree_unchanged(writer, shared, writes, comm) if incremental else set()

    def work() -> None:
        writer.link(shared[key] for key in linked if shared[key].owner == comm.rank)
        writer.write_chunks(writes, linked)
        writer.write_documents()

    agreed(comm, work)


def _agree_unchanged(
    writer: Writer, shared: Mapping[ArrayKey, ArrayPlan], writes: list[Write], comm: Comm
) -> set[ArrayKey]:
    """Return the arrays with several writers that are the base's, which all their writers found. Collective.

    Most arrays of most saves have changed, so the owner of each looks at one page first.
    """
    mine = [w for w in writes if w.plan.key in shared and w.plan.owner == comm.rank]
    likely = merged(comm, lambda: set(writer.unchanged(mine, None)), union)
    if not likely:
        return set()
    ours = [w for w in writes if w.plan.key in shared]
    found = merged(comm, lambda: Counter(writer.unchanged(ours, likely)), _added)
    return {key for key in likely & shared.keys() if found[key] == len(shared[key].chunk_plan.by_writer)}


def _added(parts: list[Counter[ArrayKey]]) -> Counter[ArrayKey]:
    found: Counter[ArrayKey] = Counter()
    for part in parts:
        found.update(part)
    return found


def _in_place(plan: Plan, held: Held, rank: int) -> Iterator[Write]:
    for array in plan.arrays:
        sources = array.chunk_plan.sources
        for chunk in array.chunk_plan.by_writer.get(rank, ()):
            if sources and not (plan.files == "array" and sources.has_whole(rank, chunk.box)):
                continue
            shard = held[array.key]
            part = chunk.box.relative_to(shard.spec.box).slices
            if isinstance(shard, Shard):
                yield Write(array, chunk, shard.data[part])
            else:
                yield Write(array, chunk, partial(shard.data.__getitem__, part))


def _write_gathered(
    rounds: list[list[gather.Gathering]], most: int, writer: Writer, held: Held, comm: Comm
) -> None:
    """Gather chunks to their writers and write them. Collective.

    Plans may differ between pipeline stages, but an exchange is collective: every rank takes part in `most`
    rounds, as many as any plan has.
    """
    for i in range(most):
        batch = rounds[i] if i < len(rounds) else []
        pieces = agreed(comm, lambda batch=batch: gather.outgoing(batch, held, comm.rank))  # type: ignore[misc]
        received = comm.exchange(pieces)
        writes = gather.arrived(batch, received, comm.rank)
        agreed(comm, lambda writes=writes: writer.write_chunks(writes))  # type: ignore[misc]
