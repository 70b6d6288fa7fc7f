"""The resharding that a Hugging Face model's checkpoint describes equals the shards of real ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks

sys.path.insert(0, str(Path(__file__).parent))  # on the ranks

import hf_models

import ckpt
import parallel
from uni3d.estimate.saved import SavedModel
from uni3d.manifest import RunManifest
from uni3d.state import Inventory


def case(kind: str, zero: int, run: str) -> list[Any]:
    engine = hf_models.make_engine(hf_models.make(kind), zero, dp=2, tp=2)
    hf_models.train(engine, kind)
    engine.save_checkpoint(run)
    engine.wait_for_checkpoint()
    arrays = Inventory(engine.model).arrays(engine.optimizer)
    return sorted((tuple(spec.key), tuple(spec.box)) for spec, _, _ in arrays)


@pytest.mark.parametrize(("kind", "zero"), [("llama", 3), ("qwen3", 0), ("mixtral", 1)])
def test_boxes_are_those_of_real_ranks(hf_ranks: Ranks, tmp_path: Path, kind: str, zero: int) -> None:
    found = hf_ranks.run(4, case, kind, zero, str(tmp_path))
    checkpoint = ckpt.open_checkpoint(tmp_path)
    source = SavedModel(checkpoint.arrays, RunManifest.of(checkpoint))
    assert source.refuses_tp(2) is None
    assert "heads of model.layers.0.self_attn" in (source.refuses_tp(3) or "")
    assert source.refuses_pp(2) is not None
    ranks = parallel.Ranks(pp=1, dp=2, tp=2, zero=zero)
    told: list[list[Any]] = [[] for _ in range(4)]
    for part in source.by_pipeline_rank(1)[0]:
        for rank, box in enumerate(part.boxes(ranks, ranks.shards())):
            told[rank].append((tuple(part.info.key), tuple(box)))
    assert found == [sorted(boxes) for boxes in told]
    assert any(part.tp_dim is not None for part in source.by_pipeline_rank(1)[0])
