"""System calls on files and folders, and systems that don't have all of them."""

import ctypes
import errno
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from ckpt_helpers import check_read, save_arrays

from ckpt import CheckpointError
from ckpt.stores import files

ARRAYS = {("w", "fp32"): np.arange(3000, dtype=np.float32)}


def as_link(path: Path) -> None:
    path.with_name("other").write_bytes(b"abc")
    path.symlink_to("other")


@pytest.mark.parametrize(
    ("make", "code", "why"),
    [
        (lambda path: None, errno.ENOENT, "No such file"),
        (Path.mkdir, errno.EISDIR, "Is a directory"),
        (os.mkfifo, errno.EINVAL, "it isn't a regular file"),
        (as_link, errno.ELOOP, "it is a symbolic link"),
        (lambda path: path.write_bytes(b"abcd"), errno.EFBIG, "it has 4 bytes, where at most 3"),
    ],
    ids=["nothing", "folder", "pipe", "link", "too-long"],
)
def test_only_a_plain_file_of_the_right_size_is_read(tmp_path, make, code, why):
    make(tmp_path / "c")
    with pytest.raises(OSError, match=why) as caught:
        files.read_file(tmp_path / "c", 3)
    assert (caught.value.errno, caught.value.filename) == (code, str(tmp_path / "c"))


def test_a_file_of_the_most_bytes_is_read(tmp_path):
    (tmp_path / "c").write_bytes(b"abc")
    assert files.read_file(tmp_path / "c", 3) == b"abc"


def test_an_error_of_a_write_names_the_file(tmp_path):
    def full():
        yield b"abc"
        raise OSError(errno.ENOSPC, "No space left on device")

    def damaged():
        yield b"abc"
        raise OSError("no error of the system")

    with pytest.raises(OSError, match="No space") as caught:
        files.write_file(tmp_path / "c", full(), durable=False)
    assert caught.value.filename == str(tmp_path / "c")
    with pytest.raises(OSError, match=r"^no error of the system$"):
        files.write_file(tmp_path / "d", damaged(), durable=False)


def test_the_disk_is_told_to_begin_where_the_system_can(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(files, "_sync_file_range", lambda fd, *args: told.append(args))
    files.write_file(tmp_path / "a", [b"abc"], durable=False, hurry=True)
    files.write_shared(tmp_path / "b", [(2, [b"abc"])], hurry=True)
    files.write_file(tmp_path / "c", [b"abc"], durable=False)
    files.write_file(tmp_path / "d", [b"abc"], durable=True, hurry=True)
    assert told == [(0, 0, files._SYNC_FILE_RANGE_WRITE)] * 2


def other_system(*args: object, **kwargs: object) -> object:
    """Stand in for the C library of a system without Linux's own calls."""
    return types.SimpleNamespace()


def test_another_system_saves_without_linux_s_calls(tmp_path, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", other_system)
    monkeypatch.setattr(files, "_sync_file_range", files._find_sync_file_range())
    assert files._sync_file_range is None
    save_arrays(tmp_path, "t1", ARRAYS, durable=True)
    check_read(tmp_path, "t1", ARRAYS)
    with pytest.raises(CheckpointError, match=r"t1 exists and can't be replaced .*no renameat2"):
        save_arrays(tmp_path, "t1", ARRAYS, durable=True)
    check_read(tmp_path, "t1", ARRAYS)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's own calls")
def test_linux_has_them():
    libc = ctypes.CDLL(None)
    assert all(hasattr(libc, name) for name in ("syncfs", "renameat2", "sync_file_range"))


def test_from_which_release_on_a_sync_of_all_tells_of_lost_data():
    assert files._reports_errors("5.8.0-1-amd64")
    assert files._reports_errors("6.1")
    assert not files._reports_errors("5.7.19")
    assert not files._reports_errors("4.19.0-27")


def failing(code: int) -> object:
    """Stand in for a C library whose every call fails so."""

    def call(*args: object) -> int:
        ctypes.set_errno(code)
        return -1

    return types.SimpleNamespace(syncfs=call, renameat2=call)


def test_data_that_could_not_be_written_is_told_by_the_sync(tmp_path, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **more: failing(errno.EIO))
    monkeypatch.setattr(files, "_reports_errors", lambda release: True)
    with pytest.raises(OSError, match="Input/output error") as caught:
        files.sync_tree(tmp_path)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(tmp_path))


def test_an_exchange_that_fails_names_both(tmp_path, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **more: failing(errno.EINVAL))
    with pytest.raises(OSError, match="Invalid argument") as caught:
        files.exchange_folders(tmp_path / "a", tmp_path / "b")
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "a"), str(tmp_path / "b"))


def test_an_exchange_swaps_two_folders(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / f"of_{name}").touch()
    files.exchange_folders(tmp_path / "a", tmp_path / "b")
    assert [path.name for name in "ab" for path in (tmp_path / name).iterdir()] == ["of_b", "of_a"]
