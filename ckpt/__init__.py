"""Universal checkpoints: one zarr array ("atom") per tensor, in its own logical shape.

A checkpoint doesn't depend on the ranks that wrote it: any number of ranks, split in any way, reads the boxes
that it needs. Chunks are plain bytes followed by a crc32c. `manifest.json` is written last and names every
object with its checksum. Nothing is pickled. `docs/format.md` is the specification.

    make_plan(layout)                            plan who writes what, a pure function of what each rank holds
    save(run, tag, shards, plan=..., comm=...)   write and commit a checkpoint, from arrays in memory or ones
                                                 that are read part by part
    open_checkpoint(run, tag=None)               open a Checkpoint: atoms by name, read whole or by box
    load(checkpoint, targets, comm=...)          fill existing arrays, after all ranks agreed on the report
    verify(checkpoint)                           read and check every object; list the problems
    absent(checkpoint)                           list missing and truncated objects, by their sizes alone
    export_safetensors(checkpoint, path)         write one fp32 state_dict file, streamed
    copy_arrays(checkpoint, fd, arrays)          write arrays into a file of another format, streamed
    compare(first, second), statistics(...)      list differences; summarize the numbers
    committed_tags(run), read_latest(run)        list the checkpoints of a run, oldest first; find the newest
    prune(run, retention), clean(run)            delete old checkpoints, each in one step; remove leftovers
    agreed(comm, work), distinct(...)            do work on the ranks of a Comm, and fail on all or on none

    box, chunking, array_files, plan, shards     who holds and who writes which part of an array, and where
    begin, gather, links, write, save, commit    writing
    read, load, verify, tags, order              reading, checking, listing and deleting
    bands, export, compare, stats                streaming over whole arrays
    format, parts, checksums, stores             documents, checksums, and the places where objects lie
    testing                                      the contract of such a place, as tests for one's own
    background                                   saves in a thread, for which readers of the process wait
    comm, threads, errors                        the rest

A run is a folder, or any URL that fsspec knows. This package knows numpy and boxes, but neither the meaning
of ranks nor training, and it imports no torch. The imports below are eager: `save`, `load` and `verify` are
also names of submodules, and importing one of these later would replace the function of that name.
"""

from ckpt.box import Box
from ckpt.comm import Comm, Solo, agreed, distinct, from_rank_0, merged, union
from ckpt.commit import SaveReport
from ckpt.compare import Difference, common_bytes, compare
from ckpt.errors import CheckpointError, PartialLoadError
from ckpt.export import copy_arrays, export_safetensors, exported_bytes, exported_type, weights
from ckpt.format import DTYPES, check_json, check_same_tag, check_tag, numpy_dtype, tag_text
from ckpt.load import LoadReport, load
from ckpt.plan import Layout, Plan, make_plan, plan_arrays
from ckpt.read import Checkpoint, find_checkpoint, open_checkpoint, open_together
from ckpt.save import save
from ckpt.shards import ArrayKey, ArrayLayout, Files, Shard, ShardSpec, UnfilledShard, UnreadShard
from ckpt.stats import Statistics, statistics
from ckpt.stores import check_run, files_for, open_store
from ckpt.tags import Retention, check_owner, clean, committed_tags, prune, read_latest
from ckpt.verify import Problem, absent, extent, verify

__all__ = [
    "DTYPES",
    "ArrayKey",
    "ArrayLayout",
    "Box",
    "Checkpoint",
    "CheckpointError",
    "Comm",
    "Difference",
    "Files",
    "Layout",
    "LoadReport",
    "PartialLoadError",
    "Plan",
    "Problem",
    "Retention",
    "SaveReport",
    "Shard",
    "ShardSpec",
    "Solo",
    "Statistics",
    "UnfilledShard",
    "UnreadShard",
    "absent",
    "agreed",
    "check_json",
    "check_owner",
    "check_run",
    "check_same_tag",
    "check_tag",
    "clean",
    "committed_tags",
    "common_bytes",
    "compare",
    "copy_arrays",
    "distinct",
    "export_safetensors",
    "exported_bytes",
    "exported_type",
    "extent",
    "files_for",
    "find_checkpoint",
    "from_rank_0",
    "load",
    "make_plan",
    "merged",
    "numpy_dtype",
    "open_checkpoint",
    "open_store",
    "open_together",
    "plan_arrays",
    "prune",
    "read_latest",
    "save",
    "statistics",
    "tag_text",
    "union",
    "verify",
    "weights",
]
