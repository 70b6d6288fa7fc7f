"""What several ranks save, cut in one way, comes back cut in any other, and to any zarr reader."""

from __future__ import annotations

import importlib
import json
from itertools import chain

import numpy as np
import pytest
import tensorstore
import zarr
from ckpt_helpers import (
    DOCUMENT,
    ThreadComm,
    all_ranks,
    cut,
    layout_of,
    nbytes,
    random_array,
    same,
    save_arrays,
    shards_of,
    targets_of,
    whole,
)
from zarr.core.metadata.v3 import ArrayV3Metadata

from ckpt import Box, CheckpointError, Solo, load, make_plan, open_checkpoint, save
from ckpt.format import DTYPES, array_document, array_path

ODD_NAMES = [
    "a/b",
    "with space",
    "100%",
    "%2F",
    "größe.重み",
    ".hidden",
    "..",
    "__reserved",
    "zarr.json",
    "c.0",
    "x'\"\\\n*?",
]

# How each rank of a layout holds a matrix, a vector and a scalar: cuts per dim, and the number of copies.
LAYOUTS = {
    "one": ((1, 1), 1),
    "rows-2": ((2, 1), 1),
    "columns-2": ((1, 2), 1),
    "copies-2": ((1, 1), 2),
    "rows-3": ((3, 1), 1),
    "both-4": ((2, 2), 1),
    "rows-2-copies-2": ((2, 1), 2),
}


def matrices(rng: np.random.Generator) -> dict[tuple[str, str], np.ndarray]:
    """Sizes on both sides of what is gathered, none that divides evenly, a scalar and an empty array."""
    return {
        ("embed.weight", "fp32"): random_array(rng, "float32", (1027, 517)),
        ("embed.weight", "exp_avg"): random_array(rng, "float32", (1027, 517)),
        ("bias", "fp32"): random_array(rng, "float32", (300_001,)),
        ("norm.weight", "fp32"): random_array(rng, "float32", (13, 1)),
        ("norm.count", "value"): random_array(rng, "int64", ()),
        ("mask", "value"): random_array(rng, "bool", (7, 5)),
        ("empty", "fp32"): random_array(rng, "float32", (0, 5)),
    }


def held(arrays: dict, name: str) -> dict[tuple[str, str], list[Box]]:
    """The box of each array on each rank of a layout."""
    cuts, copies = LAYOUTS[name]
    parts = int(np.prod(cuts))
    by_dims = {0: (), 1: (parts,), 2: cuts}
    boxes = {key: cut(a.shape, by_dims[a.ndim]) * copies for key, a in arrays.items()}
    return {key: b * (parts * copies // len(b)) for key, b in boxes.items()}


def zarr_read(folder, key: tuple[str, str]) -> np.ndarray:
    return np.asarray(zarr.open_array(folder / array_path(*key), mode="r")[...])


def tensorstore_read(folder, key: tuple[str, str]) -> np.ndarray:
    store = {"driver": "file", "path": f"{folder / array_path(*key)}/"}
    return tensorstore.open({"driver": "zarr3", "kvstore": store}, read=True).result().read().result()


def random_box(rng: np.random.Generator, shape: tuple[int, ...]) -> Box:
    ends = [sorted(rng.integers(0, n + 1, 2)) for n in shape]
    return Box(tuple(int(a) for a, _ in ends), tuple(int(b - a) for a, b in ends))


@pytest.mark.parametrize("before", LAYOUTS)
def test_saved_in_one_layout_read_in_all_ways(tmp_path, before):
    rng = np.random.default_rng(0)
    arrays = matrices(rng)
    save_arrays(tmp_path, "t1", arrays, held(arrays, before))
    checkpoint = open_checkpoint(tmp_path)
    assert {*checkpoint.arrays} == {*arrays}
    for key, expected in arrays.items():
        assert same(zarr_read(tmp_path / "t1", key), expected), key
        assert same(tensorstore_read(tmp_path / "t1", key), expected), key
        assert same(checkpoint.read(*key), expected), key
        for _ in range(10):
            box = random_box(rng, expected.shape)
            assert same(checkpoint.read(*key, box), expected[box.slices]), (key, box)
    for after in LAYOUTS:
        layout = layout_of(arrays, held(arrays, after))
        targets = [targets_of(specs) for specs in layout]
        reports = all_ranks(
            len(layout), lambda comm, targets=targets: load(checkpoint, targets[comm.rank], comm=comm)
        )
        assert all(r.restored == sorted("/".join(key) for key in arrays) for r in reports)
        for target in chain(*targets):
            assert same(target.data, arrays[target.spec.key][target.spec.box.slices]), (after, target.spec)


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(1)
    arrays = {(f"a.{dtype}", "value"): random_array(rng, dtype, (5, 3)) for dtype in DTYPES}
    for dtype in ("float16", "float32", "float64"):
        special = [np.nan, -np.nan, np.inf, -np.inf, -0.0, np.finfo(dtype).smallest_subnormal]
        arrays[f"special.{dtype}", "value"] = np.array(special, dtype)
    arrays |= {(f"scalar.{dtype}", "value"): random_array(rng, dtype, ()) for dtype in DTYPES}
    save_arrays(
        tmp_path,
        "t1",
        arrays,
        {key: cut(a.shape, (2, 1)[: a.ndim]) * (2 - bool(a.ndim)) for key, a in arrays.items()},
    )
    checkpoint = open_checkpoint(tmp_path)
    for key, expected in arrays.items():
        assert same(checkpoint.read(*key), expected), key
        assert same(zarr_read(tmp_path / "t1", key), expected), key
        assert same(tensorstore_read(tmp_path / "t1", key), expected), key


def test_other_types_are_refused_by_name(tmp_path):
    arrays = {("w", "fp32"): np.zeros(3, np.complex64)}
    with pytest.raises(CheckpointError, match="w/fp32 has dtype complex64"):
        save_arrays(tmp_path, "t1", arrays)
    assert not [*tmp_path.iterdir()]


def test_any_name_is_kept(tmp_path):
    names = [(name, "fp32") for name in ODD_NAMES] + [("w", name) for name in ODD_NAMES]
    arrays = {key: np.array([i], np.int32) for i, key in enumerate(names)}
    save_arrays(tmp_path, "t1", arrays)
    checkpoint = open_checkpoint(tmp_path)
    assert {*checkpoint.arrays} == {*arrays}
    for key, expected in arrays.items():
        assert same(checkpoint.read(*key), expected)
        assert same(zarr_read(tmp_path / "t1", key), expected)
        assert same(tensorstore_read(tmp_path / "t1", key), expected)


@pytest.mark.parametrize("name", ["", "x" * 256, "重" * 100])
def test_names_that_no_file_can_have_are_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="name"):
        save_arrays(tmp_path, "t1", {(name, "fp32"): np.zeros(3)})


def test_zarr_lists_everything_from_one_document(tmp_path):
    arrays = matrices(np.random.default_rng(2))
    save_arrays(tmp_path, "t1", arrays)
    for consolidated in (True, False):  # the latter walks the folders
        atoms = zarr.open_group(tmp_path / "t1", mode="r", use_consolidated=consolidated)["atoms"]
        assert dict(atoms.groups()).keys() == {atom for atom, _ in arrays}
        found = {f"atoms/{p}": a for p, a in atoms.members(max_depth=None) if isinstance(a, zarr.Array)}
        assert found.keys() == {array_path(*key) for key in arrays}
        for key, expected in arrays.items():
            assert same(np.asarray(found[array_path(*key)][...]), expected)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(), (0, 3), (7, 5)], ids=str)
def test_documents_are_zarr_s_own(dtype, shape):
    document = array_document(dtype, shape, tuple(max(n // 2, 1) for n in shape))
    again = ArrayV3Metadata.from_dict(json.loads(json.dumps(document))).to_dict()
    assert json.loads(json.dumps(again)) == document


def test_the_document_comes_back_as_it_was(tmp_path):
    save_arrays(tmp_path, "t1", {("embed.weight", "fp32"): np.ones(3)})
    checkpoint = open_checkpoint(tmp_path)
    assert {key: checkpoint.manifest[key] for key in DOCUMENT} == DOCUMENT
    assert same(checkpoint.read("head.weight"), np.ones(3)), "a tied weight, by its other name"


@pytest.mark.parametrize(
    ("bad", "where"),
    [({"a": [(1, 2)]}, r"\['a'\]\[0\] is a tuple"), ({"a": float("nan")}, "nan"), ({1: 2}, "the key 1")],
    ids=["tuple", "nan", "key"],
)
def test_what_json_would_change_is_refused(tmp_path, bad, where):
    with pytest.raises(CheckpointError, match=where):
        save_arrays(tmp_path, "t1", {("w", "fp32"): np.ones(3)}, document={"client_state": bad})


def test_unwritten_padding_is_never_zeros(tmp_path):
    """The last chunks of an uneven cut are padded with what zarr would fill: NaN."""
    arrays = {("w", "fp32"): np.ones((1000, 300), np.float32)}
    save_arrays(tmp_path, "t1", arrays, {("w", "fp32"): cut((1000, 300), (3, 1))})
    data = (tmp_path / "t1" / "atoms/w/fp32/c.2.0").read_bytes()
    stored = np.frombuffer(data[:-4], np.float32).reshape(334, 300)
    assert (stored[:332] == 1).all()
    assert np.isnan(stored[332:]).all()


def test_a_gather_takes_several_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("ckpt.save"), "GATHER_ROUND_BYTES", 1000)
    exchange, rounds = ThreadComm.exchange, []

    def noted(comm, outgoing, incoming_sizes):
        rounds.append(sum(o.nbytes for o in outgoing))
        return exchange(comm, outgoing, incoming_sizes)

    monkeypatch.setattr(ThreadComm, "exchange", noted)
    rng = np.random.default_rng(3)
    arrays = {(f"w.{i}", "fp32"): random_array(rng, "float32", (11, 9)) for i in range(20)}
    save_arrays(tmp_path, "t1", arrays, {key: cut((11, 9), (3, 1)) for key in arrays})
    assert sum(rounds) == sum(a.nbytes for a in arrays.values()), "each byte is sent once"
    assert len(rounds) == 3 * 7, "three arrays of 396 bytes make a round, for each of three ranks"
    checkpoint = open_checkpoint(tmp_path)
    assert all(same(checkpoint.read(*key), a) for key, a in arrays.items())


def test_resharding_by_rows_reads_little_more_than_is_wanted(tmp_path):
    """A row cut at other rows than the writers': only the blocks of 4 MiB at the seams are read twice."""
    arrays = {("w", "fp32"): random_array(np.random.default_rng(4), "float32", (33_000, 1024))}
    save_arrays(tmp_path, "t1", arrays, {("w", "fp32"): cut((33_000, 1024), (2, 1))})
    checkpoint = open_checkpoint(tmp_path)
    layout = layout_of(arrays, {("w", "fp32"): cut((33_000, 1024), (3, 1))})
    targets = [targets_of(specs) for specs in layout]
    reports = all_ranks(3, lambda comm: load(checkpoint, targets[comm.rank], comm=comm))
    wanted = sum(nbytes(spec) for specs in layout for spec in specs)
    assert wanted <= sum(r.bytes_read for r in reports) <= 1.1 * wanted
    for (target,) in targets:
        assert same(target.data, arrays["w", "fp32"][target.spec.box.slices])


def test_targets_may_lie_in_larger_arrays(tmp_path):
    """A target that is a view with gaps, as a slice of a fused buffer is."""
    arrays = {("w", "fp32"): random_array(np.random.default_rng(5), "float32", (6, 4))}
    save_arrays(tmp_path, "t1", arrays)
    buffer = np.zeros((6, 10), np.float32)
    (target,) = targets_of(layout_of(arrays, whole(arrays))[0])
    load(open_checkpoint(tmp_path), [type(target)(target.spec, buffer[:, 3:7])], comm=Solo())
    assert np.array_equal(buffer[:, 3:7], arrays["w", "fp32"])
    assert not buffer[:, :3].any()
    assert not buffer[:, 7:].any()


def test_ranks_that_do_not_hold_what_was_announced_are_refused(tmp_path):
    arrays = {("w", "fp32"): np.ones((4, 4), np.float32)}
    layout = layout_of(arrays, whole(arrays))
    with pytest.raises(CheckpointError, match="layout announced"):
        save(tmp_path, "t1", [], layout=layout, comm=Solo(), document={})
    wrong = shards_of(arrays, layout[0])
    wrong[0] = type(wrong[0])(wrong[0].spec, wrong[0].data.astype(np.float64))
    with pytest.raises(CheckpointError, match=r"AssertionError.*float64"):
        save(tmp_path, "t1", wrong, layout=layout, comm=Solo(), document={})
    assert make_plan(layout)  # the layout itself is fine
