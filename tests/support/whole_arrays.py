"""Checkpoints of a few whole arrays, saved by `ckpt` alone."""

from pathlib import Path
from typing import Any

import numpy as np

import ckpt


def save_whole(run: str | Path, tag: str, arrays: dict[tuple[str, str], np.ndarray], **document: Any) -> None:
    """Save arrays, given by atom and state, from one rank; `document` is the rest of the manifest."""
    shards = [
        ckpt.Shard(ckpt.ShardSpec(ckpt.ArrayKey(*key), str(x.dtype), x.shape, ckpt.Box.whole(x.shape)), x)
        for key, x in arrays.items()
    ]
    plan = ckpt.make_plan({0: [shard.spec for shard in shards]})
    ckpt.save(run, tag, shards, plan=plan, comm=ckpt.Solo(), document=document, durable=False)
