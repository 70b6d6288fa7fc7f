"""Incremental saves where something is wrong: no links, damage, writers that don't keep to the agreement."""

import errno
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from ckpt_helpers import check_read, files_below
from ckpt_links import PLACES, B, V, W, arrays, data_files, linked, saved, with_one_changed

from ckpt import CheckpointError
from ckpt.links import Links
from ckpt.save import Writer
from ckpt.stores.local import LocalStore


@pytest.mark.parametrize("name", PLACES)
def test_where_there_are_no_links_files_are_copied(tmp_path, monkeypatch, name):
    def link(old: str, new: str) -> None:
        raise OSError(errno.EMLINK, "Too many links")

    content = arrays()
    saved(tmp_path, "t1", content, PLACES[name])
    monkeypatch.setattr(os, "link", link)
    report = saved(tmp_path, "t2", content, PLACES[name])
    assert linked(tmp_path) == set()
    assert report.bytes_written == 0, "but copied by the system"
    assert {stat.st_nlink for stat in data_files(tmp_path / "t2").values()} == {1}
    check_read(tmp_path, "t2", content)
    after = with_one_changed(content, W, 70, 1)
    saved(tmp_path, "t3", after, PLACES[name])
    check_read(tmp_path, "t3", after)
    check_read(tmp_path, "t1", content)


@pytest.mark.parametrize("name", PLACES)
def test_no_file_of_a_checkpoint_is_ever_opened_for_writing(tmp_path, monkeypatch, name):
    content, opened, real = arrays(), [], os.open
    saved(tmp_path, "t1", content, PLACES[name])
    before = {stat.st_ino for stat in data_files(tmp_path / "t1").values()}

    def noted(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        fd = real(path, flags, *args, **kwargs)
        if flags & (os.O_WRONLY | os.O_RDWR):
            opened.append(os.fstat(fd).st_ino)
        return fd

    monkeypatch.setattr(os, "open", noted)
    for tag in ("t2", "t3", "t1"):  # the last replaces the first
        content = with_one_changed(content, {"t2": W, "t3": V, "t1": B}[tag], 0 if tag == "t1" else 100)
        saved(tmp_path, tag, content, PLACES[name])
        assert opened
        assert not before & {*opened}
        before |= {stat.st_ino for stat in data_files(tmp_path / tag).values()}
        opened.clear()
        check_read(tmp_path, tag, content)


@pytest.mark.parametrize("culprit", [0, 2])
def test_a_rank_that_writes_what_another_has_linked_fails(tmp_path, monkeypatch, culprit):
    """A second guard, should the agreement ever be wrong: the older checkpoint isn't touched."""
    content = arrays()
    saved(tmp_path, "t1", content)
    before, real = files_below(tmp_path), Writer.write_chunks

    def write_chunks(self: Writer, writes: Any, linked: Any = ()) -> None:
        writes = list(writes)
        if any(w.chunk.writer == culprit for w in writes):
            linked = ()
            for write in writes:
                if not callable(write.data):
                    write.data = write.data + 1
        real(self, writes, linked)

    monkeypatch.setattr(Writer, "write_chunks", write_chunks)
    with pytest.raises(CheckpointError, match=r"FileExistsError|File exists"):
        saved(tmp_path, "t2", content)
    assert files_below(tmp_path) == before


def damaged(path: Path, what: str) -> None:
    data = bytearray(path.read_bytes())
    if what == "missing":
        path.unlink()
        return
    if what == "cut short":
        del data[-1:]
    elif what == "longer":
        data += b"\0"
    else:
        data[int(what) % len(data)] ^= 1  # files of one writer are smaller
    path.unlink()  # rather than change what may have another name
    path.write_bytes(data)


def test_a_file_is_the_same_by_its_size_and_its_bytes(tmp_path):
    """Whatever of it is asked for: a rank compares only its own part."""
    (tmp_path / "t1").mkdir()
    (tmp_path / "t1" / "c").write_bytes(b"abcdef")
    links = Links(LocalStore(str(tmp_path), tmp_path), "t1", ".saving.t2")
    for path, size, offset, part, same in [
        *[("c", 6, 0, b"abc", True), ("c", 6, 3, b"def", True), ("c", 6, 0, b"", True)],
        *[("c", 5, 0, b"abc", False), ("c", 7, 0, b"abc", False), ("c", 6, 1, b"abc", False)],
        *[("c", 6, 4, b"efg", False), ("d", 6, 0, b"abc", False)],
    ]:
        assert links.may_be_same(path, size, (offset, [part])) == same, (path, size, offset, part)
        assert links.same(path, size, [(offset, [part])]) == same, (path, size, offset, part)
    assert links.same("c", 6, [(0, [b"ab", b"c"]), (4, [b"ef"])])
    assert not links.same("c", 6, [(0, [b"ab", b"c"]), (4, [b"ex"])])


DAMAGES = ["missing", "cut short", "longer"]
DAMAGES += ["0", "3000", "3841", "3844", "4095", "15000", "16383", "20479", "49151", "49152"]
"""Bytes of chunks, of a checksum, of gaps between chunks of one writer and of two, and of the index."""


@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("files", ["array", "writer"])
def test_damage_is_not_inherited(tmp_path, name, what, files):
    content = {W: arrays()[W]}
    boxes = {W: PLACES[name][W]}
    saved(tmp_path, "t1", content, boxes, {"files": files})
    (*_, path) = sorted((tmp_path / "t1" / "atoms/w/fp32").glob("c*"))
    damaged(path, what)
    saved(tmp_path, "t2", content, boxes, {"files": files})
    assert path.name not in {
        p.name for p in (tmp_path / "t2/atoms/w/fp32").glob("c*") if p.stat().st_nlink > 1
    }
    check_read(tmp_path, "t2", content)


@pytest.mark.parametrize("name", PLACES)
def test_of_what_has_changed_little_is_read(tmp_path, monkeypatch, name):
    """Most arrays of a training run have changed everywhere."""
    content = arrays()
    saved(tmp_path, "t1", content, PLACES[name])
    monkeypatch.setattr(LocalStore, "same", mock.Mock(side_effect=AssertionError("compared whole")))
    real, read = LocalStore.read_into, []

    def noted(self: LocalStore, path: str, buffer: memoryview, offset: int) -> int:
        read.append(len(buffer))
        return real(self, path, buffer, offset)

    monkeypatch.setattr(LocalStore, "read_into", noted)
    after = {key: a + 1 for key, a in content.items()}
    saved(tmp_path, "t2", after, PLACES[name])
    assert len(read) <= sum(len(b) for b in PLACES[name].values())
    assert max(read) <= 4096
    monkeypatch.undo()
    check_read(tmp_path, "t2", after)
