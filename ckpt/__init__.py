"""Universal checkpoints: one zarr array ("atom") per tensor, in its own logical shape.

A checkpoint says nothing about the ranks that wrote it, so any number of ranks, split in any way, reads
the boxes that it needs. Chunks are plain bytes with a crc32c behind them; `manifest.json` is written last
and names every object with its checksum; nothing is pickled. `docs/format.md` is the specification.

    make_plan(layout)                              who writes what, a pure function of what each rank holds
    save(run, tag, shards, plan=..., comm=...)     every rank writes the chunks it was planned to write,
                                                   of arrays in memory, or read as they are written
    open_checkpoint(run, tag=None)                 -> Checkpoint: atoms by name, read whole or by box
    load(checkpoint, targets, comm=...)            fill existing arrays, after all ranks agreed on the report
    verify(checkpoint)                             read and check every object, and name what is wrong
    absent(checkpoint)                             which are missing or cut short, by their sizes alone
    export_safetensors(checkpoint, path)           one fp32 state_dict file, streamed
    compare(first, second), statistics(...)        what differs; what the numbers are like
    prune(run, retention)                          delete old checkpoints, each in one step

A run lies in a folder, or at any URL that fsspec knows.

This package speaks numpy and boxes. It knows neither what a rank means nor what is trained, and it
imports no torch.
"""

from ckpt.box import Box
from ckpt.comm import Comm, Solo, agreed, agreed_by_all, from_rank_0
from ckpt.compare import Difference, common_bytes, compare
from ckpt.errors import CheckpointError, PartialLoadError
from ckpt.export import export_safetensors, exported_bytes, weights
from ckpt.format import DTYPES, check_json, check_same_tag, check_tag, numpy_dtype
from ckpt.load import LoadReport, load
from ckpt.plan import ArrayLayout, Layout, Plan, make_plan, plan_arrays
from ckpt.read import Checkpoint, find_checkpoint, open_checkpoint
from ckpt.save import SaveReport, save
from ckpt.shards import ArrayKey, Shard, ShardSpec, UnreadShard
from ckpt.stats import Statistics, statistics
from ckpt.stores import open_store
from ckpt.tags import Retention, committed_tags, prune, read_latest
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
    "UnreadShard",
    "absent",
    "agreed",
    "agreed_by_all",
    "check_json",
    "check_same_tag",
    "check_tag",
    "committed_tags",
    "common_bytes",
    "compare",
    "export_safetensors",
    "exported_bytes",
    "extent",
    "find_checkpoint",
    "from_rank_0",
    "load",
    "make_plan",
    "numpy_dtype",
    "open_checkpoint",
    "open_store",
    "plan_arrays",
    "prune",
    "read_latest",
    "save",
    "statistics",
    "verify",
    "weights",
]
