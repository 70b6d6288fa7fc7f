"""Exported files, as the safetensors library reads them."""

import json
import math
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from ckpt_faults import recorded
from ckpt_helpers import cut, layout_of, random_array, same, save_arrays
from safetensors import safe_open
from safetensors.numpy import load_file

from ckpt import Box, CheckpointError, Shard, Solo, export_safetensors, make_plan, open_checkpoint, save
from ckpt.format import DTYPES

SHAPES = {
    "rows": ((1199, 512), (4, 1)),
    "columns": ((300, 2048), (1, 4)),
    "both": ((515, 1030), (2, 2)),
    "cube": ((7, 130, 600), (1, 2, 2)),
    "vector": ((300_001,), (4,)),
    "small": ((5, 3), (4, 1)),
    "empty": ((0, 5), (1, 4)),
    "narrow": ((3, 0), (4, 1)),
}


def saved(run: Path) -> dict[str, np.ndarray]:
    """Save a model with buffers and moments from four ranks; return its state_dict."""
    rng = np.random.default_rng(0)
    arrays = {(name, "fp32"): random_array(rng, "float32", shape) for name, (shape, _) in SHAPES.items()}
    boxes = {(name, "fp32"): cut(shape, cuts) for name, (shape, cuts) in SHAPES.items()}
    for dtype in sorted(DTYPES):
        for name, shape in ((f"buffer.{dtype}", (3,)), (f"scalar.{dtype}", ())):
            arrays[name, "value"] = random_array(rng, dtype, shape)
            boxes[name, "value"] = [Box.whole(shape)] * 4
    weights = {name: a for (name, _), a in arrays.items()}
    for moment in ("exp_avg", "momentum_buffer"):
        arrays["rows", moment], boxes["rows", moment] = arrays["rows", "fp32"] + 1, boxes["rows", "fp32"]
    document = {"aliases": {"head": "rows", "a.b": "small"}}
    save_arrays(run, "t1", arrays, boxes, document=document, planning={"gather_below": 1 << 18})
    return weights


@pytest.mark.parametrize("band", [8, 100, 5_000, 1_000_000])
def test_whatever_is_copied_at_a_time(tmp_path, monkeypatch, band):
    """The bands of each array cover it once, from one element to several arrays per band."""
    weights, out, told = saved(tmp_path), tmp_path / "model.safetensors", []
    kept = {n: a for n, a in weights.items() if a.size * 8 < 20_000 * band}
    monkeypatch.setattr("ckpt.bands.BAND_BYTES", band)
    checkpoint = open_checkpoint(tmp_path)
    for name in weights.keys() - kept:
        checkpoint.arrays = {key: info for key, info in checkpoint.arrays.items() if key.atom != name}
    export_safetensors(checkpoint, out, progress=told.append)
    assert sum(told) == sum(a.nbytes for a in kept.values())
    found = load_file(out)
    assert found.keys() == kept.keys()
    assert all(same(found[name], expected) for name, expected in kept.items())


def test_every_cut_and_type_comes_out_bit_for_bit(tmp_path):
    weights, out = saved(tmp_path), tmp_path / "model.safetensors"
    told: list[int] = []

    def progress(n: int) -> None:
        told.append(n)
        assert not out.exists(), "it has its name when it is whole"

    size = export_safetensors(open_checkpoint(tmp_path), out, progress=progress)
    assert size == out.stat().st_size
    assert sum(told) == sum(a.nbytes for a in weights.values())
    found = load_file(out)
    assert found.keys() == weights.keys(), "the moments stay behind"
    for name, expected in weights.items():
        assert same(found[name], expected), name
    with safe_open(out, "numpy") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["aliases"]) == {"head": "rows", "a.b": "small"}
    assert (metadata["format"], metadata["tag"]) == ("pt", "t1")


def test_tensors_are_aligned_to_their_types(tmp_path):
    """Readers can then map the file and use the numbers in place."""
    weights, out = saved(tmp_path), tmp_path / "model.safetensors"
    export_safetensors(open_checkpoint(tmp_path), out)
    data = out.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, expected in weights.items():
        assert (8 + length + header[name]["data_offsets"][0]) % expected.itemsize == 0, name


def test_an_existing_file_is_never_replaced(tmp_path):
    save_arrays(tmp_path, "t1", {("w", "fp32"): np.ones(3, np.float32)})
    out = tmp_path / "mine.safetensors"
    out.write_text("mine")
    with pytest.raises(CheckpointError, match=r"mine\.safetensors exists"):
        export_safetensors(open_checkpoint(tmp_path), out)
    assert out.read_text() == "mine"


@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_a_damaged_chunk_leaves_no_file_behind(tmp_path, damage):
    saved(tmp_path / "run")
    path = tmp_path / "run" / "t1" / "atoms" / "rows" / "fp32" / "c.0.0"
    _, begin = open_checkpoint(tmp_path / "run").info("rows", "fp32").grid.place((3, 0))
    assert begin > 0, "the last of the chunks of four ranks"
    data = bytearray(path.read_bytes())
    data[begin + 7] ^= 1
    path.unlink()
    if damage == "flip":
        path.write_bytes(data)
    (tmp_path / "out").mkdir()
    chunk = 3 if damage == "flip" else 0
    with pytest.raises(CheckpointError, match=rf"rows/fp32 chunk \[{chunk}, 0\]"):
        export_safetensors(open_checkpoint(tmp_path / "run"), tmp_path / "out" / "model.safetensors")
    assert not [*(tmp_path / "out").iterdir()]


WEIGHTS = {
    ("w", "fp32"): np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, -3e38, math.nan, math.inf], np.float32),
    ("v", "fp32"): np.ones((2, 3), np.float32),
    ("mean", "value"): np.array([1 + 2**-8], np.float32),
}


def test_only_tensors_that_are_asked_for_are_written(tmp_path):
    save_arrays(tmp_path, "t1", WEIGHTS, document={"aliases": {"head": "w", "other": "v"}})
    checkpoint = open_checkpoint(tmp_path)
    export_safetensors(checkpoint, tmp_path / "a", names={"v", "mean"})
    assert load_file(tmp_path / "a").keys() == {"v", "mean"}
    with safe_open(tmp_path / "a", "numpy") as opened:
        assert json.loads(opened.metadata()["aliases"]) == {"other": "v"}
    export_safetensors(checkpoint, tmp_path / "b", names={"model.v": "v", "model.head": "w", "model.w": "w"})
    found = load_file(tmp_path / "b")
    assert found.keys() == {"model.v", "model.head", "model.w"}
    assert same(found["model.head"], WEIGHTS["w", "fp32"])
    assert same(found["model.v"], WEIGHTS["v", "fp32"])
    with safe_open(tmp_path / "b", "numpy") as opened:
        assert opened.metadata() == {"format": "pt", "tag": "t1"}, "a mapping has the names it has"


def test_parameters_are_rounded_to_the_nearest_and_buffers_stay(tmp_path):
    save_arrays(tmp_path, "t1", WEIGHTS)
    export_safetensors(open_checkpoint(tmp_path), tmp_path / "out", dtype="bfloat16")
    found = load_file(tmp_path / "out")
    w = found["w"].astype(np.float64)
    assert str(found["w"].dtype) == str(found["v"].dtype) == "bfloat16"
    assert w[:3].tolist() == [1, 1, 1 + 2**-6], "ties to even"
    assert np.isfinite(w[3])
    assert math.isnan(w[4])
    assert w[5] == math.inf
    assert same(found["mean"], WEIGHTS["mean", "value"])


def test_a_number_that_the_type_does_not_have_is_refused(tmp_path):
    save_arrays(tmp_path / "run", "t1", WEIGHTS)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"w has -3e\+38, which is too large for float16; export it as"):
        export_safetensors(open_checkpoint(tmp_path / "run"), tmp_path / "out" / "m", dtype="float16")
    assert not [*(tmp_path / "out").iterdir()]


@pytest.mark.parametrize("durable", [False, True])
def test_it_is_synced_if_it_is_to_be_durable(tmp_path, durable):
    save_arrays(tmp_path / "run", "t1", WEIGHTS)
    (tmp_path / "out").mkdir()
    with recorded() as calls:
        export_safetensors(open_checkpoint(tmp_path / "run"), tmp_path / "out" / "m", durable=durable)
    place = tmp_path / "out"
    move = ("move", f"{place}/.m.tmp -> {place}/m")
    expected = [("sync", f"{place}/.m.tmp"), move, ("sync", f"{place}")] if durable else [move]
    assert [call[:2] for call in calls] == expected
    assert load_file(place / "m").keys() == {"w", "v", "mean"}


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    save_arrays(tmp_path / "run", "t1", WEIGHTS)
    with pytest.raises(CheckpointError, match=r"gone/m can't be written: No such file or directory"):
        export_safetensors(open_checkpoint(tmp_path / "run"), tmp_path / "gone" / "m")


def test_a_full_disk_leaves_no_file_behind(tmp_path, monkeypatch):
    saved(tmp_path / "run")

    def full(fd, buffer, offset):
        raise OSError(28, "No space left on device")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr("ckpt.stores.files.write_at", full)
    with pytest.raises(OSError, match="No space left"):
        export_safetensors(open_checkpoint(tmp_path / "run"), tmp_path / "out" / "model.safetensors")
    assert not [*(tmp_path / "out").iterdir()]


def test_memory_does_not_grow_with_the_model(memory_path, monkeypatch):
    """200 MiB in three arrays, one of them 128 MiB, come out with a few bands of 4 MiB in memory."""
    monkeypatch.setattr("ckpt.export.cores", lambda: 3)  # a band for each, however many there are
    run, shapes = memory_path / "large", [(32768, 1024), (9437, 1024), (1024, 9437)]
    arrays = {(f"w.{i}", "fp32"): np.full(shape, i, np.float32) for i, shape in enumerate(shapes)}
    layout = layout_of(arrays, {key: [Box.whole(a.shape)] for key, a in arrays.items()})
    shards = [Shard(spec, arrays[spec.key]) for spec in layout[0]]
    save(run, "t1", shards, plan=make_plan(layout), comm=Solo(), document={}, durable=False)
    checkpoint = open_checkpoint(run)
    tracemalloc.start()
    size = export_safetensors(checkpoint, run / "out.safetensors")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > sum(math.prod(shape) * 4 for shape in shapes) > 200 << 20
    assert (8 << 20) < peak < (24 << 20)
    with safe_open(run / "out.safetensors", "numpy") as opened:
        for i, shape in enumerate(shapes):
            assert opened.get_slice(f"w.{i}").get_shape() == list(shape)
            assert (opened.get_slice(f"w.{i}")[shape[0] - 3 :] == i).all()
    shutil.rmtree(run)
