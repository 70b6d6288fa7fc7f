"""`verify` names every kind of damage to every kind of object, and nothing in a sound checkpoint."""

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ckpt_helpers import cut, random_array, save_arrays
from ckpt_saved import BETWEEN, PART_0, CountingStore, Saved, flipped

import ckpt
from ckpt import Box, CheckpointError, Problem, open_checkpoint, verify
from ckpt.format import encode_document

BIG, W, TWIN, TAIL = ("big", "fp32"), ("w", "fp32"), ("w", "exp_avg"), ("w", "exp_avg_sq")
NAMED, SCALAR, EMPTY, BF16 = ("a/größe", "fp32"), ("count", "value"), ("empty", "fp32"), ("half", "value")
COLUMNS = ("columns", "value")
PARTS = {W: (512, 256), TWIN: (512, 256), TAIL: (300, 256), NAMED: (7, 3), SCALAR: (), EMPTY: (0, 5)}
BOXES = {key: cut(shape, (2, 1)) for key, shape in PARTS.items() if len(shape) == 2}
BOXES |= {BIG: [Box.whole((1200, 512))] * 2, SCALAR: [Box.whole(())] * 2, BF16: [Box.whole((9,))] * 2}
BOXES |= {COLUMNS: cut((256, 64), (1, 2))}
PLANNING = {"chunk_bytes": 1 << 16, "gather_below": 1 << 12}

KINDS = [f"atoms/{file}" for file in ("big/fp32/c.0.0", "w/fp32/c.0.0", "count/value/c", "half/value/c.0")]
"""A file with chunks in three windows, one of few chunks, and two of a single small one."""
WINDOW = 1 << 20


@pytest.fixture(scope="module", params=["file", "memory"])
def saved(request: pytest.FixtureRequest, memory_path: Path) -> Saved:
    """Make files of one chunk and of many, of one, two and three windows, gathered and not."""
    rng = np.random.default_rng(0)
    arrays = {key: random_array(rng, "float32", shape) for key, shape in PARTS.items()}
    arrays |= {BIG: random_array(rng, "float32", (1200, 512)), BF16: random_array(rng, "bfloat16", (9,))}
    arrays |= {COLUMNS: random_array(rng, "int64", (256, 64))}
    on_disk = f"{memory_path}/verify-{request.param}"
    saved = Saved("memory://verify" if request.param == "memory" else on_disk)
    save_arrays(saved.run, "t1", arrays, BOXES, planning=PLANNING)
    return saved


def test_where_all_is_sound_nothing_is_found(saved: Saved) -> None:
    told: list[int] = []
    checkpoint = open_checkpoint(saved.run)
    assert verify(checkpoint, progress=told.append) == []
    objects, size = ckpt.extent(checkpoint)
    assert objects == len(saved.paths())
    assert size == sum(told) == sum(len(saved.get(path)) for path in [*saved.recorded, *saved.files])
    assert len(saved.files) == (8 if saved.run[0] == "/" else 12), "one for each array, or for each writer"
    assert [len(saved.places(path).chunks) > 1 for path in KINDS] == [True, True, False, False]
    assert len(saved.get(KINDS[0])) > 2 * WINDOW


def test_a_byte_anywhere_in_a_file(saved: Saved) -> None:
    """Damage to the edges of chunks and windows, to each byte of a checksum, to gaps and to the index."""
    rng = np.random.default_rng(1)
    for path in saved.files if saved.run[0] == "/" else KINDS:
        data, at = saved.get(path), saved.places(path)
        last = len(at.chunks) - 1
        expected = {}
        for i in {0, 1, WINDOW // at.stride, 2 * WINDOW // at.stride, last - 1, last} & {*range(last + 1)}:
            begin, end = i * at.stride, min((i + 1) * at.stride, at.index)
            edges = {begin, begin + at.payload - 1, *range(begin + at.payload, begin + at.payload + 4)}
            window = WINDOW * (begin // WINDOW + 1)
            edges |= {window - 1, window} & {*range(begin, begin + at.payload)}
            expected |= dict.fromkeys(edges, at.damaged(i))
            if gap := range(begin + at.payload + 4, end):
                expected |= dict.fromkeys((gap[0], gap[-1], int(rng.choice(gap))), BETWEEN)
        index = range(at.index, len(data))
        few = {index[0], index[-1], *map(int, rng.choice(index, 3))}
        expected |= dict.fromkeys(index if path in KINDS[1:] else few, BETWEEN)
        for place, what in expected.items():
            with saved.changed((path, flipped(data, place))):
                assert saved.problems(threads=1) == [saved.found(path, what)], (path, place)


def test_every_chunk_at_once(saved: Saved) -> None:
    for path in saved.files:
        data, at = saved.get(path), saved.places(path)
        places = [i * at.stride + i % (at.payload + 4) for i in range(len(at.chunks))]
        with saved.changed((path, flipped(data, *places))):
            assert saved.problems() == [saved.found(path, at.damaged(*range(len(at.chunks))))]
        with saved.changed((path, flipped(data, *places, len(data) - 1))):
            what = f"{at.damaged(*range(len(at.chunks)))}, and {BETWEEN}"
            assert saved.problems() == [saved.found(path, what)]


def test_files_cut_short(saved: Saved) -> None:
    for path in saved.files:
        data, at = saved.get(path), saved.places(path)
        ends = {0, 1, at.payload, at.payload + 4, at.stride, at.index, len(data) - 1}
        for rest in {*ends, *(end - 1 for end in ends), WINDOW - 1, WINDOW, WINDOW + 1} & {*range(len(data))}:
            with saved.changed((path, data[:rest])):
                what = f"is cut short at {rest} of {len(data)} bytes"
                assert saved.problems() == [saved.found(path, what)]


def test_damage_before_the_cut_is_told_too(saved: Saved) -> None:
    path = KINDS[0]
    data, at = saved.get(path), saved.places(path)
    cut_at = 3 * WINDOW // 2
    with saved.changed((path, flipped(data, at.stride + 7, 2 * at.stride, 5 * at.stride - 1)[:cut_at])):
        what = f"{at.damaged(1, 2)}, and {BETWEEN}, and is cut short at {cut_at} of {len(data)} bytes"
        assert saved.problems() == [saved.found(path, what)]


def test_objects_that_are_too_long(saved: Saved) -> None:
    for path in saved.paths():
        data = saved.get(path)
        checkpoint = open_checkpoint(saved.run)
        for more in (b"\0", data[-4:], b"x" * 5000):
            with saved.changed((path, data + more)):
                sized = path in [*saved.recorded, *saved.files]
                what = f"has {len(data) + len(more)} bytes instead of {len(data)}" if sized else OTHER
                assert verify(checkpoint) == [saved.found(path, what)]


OTHER = "isn't what the manifest says of it"


@pytest.mark.parametrize("short", [0, 1, 2, 3, 4, 5, 12, 23, 24, 25])
@pytest.mark.parametrize("count", [1, 3])
def test_chunks_and_files_that_end_at_a_window_s_edge(tmp_path: Path, short: int, count: int) -> None:
    """A file of one chunk has 24 bytes besides it; in others, a checksum may lie in two windows."""
    rng, saved = np.random.default_rng(0), Saved(str(tmp_path))
    array = random_array(rng, "uint8", (count, WINDOW - short))
    save_arrays(saved.run, "t1", {("w", "value"): array}, planning={"chunk_bytes": WINDOW})
    path = "atoms/w/value/c.0.0"
    data, at = saved.get(path), saved.places(path)
    assert len(at.chunks) == count
    assert saved.problems() == []
    with saved.changed((path, data + b"\0")):
        assert saved.problems() == [saved.found(path, f"has {len(data) + 1} bytes instead of {len(data)}")]
    for place in (at.payload, at.payload + 3):
        with saved.changed((path, flipped(data, place))):
            assert saved.problems() == [saved.found(path, at.damaged(0))]


def test_objects_that_are_missing(saved: Saved) -> None:
    for path in saved.paths():
        checkpoint = open_checkpoint(saved.run)
        with saved.changed((path, None)):
            assert verify(checkpoint) == [saved.found(path, "is missing")]


def test_damaged_documents(saved: Saved) -> None:
    recorded = saved.recorded
    for path in saved.documents:
        data = saved.get(path)
        for place in (0, len(data) // 2, len(data) - 1):
            with saved.changed((path, flipped(data, place))):
                what = "is damaged: its checksum isn't the manifest's" if path in recorded else OTHER
                assert saved.problems() == [saved.found(path, what)]
        with saved.changed((path, data[:-1])):
            what = f"has {len(data) - 1} bytes instead of {len(data)}" if path in recorded else OTHER
            assert saved.problems() == [saved.found(path, what)]


def test_without_the_manifest_nothing_is_opened(saved: Saved) -> None:
    with (
        saved.changed(("manifest.json", flipped(saved.get("manifest.json"), 300))),
        pytest.raises(CheckpointError, match=rf"{re.escape(saved.run)}/t1/manifest.json is damaged"),
    ):
        open_checkpoint(saved.run)


def test_documents_that_were_edited_with_their_record(saved: Saved) -> None:
    """zarr's readers would read another array than ours."""
    document = json.loads(saved.get("zarr.json"))
    document["consolidated_metadata"]["metadata"]["atoms/w/exp_avg"]["shape"] = [511, 256]
    for content in (encode_document(document), b"no json", b"[" * 100_000):
        with saved.with_content("zarr.json", content):
            assert saved.problems() == [saved.found("zarr.json", OTHER)]


def test_a_part_that_was_edited_with_its_record(saved: Saved) -> None:
    """The other documents tell, and so do the files."""
    documents = [saved.found(path, OTHER) for path in ("zarr.json", "atoms/count/value/zarr.json")]
    with saved.with_part(lambda part: part["count"]["value"].update(dtype="int32")):
        assert saved.problems() == documents
    with saved.with_part(lambda part: part["count"]["value"].update(crc32c="AAAAAA==")):
        assert saved.problems() == [saved.found(KINDS[2], saved.places(KINDS[2]).damaged(0))]


def test_a_part_that_cannot_be_followed(saved: Saved) -> None:
    """The rest is still verified."""
    with (
        saved.with_part(lambda part: part["w"]["fp32"].update(chunk_shape=[0, 256])),
        saved.changed(("atoms/zarr.json", None)),
    ):
        what = "has a record of w/fp32 that can't be followed (file_shape "
        part, group = saved.problems()
        assert (part.path, part.what[: len(what)]) == (f"{saved.run}/t1/{PART_0}", what)
        assert group == saved.found("atoms/zarr.json", "is missing")
        assert [p.what for p in ckpt.absent(open_checkpoint(saved.run))] == [part.what, "is missing"]


def test_files_and_chunks_that_took_each_other_s_place(saved: Saved) -> None:
    a, b = "atoms/w/fp32/c.0.0", "atoms/w/exp_avg/c.0.0"
    with saved.changed((a, saved.get(b)), (b, saved.get(a))):
        every = range(len(saved.places(a).chunks))
        assert saved.problems() == [saved.found(path, saved.places(path).damaged(*every)) for path in (b, a)]
    data, at = saved.get(a), saved.places(a)
    first, second = (slice(i * at.stride, i * at.stride + at.stride) for i in (1, 2))
    exchanged = data[: first.start] + data[second] + data[first] + data[second.stop :]
    with saved.changed((a, exchanged)):
        assert saved.problems() == [saved.found(a, at.damaged(1, 2))]


@pytest.mark.parametrize("threads", [1, 4])
def test_all_that_is_wrong_is_told_in_order(saved: Saved, threads: int) -> None:
    changes = [(path, None) for path in saved.paths() if path != PART_0]
    checkpoint = open_checkpoint(saved.run)
    in_order = [f"{info.path}/c" for info in checkpoint.arrays.values()]
    with saved.changed(*changes):
        found = [problem.path.partition("/t1/")[2] for problem in verify(checkpoint, threads=threads)]
    documents = [path for path in saved.documents if path != PART_0]
    assert sorted(found[: len(documents)]) == documents
    assert sorted(found[len(documents) :]) == saved.files
    assert [*dict.fromkeys(path[: path.rindex("/c") + 2] for path in found[len(documents) :])] == [
        path for path in in_order if "/empty/" not in path
    ]


def test_a_problem_is_one_line() -> None:
    full = Problem(atom="a.w", state="fp32", path="s3://b/t1/atoms/x", what="is gone")
    assert str(full) == "a.w/fp32: s3://b/t1/atoms/x is gone"
    assert str(Problem(atom="a.w", path="/run/x", what="is gone")) == "a.w: /run/x is gone"
    assert str(Problem(path="/run/x", what="is gone")) == "/run/x is gone"


def test_memory_is_a_window_s_whatever_the_file(saved: Saved) -> None:
    checkpoint = open_checkpoint(saved.run)
    verify(checkpoint)
    tracemalloc.start()
    verify(checkpoint, threads=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest = max(len(saved.get(path)) for path in saved.files)
    if saved.run.startswith(
        "memory://"
    ):  # a window is 64 MiB there: whole files, and twice, as bytes come back
        assert peak < 64 * WINDOW + 2.5 * largest
    else:
        assert peak < 1.4 * WINDOW < largest


def test_one_request_for_each_object(saved: Saved) -> None:
    """A remote store answers slowly, so the size of a file is learnt from reading it."""
    checkpoint = open_checkpoint(saved.run)
    counting: Any = CountingStore(checkpoint.store)
    counting.window = 64 << 20  # of a remote store
    checkpoint.store = counting
    assert verify(checkpoint) == []
    assert sorted(counting.calls) == sorted(
        [("read_into", f"t1/{path}") for path in saved.files]
        + [("read", f"t1/{path}") for path in (PART_0, *saved.documents)]  # the part twice
    )


def test_what_can_t_be_read_is_told(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(saved.run)

    def broken(self: Any, path: str, *args: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(type(checkpoint.store), "read_into", broken)
    problems = verify(checkpoint)
    assert [p.what for p in problems] == ["can't be read (Input/output error)"] * len(saved.files)


def test_a_file_that_is_too_long_is_told_even_if_its_size_is_not(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, path = open_checkpoint(saved.run), saved.files[0]
    content = saved.get(path)

    def unknown(self: Any, path: str) -> int:
        raise OSError("no answer")

    monkeypatch.setattr(type(checkpoint.store), "size", unknown)
    with saved.changed((path, content + b"x")):
        assert verify(checkpoint) == [saved.found(path, f"goes on after its {len(content)} bytes")]


# --- absent: sizes alone ---------------------------------------------------------------------------------


def absent(saved: Saved) -> list[Problem]:
    return ckpt.absent(open_checkpoint(saved.run))


def test_absent_finds_nothing_in_a_whole_checkpoint(saved: Saved) -> None:
    assert absent(saved) == []


def test_absent_names_missing_objects_and_other_sizes(saved: Saved) -> None:
    for path in saved.paths():
        data = saved.get(path)
        for changed in (data[:-1], data + b"\0"):
            with saved.changed((path, changed)):
                # The documents of single groups and arrays have no record of their size.
                sized = path in [*saved.recorded, *saved.files]
                what = f"has {len(changed)} bytes instead of {len(data)}"
                assert absent(saved) == ([saved.found(path, what)] if sized else []), path
        with saved.changed((path, None)):
            assert absent(saved) == [saved.found(path, "is missing")]


def test_absent_reads_no_bytes(saved: Saved) -> None:
    path = "atoms/w/fp32/c.0.0"
    with saved.changed((path, b"x" * len(saved.get(path)))):
        assert absent(saved) == []
