"""What a checkpoint says each rank of a topology would hold and read is what real ranks hold and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from resharding_cases import MODELS, Place, held_case, save_case

import ckpt
from uni3d.doctor_memory import Precision, needs
from uni3d.planned_reads import reads
from uni3d.resharding import Source

PLACES = [
    Place("gpt", 1, 1, 1, 0),
    Place("gpt", 1, 3, 1, 2),
    Place("gpt", 1, 4, 1, 0),
    Place("gpt", 1, 4, 1, 3, group=2),
    Place("gpt", 1, 2, 2, 1),
    Place("gpt", 2, 1, 2, 3),
    Place("gpt", 2, 2, 1, 1, balance="parameters"),
    Place("gpt", 2, 2, 1, 3, "interleaved", 2),
    Place("gpt", 2, 1, 1, 1, "zero_bubble_v", 2, "uniform"),
    Place("gpt", 4, 1, 1, 0),
    Place("own", 1, 3, 1, 3),
    Place("stack", 3, 1, 1, 2),
    Place("list", 2, 2, 1, 1),
    Place("list", 3, 1, 1, 3),
]


@pytest.fixture(scope="module")
def runs(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each model, written by one rank."""
    folder = tmp_path_factory.mktemp("runs")
    for model in MODELS:
        ranks.run(1, save_case, model, str(folder / model))
    return {model: folder / model for model in MODELS}


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_what_is_told_is_what_real_ranks_do(ranks: Ranks, runs: dict[str, Path], place: Place) -> None:
    checkpoint = ckpt.open_checkpoint(runs[place.model])
    source = Source(checkpoint.arrays, checkpoint.manifest)
    assert source.refuses_pp(place.pp, place.virtual) is None
    assert source.refuses_tp(place.tp) is None
    found = ranks.run(place.world, held_case, place, str(runs[place.model]))

    told: list[list[Any]] = [[] for _ in range(place.world)]
    of_stage = place.dp * place.tp
    for stage, parts in enumerate(source.places(place.pp, place.cut)):
        for part in parts:
            for i, box in enumerate(part.boxes(place.ranks, place.cut.shards(place.ranks))):
                told[stage * of_stage + i].append((tuple(part.info.key), tuple(box)))
    assert [rank["held"] for rank in found] == [sorted(boxes) for boxes in told]

    read = [rank["read"] for rank in found]
    planned = reads(checkpoint, source, place.ranks, place.cut)
    assert (planned.most, planned.least, planned.total) == (max(read), min(read), sum(read))

    for stage, need in enumerate(needs(source, place.ranks, place.cut, Precision(), 1)):
        most = {
            key: max(rank[key] for rank in found[stage * of_stage : (stage + 1) * of_stage])
            for key in ("fp32", "value", "states", "trained", "whole")
            if key in found[0]
        }
        assert (need.optimizer, need.buffers) == (most["states"], most["value"])
        assert need.gradients == most["trained"]
        if place.zero == 3 or place.cut.shards(place.ranks) == 1:
            assert need.parameters == most["fp32"]
        elif "whole" in most:
            assert need.parameters == most["fp32"] + 4 * most["whole"]
