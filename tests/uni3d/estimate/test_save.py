"""Compare a planned save with the plan that real ranks make and the files that they write."""

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import matrix, slow
from model import GPT, GPTConfig
from ranks import Ranks
from torch.utils.data import TensorDataset

import ckpt
import parallel
import uni3d
from ckpt import gather
from parallel.stages import split_layers
from uni3d.estimate.gpt import GPTShape, derive
from uni3d.estimate.job import cut_stages
from uni3d.estimate.save import on_paper, stage_layout

WIDE = GPTShape(layers=2, hidden=512, heads=8, kv_heads=2, ffn=1056, vocab=509)
"""Shape with matrices large enough to be written in place, small ones, and a prime vocabulary."""
RAGGED = GPTShape(layers=3, hidden=20, heads=2, kv_heads=2, ffn=26, vocab=61)
"""Shape with uneven and empty parts."""

CASES = [
    (WIDE, parallel.Ranks(pp=2, dp=2, tp=1, zero=1)),
    (WIDE, parallel.Ranks(pp=1, dp=2, tp=2, zero=3)),
    (WIDE, parallel.Ranks(pp=1, dp=4, tp=1, zero=0)),
    (WIDE, parallel.Ranks(pp=2, dp=1, tp=2, zero=1)),
    (RAGGED, parallel.Ranks(pp=1, dp=2, tp=2, zero=1)),
    (RAGGED, parallel.Ranks(pp=1, dp=3, tp=1, zero=2)),
    (RAGGED, parallel.Ranks(pp=4, dp=1, tp=1, zero=0)),
]


def real_model(shape: GPTShape) -> GPT:
    config = GPTConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        ffn_size=shape.ffn,
    )
    with torch.device("meta"):
        return GPT(config)


def real_case(shape: GPTShape, place: parallel.Ranks, run: str) -> dict[str, Any]:
    """Train a step and save. Return this rank's plan, the shards that it brought, and its traffic."""
    settings = oracle.SETTINGS | {
        "train_micro_batch_size_per_gpu": 1,
        "parallel": {"pp": place.pp, "dp": place.dp, "tp": place.tp, "device": "cpu"},
        "zero_optimization": {"stage": place.zero},
        "checkpoint": {"async_save": False, "durable": False},
    }
    model = real_model(shape)
    data = TensorDataset(*oracle.samples(False))
    engine = uni3d.initialize(model=model, training_data=data, config=settings)[0]
    engine.train_batch()
    exchange, sent, received = parallel.HostComm.exchange, [], []

    def counted(self: parallel.HostComm, outgoing: Any) -> Any:
        sent.append(sum(part.nbytes for rank, part in outgoing.items() if rank != self.rank))
        arrived = exchange(self, outgoing)
        received.append(sum(part.nbytes for part in arrived.values()))
        return arrived

    with (
        mock.patch.object(parallel.HostComm, "exchange", counted),
        mock.patch.object(ckpt, "save", wraps=ckpt.save) as save,
    ):
        engine.save_checkpoint(run)
    (_, _, shards), given = save.call_args
    return {
        "plan": given["plan"],
        "brought": [shard.spec for shard in shards],
        "sent": sent,
        "received": received,
    }


def chunk_sizes(folder: Path) -> list[int]:
    """Return the bytes from each chunk of an array's file to the next, by zarr's index at the file's end."""
    (file,) = folder.glob("c*")
    data, document = file.read_bytes(), json.loads((folder / "zarr.json").read_text())
    (codec,), outer = document["codecs"], document["chunk_grid"]["configuration"]["chunk_shape"]
    count = prod(o // c for o, c in zip(outer, codec["configuration"]["chunk_shape"], strict=True))
    index = np.frombuffer(data[-4 - 16 * count : -4], "<u8").reshape(count, 2)
    return np.diff([*index[:, 0].tolist(), len(data)]).tolist()


@pytest.mark.parametrize(
    ("shape", "place"),
    [CASES[5], slow(*CASES[0]), *(matrix(*case) for case in (*CASES[1:5], CASES[6]))],
    ids=str,
)
def test_a_planned_save_is_what_real_ranks_do(
    ranks: Ranks, shape: GPTShape, place: parallel.Ranks, tmp_path: Path
) -> None:
    figures = on_paper(shape, place)
    found = ranks.run(place.total, real_case, shape, place, str(tmp_path))
    checkpoint = tmp_path / "global_step1"
    links = [stage.links for stage in cut_stages(shape, place.pp)]
    stored, snapshot = [], []
    for rank, real in enumerate(found):
        stage = rank // place.of_a_stage
        arrays = stage_layout(links[stage], place, stage)
        planned = ckpt.plan_arrays(arrays, real["plan"].ranks)
        assert planned == real["plan"], "the same chunks, writers, sources"
        assert planned.bytes_written()[rank] == figures.written[rank]
        parts = planned.parts(rank)
        specs = {a.key: ckpt.ShardSpec(a.key, a.dtype, a.shape, a.boxes[rank], a.fine_dim) for a in arrays}
        brought = {spec.key: spec for spec in real["brought"]}
        assert brought == {key: replace(specs[key], box=box) for key, box in parts.items()}
        assert all(parts[key].within(specs[key].box) for key in parts), "of what the rank holds"
        stored.append(0)
        for array in real["plan"].arrays:
            sizes = chunk_sizes(checkpoint / "atoms" / array.key.atom / array.key.state)
            assert len(sizes) == len(array.chunk_plan.chunks)
            stored[-1] += sum(
                n for n, chunk in zip(sizes, array.chunk_plan.chunks, strict=True) if chunk.writer == rank
            )
        snapshot.append(sum(spec.box.size * 4 for spec in real["brought"]))
        assert len(real["sent"]) == figures.exchanges
    assert stored == figures.stored
    assert snapshot == figures.snapshot
    assert sum(sum(real["sent"]) for real in found) == figures.sent
    files = [file for file in checkpoint.rglob("*") if file.is_file()]
    data = [file for file in files if file.name.startswith("c.")]
    assert len(data) == figures.files == figures.arrays
    assert len(files) == figures.files + figures.documents
    assert sum(file.stat().st_size for file in data) == sum(figures.stored)
    manifest = [file for file in files if file.parent == checkpoint and file.name.startswith(("man", "arr"))]
    assert sum(file.stat().st_size for file in manifest) == pytest.approx(figures.manifest, rel=0.04)
    assert len(list(checkpoint.glob("atoms/*/*/zarr.json"))) == figures.arrays
    parameters = sum(prod(a.shape) for a in ckpt.open_checkpoint(tmp_path).arrays.values())
    assert parameters == 3 * figures.parameters == 3 * shape.parameters
    assert sum(figures.written) == 12 * figures.parameters
    assert figures.largest_received == max(n for real in found for n in real["received"] or [0])


def test_the_cases_are_of_all_kinds() -> None:
    """Check that the test above covers chunks written in place, shared chunks and gathered arrays."""
    found = [on_paper(shape, ranks) for shape, ranks in CASES]
    assert any(0 < f.sent < sum(f.written) / 2 for f in found)
    assert any(f.sent == 0 for f in found)
    assert any(len(set(f.written)) > 1 for f in found)
    assert any(f.chunks > f.files for f in found), "files of several chunks"


@pytest.mark.parametrize("zero", [0, 1])
def test_stages_that_are_alike_are_planned_once(zero: int) -> None:
    shape = GPTShape(layers=22, hidden=512, heads=8, kv_heads=2, ffn=1056, vocab=509)
    ranks = parallel.Ranks(pp=5, dp=3, tp=2, zero=zero)
    with mock.patch("uni3d.estimate.save.plan_arrays", wraps=ckpt.plan_arrays) as planner:
        figures = on_paper(shape, ranks)
    stages = [stage.links for stage in cut_stages(shape, ranks.pp)]
    assert planner.call_count < len(stages)
    written, snapshot = [], []
    for stage, links in enumerate(stages):
        arrays = stage_layout(links, ranks, stage)
        plan = ckpt.plan_arrays(arrays, range(stage * ranks.of_a_stage, (stage + 1) * ranks.of_a_stage))
        written += list(plan.bytes_written().values())
        snapshot += [sum(box.size * 4 for box in plan.parts(rank).values()) for rank in plan.ranks]
    assert figures.written == written
    assert figures.snapshot == snapshot


@pytest.mark.parametrize("vocab", [61, 500, 5000])
@pytest.mark.parametrize("pp", range(1, 7))
def test_stages_hold_what_they_hold_in_training(vocab: int, pp: int) -> None:
    shape = replace(RAGGED, vocab=vocab)
    model = real_model(shape)
    stages = [stage.links for stage in cut_stages(shape, pp)]
    assert [[link.name for link in links] for links in stages] == split_layers(
        model, model.pipeline_layers, pp
    )
    weights = {f"{link.name}.{w.name}": w.shape for links in stages for link in links for w in link.weights}
    assert weights == {name: tuple(p.shape) for name, p in model.named_parameters()}


# --- the shape -----------------------------------------------------------------------------------------


def test_seventy_billion_is_llama_2_70b() -> None:
    shape = derive(70_000_000_000)
    assert vars(shape) == vars(GPTShape(layers=80, hidden=8192, heads=64, kv_heads=8, ffn=28672, vocab=32000))
    assert shape.parameters == 68_976_648_192  # as published


@settings(deadline=None)
@given(st.floats(7e6, 3e12))
def test_a_derived_shape_has_the_parameters_asked_for(parameters: float) -> None:
    shape = derive(int(parameters))
    assert shape.parameters == sum(prod(w.shape) for link in shape.links for w in link.weights)
    assert shape.parameters == pytest.approx(parameters, rel=0.02)


def test_given_sizes_are_kept() -> None:
    wanted = {"layers": 30, "heads": 24, "kv_heads": 4, "vocab": 50257}
    shape = derive(3_000_000_000, **wanted)
    assert vars(shape) | wanted == vars(shape)
    assert (
        derive(None, layers=2, hidden=64).parameters == 2 * 32000 * 64 + 64 + 2 * (4 * 64 + 3 * 224 + 2) * 64
    )


# --- the figures ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_figures_of_seventy_billion_parameters() -> None:
    shape = derive(70_000_000_000)
    figures = on_paper(shape, parallel.Ranks(pp=8, dp=64, tp=8, zero=1))
    assert len(figures.written) == len(figures.stored) == len(figures.snapshot) == 4096
    assert sum(figures.written) == 12 * 68_976_648_192
    assert figures.arrays == 3 * (9 * 80 + 3)
    in_place = 5 * 80 * 3 * 512  # q, o, gate, up, down: a chunk of each rank of a stage
    assert in_place < figures.chunks < 1.05 * in_place
    key_and_value = 2 * 80 * 3 * 1024 * 8192 * 4  # too small to be chunks: 64 KiB a rank
    ends = 2 * 3 * 32000 * 8192 * 4  # ragged: 4000 rows of a tp rank in 64 parts of 63
    # Of a chunk of 1 MiB its writer has a 64 KiB part of key and value; of one of 4 MiB, 2 MiB of the ends.
    assert 0.97 * key_and_value + 0.4 * ends < figures.sent < key_and_value + ends + 80 * 2 * 3 * 8192 * 4
    assert figures.files == figures.arrays
    assert figures.files + figures.documents < 7000
    assert figures.manifest < 1e6 * sum(figures.written) / 100e9, "at most 1 MB for 100 GB"
    assert figures.exchanges <= 8
    assert figures.largest_received <= 2 * gather.ROUND_BYTES
    assert figures.balance < 1.2
    for zero in (2, 3):
        assert on_paper(shape, parallel.Ranks(pp=8, dp=64, tp=8, zero=zero)) == figures
    assert on_paper(shape, parallel.Ranks(pp=8, dp=64, tp=8, zero=0)).sent == 0


def test_other_states_are_other_bytes() -> None:
    ranks = parallel.Ranks(pp=1, dp=2, tp=1, zero=1)
    assert sum(on_paper(WIDE, ranks, ["fp32"]).written) == 4 * WIDE.parameters
    assert sum(on_paper(WIDE, ranks, ["fp32", "momentum"]).written) == 8 * WIDE.parameters


def test_seconds_are_the_slowest_ones() -> None:
    figures = on_paper(RAGGED, parallel.Ranks(pp=1, dp=1, tp=1, zero=1))
    figures = replace(figures, written=[1, 1, 6], stored=[10, 1, 7], snapshot=[3, 8, 5], manifest=4)
    making = (figures.files + figures.documents) / 10
    assert figures.save_seconds(2, ranks_per_node=2, file_rate=10) == making + (11 + 4) / 2
    assert figures.save_seconds(2, ranks_per_node=8, file_rate=10) == making + (18 + 4) / 2
    assert figures.stall_seconds(4) == 2
    assert figures.balance == 6 / (8 / 3)
