"""Universal checkpoints: one zarr array ("atom") per tensor, in its own logical shape.

A checkpoint says nothing about the ranks that wrote it, so any number of ranks, split in any way, reads
the boxes that it needs. Chunks are plain bytes with a crc32c behind them; `manifest.json` is written last
and names every object with its checksum; nothing is pickled. `docs/format.md` is the specification.

    save(run, tag, shards, layout=..., comm=...)   every rank writes the chunks it was planned to write
    open_checkpoint(run, tag=None)                 -> Checkpoint: atoms by name, read whole or by box
    load(checkpoint, targets, comm=...)            fill existing arrays, after all ranks agreed on the report
    export_safetensors(checkpoint, path)           one fp32 state_dict file, streamed

This package speaks numpy and boxes. It knows neither what a rank means nor what is trained, and it
imports no torch.
"""

from ckpt.box import Box
from ckpt.comm import Comm, Solo, raise_together
from ckpt.commit import committed_tags, read_latest
from ckpt.errors import CheckpointError, PartialLoadError
from ckpt.export import export_safetensors, weights
from ckpt.format import check_json
from ckpt.load import LoadReport, load
from ckpt.plan import ArrayKey, ShardSpec, make_plan
from ckpt.read import Checkpoint, open_checkpoint
from ckpt.save import Shard, save

__all__ = [
    "ArrayKey",
    "Box",
    "Checkpoint",
    "CheckpointError",
    "Comm",
    "LoadReport",
    "PartialLoadError",
    "Shard",
    "ShardSpec",
    "Solo",
    "check_json",
    "committed_tags",
    "export_safetensors",
    "load",
    "make_plan",
    "open_checkpoint",
    "raise_together",
    "read_latest",
    "save",
    "weights",
]
