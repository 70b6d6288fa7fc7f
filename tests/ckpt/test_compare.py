"""Comparison and statistics of checkpoints, against numpy on whole arrays."""

import math

import ml_dtypes
import numpy as np
import pytest
from ckpt_helpers import cut, random_array, save_arrays
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from ckpt import ArrayKey, CheckpointError, common_bytes, compare, open_checkpoint, statistics
from ckpt.compare import _apart


def opened(folder, arrays, cuts=None):
    sizes = {} if cuts is None else {"chunk_bytes": 256, "gather_below": 0}  # several chunks
    boxes = None if cuts is None else {key: cut(a.shape, cuts) for key, a in arrays.items()}
    save_arrays(folder, "t1", arrays, boxes, planning=sizes)
    return open_checkpoint(folder)


@pytest.mark.parametrize("band", [64, 1 << 20])
def test_what_differs_is_named(tmp_path, monkeypatch, band):
    monkeypatch.setattr("ckpt.bands.BAND_BYTES", band)
    rng = np.random.default_rng(0)
    first = {("w", state): random_array(rng, "float32", (60, 10)) for state in ("fp32", "exp_avg")}
    second = {key: a.copy() for key, a in first.items()}
    assert compare(opened(tmp_path / "a", first), opened(tmp_path / "b", second, (4, 1))) == []
    second["w", "exp_avg"][3, 4] += 0.5
    second["w", "exp_avg"][59, 9] *= 3
    first["gone", "fp32"] = second["new", "fp32"] = np.zeros(3, np.float32)
    first["shape", "fp32"], second["shape", "fp32"] = np.zeros(3, np.float32), np.zeros(4, np.float32)
    first["kind", "value"], second["kind", "value"] = np.zeros(3, np.int32), np.zeros(3, np.int64)
    for name in ("nan", "odd"):
        first[name, "fp32"] = np.array([1, np.nan, 2], np.float32)
        second[name, "fp32"] = np.array([1, np.nan if name == "nan" else 0, 2], np.float32)
    told = []
    c, d = opened(tmp_path / "c", first), opened(tmp_path / "d", second)
    found = compare(c, d, progress=told.append)
    assert common_bytes(c, d) == common_bytes(d, c) - 4 - 12 == 2 * 2400 + 3 * 12 + 12, "at most"
    what = {("/".join(d.key)): d.what for d in found}
    assert what == {
        "gone/fp32": "only in the first",
        "kind/value": "dtype",
        "new/fp32": "only in the second",
        "odd/fp32": "values",
        "shape/fp32": "shape",
        "w/exp_avg": "values",
    }
    assert list(what) == sorted(what)
    moment = found[-1]
    a, b = (x["w", "exp_avg"].astype(np.float64) for x in (first, second))
    assert moment.elements == 2
    assert moment.absolute == np.abs(a - b).max()
    assert moment.relative == (np.abs(a - b)[a != b] / np.maximum(np.abs(a), np.abs(b))[a != b]).max()
    assert (found[3].elements, found[3].absolute) == (1, math.inf), "a NaN is as far as can be"
    assert sum(told) == 2 * 2400 + 2 * 12


PAIRS = st.sampled_from(["float32", "float16", "int64", "uint8", "bool"]).flatmap(
    lambda dtype: st.tuples(*[arrays_of.arrays(dtype, 5)] * 2)
)


@settings(deadline=None)
@given(PAIRS)
def test_how_far_apart(pair):
    a, b = pair
    found = _apart(a, b)
    expected = [0, 0.0, 0.0]
    for x, y in zip(map(float, a), map(float, b), strict=True):
        if x == y or (math.isnan(x) and math.isnan(y)):
            continue
        expected[0] += 1
        far = abs(x - y) if math.isfinite(x) and math.isfinite(y) else math.inf
        expected[1] = max(expected[1], far)
        expected[2] = max(expected[2], far / max(abs(x), abs(y)) if math.isfinite(far) else math.inf)
    if a.dtype == np.int64:  # of which float tells not all apart
        expected[0] = int(np.count_nonzero(a != b))
    assert found[0] == expected[0]
    assert found[1:] == pytest.approx(tuple(expected[1:]), rel=1e-12)


def test_numbers_of_other_bits_may_be_equal():
    other_nan = np.array([0x7FC00001], np.uint32).view(np.float32)
    a, b = np.array([0.0, math.nan, 1], np.float32), np.array([-0.0, other_nan[0], 1], np.float32)
    assert a.tobytes() != b.tobytes()
    assert _apart(a, b) == (0, 0.0, 0.0)


def test_statistics_are_numpy_s(tmp_path, monkeypatch):
    monkeypatch.setattr("ckpt.bands.BAND_BYTES", 100)
    values = np.random.default_rng(0).normal(1000, 0.5, (40, 7)).astype(np.float32)
    values[0, 0] = values[39, 6] = np.nan
    arrays = {
        ("w", "fp32"): values,
        ("b", "value"): np.array([0.5, 1, 2], ml_dtypes.bfloat16),
        ("none", "fp32"): np.zeros((0, 3), np.float32),
        ("lost", "fp32"): np.full(3, np.nan, np.float32),
        ("flag", "value"): np.array(True),
    }
    checkpoint = opened(tmp_path, arrays)
    found = statistics(checkpoint, list(checkpoint.arrays))
    w, exact = found[ArrayKey("w", "fp32")], values.astype(np.float64)
    assert w.nan == 2
    assert w.mean == pytest.approx(np.nanmean(exact), rel=1e-12)
    assert w.std == pytest.approx(np.nanstd(exact), rel=1e-9)
    assert (w.least, w.most) == (np.nanmin(exact), np.nanmax(exact))
    b = found[ArrayKey("b", "value")]
    assert (b.mean, b.least, b.most, b.nan) == (pytest.approx(3.5 / 3), 0.5, 2, 0)
    for name, nan in (("none", 0), ("lost", 3)):
        of = found[ArrayKey(name, "fp32")]
        assert (of.mean, of.std, of.least, of.most, of.nan) == (None, None, None, None, nan)
    assert found[ArrayKey("flag", "value")].mean == 1.0


def test_damage_is_an_error(tmp_path):
    arrays = {("w", "fp32"): np.ones((3, 3), np.float32)}
    checkpoint, other = opened(tmp_path / "a", arrays), opened(tmp_path / "b", arrays)
    (chunk,) = (tmp_path / "b").glob("*/atoms/w/fp32/c*")
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    with pytest.raises(CheckpointError, match="is damaged"):
        compare(checkpoint, other)
    with pytest.raises(CheckpointError, match="is damaged"):
        statistics(other, list(other.arrays))
