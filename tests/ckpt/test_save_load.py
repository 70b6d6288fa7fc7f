"""Arrays that ranks save, cut in one way, are loaded cut in any other, and read by any zarr reader."""

import json
import math
from collections import defaultdict
from itertools import chain, pairwise

import ml_dtypes
import numpy as np
import pytest
import zarr
from ckpt_helpers import (
    DOCUMENT,
    ThreadComm,
    all_ranks,
    check_read,
    cut,
    layout_of,
    load_in,
    random_array,
    same,
    save_arrays,
    stored,
    targets_of,
    tensorstore_read,
    whole,
    zarr_read,
)
from zarr.core.metadata.v3 import ArrayV3Metadata

from ckpt import Box, CheckpointError, Shard, Solo, UnfilledShard, load, make_plan, open_checkpoint, save
from ckpt.array_files import file_grid
from ckpt.format import DTYPES, array_document, array_path, itemsize

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
    """Make gathered and in-place arrays, none of which divides evenly; a scalar; an empty array."""
    return {
        ("embed.weight", "fp32"): random_array(rng, "float32", (1027, 517)),
        ("embed.weight", "exp_avg"): random_array(rng, "float32", (1027, 520)),
        ("bias", "fp32"): random_array(rng, "float32", (300_001,)),
        ("norm.weight", "fp32"): random_array(rng, "float32", (13, 1)),
        ("norm.count", "value"): random_array(rng, "int64", ()),
        ("mask", "value"): random_array(rng, "bool", (7, 5)),
        ("empty", "fp32"): random_array(rng, "float32", (0, 5)),
    }


FINE = {("embed.weight", "exp_avg"): 1}
"""Stored in tiles of columns."""


def held(arrays: dict, name: str) -> dict[tuple[str, str], list[Box]]:
    """Return the box of each array on each rank of a layout."""
    cuts, copies = LAYOUTS[name]
    parts = int(np.prod(cuts))
    by_dims = {0: (), 1: (parts,), 2: cuts}
    boxes = {key: cut(a.shape, by_dims[a.ndim]) * copies for key, a in arrays.items()}
    return {key: b * (parts * copies // len(b)) for key, b in boxes.items()}


def random_box(rng: np.random.Generator, shape: tuple[int, ...]) -> Box:
    ends = [sorted(rng.integers(0, n + 1, 2)) for n in shape]
    return Box(tuple(int(a) for a, _ in ends), tuple(int(b - a) for a, b in ends))


class Elsewhere:
    """Memory that takes copies of parts, as a GPU does."""

    def __init__(self, memory: np.ndarray) -> None:
        self._memory = memory

    def __setitem__(self, part, values: np.ndarray) -> None:
        self._memory[part] = values


SMALL = {"chunk_bytes": 1 << 18, "gather_below": 1 << 17}
"""Sizes of a plan that cuts arrays of a few MiB into several chunks, as the usual ones cut larger arrays."""


@pytest.mark.parametrize("files", ["array", "writer"])
@pytest.mark.parametrize("before", LAYOUTS)
def test_saved_in_one_layout_read_in_all_ways(tmp_path, monkeypatch, before, files):
    monkeypatch.setattr("ckpt.chunking.FILE_BYTES", 1 << 19)  # so that files="writer" makes several
    rng = np.random.default_rng(0)
    arrays = matrices(rng)
    save_arrays(tmp_path, "t1", arrays, held(arrays, before), FINE, planning={"files": files, **SMALL})
    check_read(tmp_path, "t1", arrays)
    checkpoint = open_checkpoint(tmp_path)
    fine = checkpoint.info("embed.weight", "exp_avg")
    assert fine.grid.chunk_shape[1] in (65, 130, 260)
    assert (len([*fine.grid.files()]) == 1) == (files == "array")
    for key, expected in arrays.items():
        for _ in range(10):
            box = random_box(rng, expected.shape)
            assert same(checkpoint.read(*key, box), expected[box.slices]), (key, box)
    for after in LAYOUTS:
        layout = layout_of(arrays, held(arrays, after))
        targets = [targets_of(specs) for specs in layout.values()]
        given = [
            [UnfilledShard(t.spec, Elsewhere(t.data)) if i % 2 else t for i, t in enumerate(held)]
            for held in targets
        ]
        reports = all_ranks(
            len(layout), lambda comm, given=given: load(checkpoint, given[comm.rank], comm=comm)
        )
        assert all(r.restored == sorted("/".join(key) for key in arrays) for r in reports)
        for target in chain(*targets):
            assert same(target.data, arrays[target.spec.key][target.spec.box.slices]), (after, target.spec)


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(1)
    arrays = {(f"a.{dtype}", "value"): random_array(rng, dtype, (5, 3)) for dtype in DTYPES}
    for dtype in map(np.dtype, ("float16", "float32", "float64", ml_dtypes.bfloat16)):
        special = [np.nan, -np.nan, np.inf, -np.inf, -0.0, ml_dtypes.finfo(dtype).smallest_subnormal]
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
        assert same(zarr_read(tmp_path / "t1", key), stored(expected)), key
        assert same(tensorstore_read(tmp_path / "t1", key), stored(expected)), key
    group = zarr.open_group(tmp_path / "t1", mode="r")
    said = {key: group[array_path(*key)].attrs.asdict() for key in arrays}
    brain = {"dtype": "bfloat16"}
    assert said == {key: brain if a.dtype == ml_dtypes.bfloat16 else {} for key, a in arrays.items()}


@pytest.mark.parametrize("shape", [(3,), (), (0, 3)], ids=str)
def test_other_types_are_refused_by_name(tmp_path, shape):
    arrays = {("w", "fp32"): np.zeros(shape, np.complex64)}
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
    chunk = tuple(max(n // 3, 1) for n in shape)
    grid = file_grid(shape, chunk, tuple(2 * n for n in chunk), itemsize(dtype))
    document = array_document(dtype, grid)
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


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_unwritten_padding_is_never_zeros(tmp_path, dtype):
    """The last chunks of an uneven cut are padded with what zarr would fill: NaN."""
    arrays = {("w", "fp32"): np.ones((1000, 500), dtype)}
    boxes = {("w", "fp32"): cut((1000, 500), (3, 1))}
    save_arrays(tmp_path, "t1", arrays, boxes, planning={"gather_below": 0})
    info = open_checkpoint(tmp_path).info("w", "fp32")
    assert info.grid.chunk_shape == (334, 500)
    _, begin = info.grid.place((2, 0))
    data = (tmp_path / "t1" / "atoms/w/fp32/c.0.0").read_bytes()[begin : begin + info.grid.payload]
    found = np.frombuffer(data, dtype).reshape(334, 500)
    assert (found[:332] == 1).all()
    assert np.isnan(found[332:]).all()
    padding = {*stored(found[332:]).reshape(-1).view(f"u{found.itemsize}").tolist()}
    fill = json.loads((tmp_path / "t1" / "atoms/w/fp32/zarr.json").read_text())["fill_value"]
    assert padding == {fill if dtype != np.float32 else 0x7FC00000}, "the fill value, bit for bit"


def bytes_received(monkeypatch):
    """Count the bytes of exchanges from now on, by the rank that receives them."""
    got, exchange = defaultdict(int), ThreadComm.exchange

    def noted(comm, outgoing):
        received = exchange(comm, outgoing)
        if nbytes := sum(part.nbytes for part in received.values()):
            got[comm.rank] += nbytes
        return received

    monkeypatch.setattr(ThreadComm, "exchange", noted)
    return got


def reaching_over(plan, boxes):
    """Return the bytes of the chunks that lie in none of the boxes alone, by their writer."""
    found = defaultdict(int)
    for chunk in plan.arrays[0].chunk_plan.chunks:
        if not any(chunk.box.within(box) for box in boxes):
            found[chunk.writer] += 4 * chunk.box.size
    return dict(found)


def test_large_parts_without_a_divisor_are_written_in_place(tmp_path, monkeypatch):
    """1,009 rows of each rank are a prime number: only the chunks that reach over a bound are gathered."""
    key, rows = ("w", "fp32"), 1009
    planning = {"chunk_bytes": 16 << 10, "gather_below": 1 << 10}
    arrays = {key: random_array(np.random.default_rng(5), "float32", (3 * rows, 64))}
    boxes = {key: [Box((i * rows, 0), (rows, 64)) for i in range(3)]}
    plan = make_plan(layout_of(arrays, boxes), **planning)
    assert plan.arrays[0].grid.chunk_shape == (64, 64)
    assert len(reaching_over(plan, boxes[key])) == 2
    got = bytes_received(monkeypatch)
    save_arrays(tmp_path, "t1", arrays, boxes, planning=planning)
    assert got == reaching_over(plan, boxes[key])
    check_read(tmp_path, "t1", arrays)
    load_in(tmp_path, arrays, {key: cut((3 * rows, 64), (4, 2))})
    arrays[key][rows - 1] += 1  # in a gathered chunk, of an array whose other chunks stay as they were
    save_arrays(tmp_path, "t2", arrays, boxes, planning=planning, incremental=True)
    check_read(tmp_path, "t2", arrays)


def test_large_replicas_without_a_divisor(tmp_path):
    key, rows = ("w", "fp32"), 1009
    arrays = {key: random_array(np.random.default_rng(6), "float32", (2 * rows, 64))}
    boxes = {key: [Box((i % 2 * rows, 0), (rows, 64)) for i in range(4)]}
    save_arrays(tmp_path, "t1", arrays, boxes, planning={"chunk_bytes": 16 << 10, "gather_below": 1 << 10})
    check_read(tmp_path, "t1", arrays)


@pytest.mark.parametrize("round_bytes", [1, 1 << 30])
def test_a_large_ragged_array_has_several_writers(tmp_path, monkeypatch, round_bytes):
    """Each writer receives the chunks that it hasn't whole, and no rank writes much more than it holds."""
    monkeypatch.setattr("ckpt.gather.ROUND_BYTES", round_bytes)
    key, ends = ("w", "fp32"), [0, 1501, 2200, 3001]
    arrays = {key: random_array(np.random.default_rng(4), "float32", (3001, 4096))}
    boxes = {key: [Box((a, 0), (b - a, 4096)) for a, b in pairwise(ends)]}
    plan = make_plan(layout_of(arrays, boxes), gather_below=1 << 60)
    (array,) = plan.arrays
    assert array.chunk_plan.sources is not None
    assert {w: len(chunks) for w, chunks in array.chunk_plan.by_writer.items()} == {0: 23, 1: 11, 2: 13}
    got = bytes_received(monkeypatch)
    save_arrays(tmp_path, "t1", arrays, boxes, planning={"gather_below": 1 << 60})
    assert sum(got.values()) == sum(reaching_over(plan, boxes[key]).values()) == 2 << 20
    assert got == reaching_over(plan, boxes[key])
    assert len([*(tmp_path / "t1" / array_path(*key)).glob("c*")]) == 1, "all of them write one file"
    check_read(tmp_path, "t1", arrays)


def test_a_gather_takes_several_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr("ckpt.gather.ROUND_BYTES", 1000)
    exchange, rounds = ThreadComm.exchange, []

    def noted(comm, outgoing):
        rounds.append(sum(o.nbytes for o in outgoing.values()))
        return exchange(comm, outgoing)

    monkeypatch.setattr(ThreadComm, "exchange", noted)
    rng = np.random.default_rng(3)
    arrays = {(f"w.{i}", "fp32"): random_array(rng, "float32", (11, 9)) for i in range(20)}
    save_arrays(tmp_path, "t1", arrays, {key: cut((11, 9), (3, 1)) for key in arrays})
    assert sum(rounds) == sum(a.nbytes for a in arrays.values()), "each byte is sent once"
    assert len(rounds) == 3 * 4, "two arrays of 396 bytes for each of three ranks, in each round"
    checkpoint = open_checkpoint(tmp_path)
    assert all(same(checkpoint.read(*key), a) for key, a in arrays.items())


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (4, 1), (1, 4), (2, 8)])
def test_resharding_reads_little_more_than_is_wanted(tmp_path, dim, before, after):
    """Cuts elsewhere than the writers' only add the chunks (rows) or tiles (columns) at the seams."""
    key, shape = ("w", "fp32"), (1536, 4128)
    cuts = lambda parts: {key: cut(shape, (parts, 1)[:: 1 - 2 * dim])}  # noqa: E731
    arrays = {key: random_array(np.random.default_rng(4), "float32", shape)}
    save_arrays(tmp_path, "t1", arrays, cuts(before), {key: 1} if dim else {})
    checkpoint = open_checkpoint(tmp_path)
    layout = layout_of(arrays, cuts(after))
    targets = [targets_of(specs) for specs in layout.values()]
    reports = all_ranks(after, lambda comm: load(checkpoint, targets[comm.rank], comm=comm))
    read = sum(r.bytes_read for r in reports)
    grid = checkpoint.info(*key).grid
    if dim:  # thirds end in the midst of two of the eight tiles
        most = arrays[key].nbytes * (1 + 2 / 8 if after == 3 else 1.1)
    else:
        most = grid.payload * (math.prod(grid.counts) + after - 1)
    assert arrays[key].nbytes <= read <= most
    for (target,) in targets:
        assert same(target.data, arrays[key][target.spec.box.slices])


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


def test_what_is_saved_may_lie_in_larger_arrays(tmp_path):
    """Shards may be views with gaps, or transposed."""
    rng = np.random.default_rng(6)
    arrays = {("w", "fp32"): random_array(rng, "float32", (600, 700)).T[5:, 7:], ("v", "fp32"): np.ones(3)}
    layout = layout_of(arrays, {("w", "fp32"): cut((695, 593), (2, 1)), ("v", "fp32"): cut((3,), (2,))})
    plan = make_plan(layout)

    def work(comm):
        shards = [Shard(s, arrays[s.key][s.box.slices]) for s in layout[comm.rank]]
        save(tmp_path, "t1", shards, plan=plan, comm=comm, document={}, durable=False)

    all_ranks(2, work)
    assert all(same(open_checkpoint(tmp_path).read(*key), a) for key, a in arrays.items())
