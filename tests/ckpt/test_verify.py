"""`verify` names every kind of damage to every kind of object, and nothing in a sound checkpoint."""

import json
import re
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ckpt_helpers import cut, random_array, save_arrays
from ckpt_saved import CountingStore, Saved, flipped

import ckpt
from ckpt import Box, CheckpointError, Problem, open_checkpoint, verify
from ckpt.format import encode_document, object_record

BIG, W, TWIN, TAIL = ("big", "fp32"), ("w", "fp32"), ("w", "exp_avg"), ("w", "exp_avg_sq")
NAMED, SCALAR, EMPTY, BF16 = ("a/größe", "fp32"), ("count", "value"), ("empty", "fp32"), ("half", "value")
PARTS = {W: (512, 256), TWIN: (512, 256), TAIL: (300, 256), NAMED: (7, 3), SCALAR: (), EMPTY: (0, 5)}
BOXES = {key: cut(shape, (2, 1)) for key, shape in PARTS.items() if len(shape) == 2}
BOXES |= {BIG: [Box.whole((1200, 512))] * 2, SCALAR: [Box.whole(())] * 2, BF16: [Box.whole((9,))] * 2}


@pytest.fixture(scope="module", params=["file", "memory"])
def saved(request: pytest.FixtureRequest, memory_path: Path) -> Saved:
    """Chunks of one block and of many, in one window and in three, in place and gathered."""
    rng = np.random.default_rng(0)
    arrays = {key: random_array(rng, "float32", shape) for key, shape in PARTS.items()}
    arrays |= {BIG: random_array(rng, "float32", (1200, 512)), BF16: random_array(rng, "bfloat16", (9,))}
    on_disk = f"{memory_path}/verify-{request.param}"
    saved = Saved("memory://verify" if request.param == "memory" else on_disk)
    save_arrays(saved.run, "t1", arrays, BOXES)
    return saved


def test_where_all_is_sound_nothing_is_found(saved: Saved) -> None:
    told: list[int] = []
    checkpoint = open_checkpoint(saved.run)
    assert verify(checkpoint, progress=told.append) == []
    objects, size = ckpt.extent(checkpoint)
    assert objects == len(saved.paths())
    assert size == sum(told) == sum(len(saved.get(path)) for path in saved.paths())
    blocks = {path: -(-(len(saved.get(path)) - 4) // saved.block(path)) for path in saved.chunks}
    assert len(saved.chunks) == 9
    several = [blocks[path] > 1 for path in saved.kinds]
    assert several == [True, True, False, False]
    assert blocks["atoms/big/fp32/c.0.0"] > 40, "in three windows of 1 MiB"


def test_a_byte_at_the_edge_of_a_block(saved: Saved) -> None:
    for path in saved.kinds:
        data, block = saved.get(path), saved.block(path)
        size = len(data) - 4
        blocks = -(-size // block)
        per_window = (1 << 20) // block
        edges = {0, 1, per_window - 1, per_window, 2 * per_window, blocks - 2, blocks - 1}
        for i in edges & {*range(blocks)}:
            for place in {i * block, min((i + 1) * block, size) - 1}:
                what = f"is damaged in 1 of {blocks} blocks, the first at byte {i * block}"
                with saved.changed((path, flipped(data, place))):
                    assert saved.problems() == [saved.found(path, what)]


def test_every_block_at_once(saved: Saved) -> None:
    for path in saved.kinds:
        data, block = saved.get(path), saved.block(path)
        starts = range(0, len(data) - 4, block)
        with saved.changed((path, flipped(data, *starts, len(data) - 2))):
            what = f"is damaged in {len(starts)} of {len(starts)} blocks, the first at byte 0"
            what += ", and doesn't end with its checksum"
            assert saved.problems() == [saved.found(path, what)]


def test_the_checksum_at_the_end(saved: Saved) -> None:
    for path in saved.kinds:
        for place in (1, 2, 3, 4):
            data = saved.get(path)
            with saved.changed((path, flipped(data, len(data) - place))):
                assert saved.problems() == [saved.found(path, "doesn't end with its checksum")]


def test_chunks_cut_short(saved: Saved) -> None:
    for path in saved.kinds:
        data, block = saved.get(path), saved.block(path)
        window = (1 << 20) // block * block
        edges = {0, 1, block, window - 1, window, window + 1}
        for rest in {len(data) - 5, len(data) - 4, len(data) - 1, *edges} & {*range(len(data))}:
            with saved.changed((path, data[:rest])):
                what = f"is cut short at {rest} of {len(data)} bytes"
                assert saved.problems() == [saved.found(path, what)]


def test_damage_before_the_cut_is_told_too(saved: Saved) -> None:
    path = "atoms/big/fp32/c.0.0"
    data, block = saved.get(path), saved.block(path)
    blocks, cut_at = -(-(len(data) - 4) // block), 3 * (1 << 20) // 2
    with saved.changed((path, flipped(data, block + 7, 2 * block)[:cut_at])):
        what = f"is damaged in 2 of {blocks} blocks, the first at byte {block}, "
        what += f"and is cut short at {cut_at} of {len(data)} bytes"
        assert saved.problems() == [saved.found(path, what)]


def test_objects_that_are_too_long(saved: Saved) -> None:
    for path in saved.paths():
        data = saved.get(path)
        checkpoint = open_checkpoint(saved.run)  # before: the group's own document is read on opening
        for more in (b"\0", data[-4:], b"x" * 5000):
            with saved.changed((path, data + more)):
                what = f"has {len(data) + len(more)} bytes instead of {len(data)}"
                assert verify(checkpoint) == [saved.found(path, what)]


def test_objects_that_are_missing(saved: Saved) -> None:
    for path in saved.paths():
        checkpoint = open_checkpoint(saved.run)
        with saved.changed((path, None)):
            assert verify(checkpoint) == [saved.found(path, "is missing")]


def test_damaged_documents(saved: Saved) -> None:
    for path in saved.documents:
        data = saved.get(path)
        checkpoint = open_checkpoint(saved.run)
        for place in (0, len(data) // 2, len(data) - 1):
            with saved.changed((path, flipped(data, place))):
                what = "is damaged: its checksum isn't the manifest's"
                assert verify(checkpoint) == [saved.found(path, what)]
        with saved.changed((path, data[:-1])):
            what = f"has {len(data) - 1} bytes instead of {len(data)}"
            assert verify(checkpoint) == [saved.found(path, what)]


@pytest.mark.parametrize("path", ["manifest.json", "zarr.json"])
def test_without_the_two_documents_nothing_is_opened(saved: Saved, path: str) -> None:
    with (
        saved.changed((path, flipped(saved.get(path), 300))),
        pytest.raises(CheckpointError, match=rf"{re.escape(saved.run)}/t1/{path} is damaged"),
    ):
        open_checkpoint(saved.run)


def test_a_document_that_was_edited_with_its_record(saved: Saved) -> None:
    path = "atoms/w/exp_avg/zarr.json"
    for edited in ({**json.loads(saved.get(path)), "shape": [511, 256]}, None):
        content = encode_document(edited) if edited else b"no json"
        record = object_record(content)

        def change(manifest: dict[str, Any], record: dict[str, Any] = record) -> None:
            manifest["documents"][path] = record

        with saved.with_manifest(change, (path, content)):
            what = "isn't what the checkpoint's zarr.json says of it"
            assert saved.problems() == [saved.found(path, what)]


def test_chunks_that_took_each_other_s_place(saved: Saved) -> None:
    a, b = "atoms/w/fp32/c.1.0", "atoms/w/exp_avg/c.1.0"
    with saved.changed((a, saved.get(b)), (b, saved.get(a))):
        assert [(p.atom, p.state, p.chunk) for p in saved.problems()] == [
            ("w", "exp_avg", "c.1.0"),
            ("w", "fp32", "c.1.0"),
        ]


W_PATH = "atoms/w/fp32"
AN_ARRAY = ("w", "fp32")


@pytest.mark.parametrize(
    ("change", "names", "what"),
    [
        (lambda m: m["chunks"][W_PATH].pop("c.1.0"), (*AN_ARRAY, "c.1.0"), "has no record of it"),
        (lambda m: m["chunks"].pop("atoms/count/value"), ("count", "value", "c"), "has no record of it"),
        (
            lambda m: m["chunks"][W_PATH].update({"c.2.0": m["chunks"][W_PATH]["c.1.0"]}),
            (*AN_ARRAY, "c.2.0"),
            "has a record of it, but there is no such chunk in the array's grid",
        ),
        (
            lambda m: m["chunks"].update({"atoms/ghost/fp32": {}}),
            ("ghost", "fp32", ""),
            "has records of chunks in atoms/ghost/fp32, which is no array of the checkpoint",
        ),
        (
            lambda m: m["documents"].pop("atoms/w/fp32/zarr.json"),
            (*AN_ARRAY, ""),
            "has no record of atoms/w/fp32/zarr.json",
        ),
        *(
            (change, (*AN_ARRAY, "c.0.0"), "has a record of it that can't be followed")
            for change in (
                lambda m: m["chunks"][W_PATH]["c.0.0"].update(size=12),
                lambda m: m["chunks"][W_PATH]["c.0.0"].pop("crc32c"),
                lambda m: m["chunks"][W_PATH]["c.0.0"].update(running="words"),
                lambda m: m["chunks"][W_PATH]["c.0.0"].update(running="00000000"),
            )
        ),
    ],
)
def test_what_the_manifest_says(
    saved: Saved, change: Callable[[dict[str, Any]], object], names: Sequence[str], what: str
) -> None:
    path = f"{saved.run}/t1/manifest.json"
    with saved.with_manifest(change):
        atom, state, chunk = names
        assert saved.problems() == [Problem(atom=atom, state=state, chunk=chunk, path=path, what=what)]


def test_a_checksum_of_the_whole_that_isn_t_the_blocks(saved: Saved) -> None:
    """A record has both: `running` verifies partial reads, `crc32c` is the end of the file."""
    with saved.with_manifest(lambda m: m["chunks"][W_PATH]["c.0.0"].update(crc32c="00000000")):
        (problem,) = saved.problems()
    assert (problem.atom, problem.state, problem.chunk) == (*AN_ARRAY, "c.0.0")
    assert problem.path == f"{saved.run}/t1/manifest.json"


@pytest.mark.parametrize("threads", [1, 4])
def test_all_that_is_wrong_is_told_in_order(saved: Saved, threads: int) -> None:
    changes = [(path, None) for path in saved.paths() if path != "zarr.json"]
    with saved.changed(*changes):
        problems = saved.problems(threads=threads)
    documents = [path for path in saved.documents if path != "zarr.json"]
    in_order = [p for p in problems if not p.chunk] + [p for p in problems if p.chunk]
    assert problems == in_order
    assert {p.path for p in problems} == {f"{saved.run}/t1/{path}" for path in documents + saved.chunks}


def test_a_problem_is_one_line() -> None:
    full = Problem(atom="a.w", state="fp32", chunk="c.0.1", path="s3://b/t1/atoms/x", what="is gone")
    assert str(full) == "a.w/fp32 chunk c.0.1: s3://b/t1/atoms/x is gone"
    assert str(Problem(atom="a.w", path="/run/x", what="is gone")) == "a.w: /run/x is gone"
    assert str(Problem(path="/run/x", what="is gone")) == "/run/x is gone"


def test_memory_is_a_window_s_whatever_the_chunk(saved: Saved) -> None:
    checkpoint = open_checkpoint(saved.run)
    verify(checkpoint)
    tracemalloc.start()
    verify(checkpoint, threads=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest = max(len(saved.get(path)) for path in saved.chunks)
    if saved.run.startswith("memory://"):  # whole objects in one request each, and so two of them
        assert peak < 2.5 * largest
    else:
        assert peak < 1.4 * (1 << 20) < largest


def test_one_request_for_each_object(saved: Saved) -> None:
    """A remote store answers slowly, so the size of a chunk is learnt from reading it."""
    checkpoint = open_checkpoint(saved.run)
    counting: Any = CountingStore(checkpoint.store)
    counting.window = 64 << 20  # of a remote store: a whole chunk per request
    checkpoint.store = counting
    assert verify(checkpoint) == []
    assert sorted(counting.calls) == sorted(
        [("read_into", f"t1/{path}") for path in saved.chunks]
        + [("read", f"t1/{path}") for path in saved.documents]
    )


def test_what_can_t_be_read_is_told(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(saved.run)

    def broken(self: Any, path: str, *args: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(type(checkpoint.store), "read_into", broken)
    problems = verify(checkpoint)
    assert [p.what for p in problems] == ["can't be read (Input/output error)"] * len(saved.chunks)


# --- absent: sizes alone ---------------------------------------------------------------------------------


def absent(saved: Saved) -> list[Problem]:
    return ckpt.absent(open_checkpoint(saved.run))


def test_absent_finds_nothing_in_a_whole_checkpoint(saved: Saved) -> None:
    assert absent(saved) == []


def test_absent_names_missing_objects_and_other_sizes(saved: Saved) -> None:
    chunk, other, document = "atoms/w/fp32/c.1.0", "atoms/count/value/c", "atoms/count/zarr.json"
    size = len(saved.get(other))
    with saved.changed((chunk, None), (other, saved.get(other)[:-1]), (document, None)):
        found = {str(problem) for problem in absent(saved)}
    missing = [saved.found(path, "is missing") for path in (chunk, document)]
    cut_short = saved.found(other, f"has {size - 1} bytes instead of {size}")
    assert found == {str(problem) for problem in (*missing, cut_short)}


def test_absent_reads_no_bytes(saved: Saved) -> None:
    path = "atoms/w/fp32/c.1.0"
    with saved.changed((path, b"x" * len(saved.get(path)))):
        assert absent(saved) == []


def test_absent_names_a_chunk_without_a_record(saved: Saved) -> None:
    with saved.with_manifest(lambda manifest: manifest["chunks"][W_PATH].pop("c.1.0")):
        (problem,) = absent(saved)
    assert (problem.atom, problem.state, problem.chunk) == (*AN_ARRAY, "c.1.0")
    assert problem.path.endswith("manifest.json")
