"""Direct calls to the local file system: whole writes, exact reads, durable and atomic renames."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ckpt.checksums import Buffer

LINK = "it is a symbolic link, which can lead out of the checkpoint; put a copy in its place"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
_SMALL = 4 << 10
"""A part of up to this many bytes goes along with the write before it."""
_AT_ONCE = 256 << 10
"""Bytes to collect before a `writev`: few calls, of parts that are still in the processor's cache."""


_MOST_PARTS = 512
"""Most parts of one `pwritev`; Linux takes 1,024."""


@contextmanager
def opened(path: str | Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a file or a folder, and yield its descriptor. Errors of what is done with it name the path."""
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a write finds a full disk, but knows no name
            error.filename = str(path)
        raise
    finally:
        os.close(fd)


@contextmanager
def opened_to_read(path: str | Path) -> Iterator[int]:
    """Open a regular file to read it, and yield its descriptor.

    Raises:
        OSError: there is none, or it is anything else: a pipe would be waited for without end, and a link can
            lead out of the checkpoint.
    """
    try:
        # Without waiting: only so does the open of a pipe return.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, LINK, str(path)) from None
        raise
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it isn't a regular file", str(path))
        yield fd
    finally:
        os.close(fd)


def read_file(path: str | Path, most: int) -> bytes:
    """Read a whole regular file of at most so many bytes; raises OSError if it is longer."""
    with opened_to_read(path) as fd:
        if (size := os.fstat(fd).st_size) > most:
            raise OSError(errno.EFBIG, f"it has {size} bytes, where at most {most} are expected", str(path))
        with open(fd, "rb", closefd=False) as file:
            return file.read()


def write_file(path: str | Path, parts: Iterable[Buffer], *, durable: bool, hurry: bool = False) -> None:
    """Write a new file from `parts`, one behind the other.

    With `durable`, it is on the disk on return; with `hurry`, writing to the disk has begun, so that a later
    sync of many files finds most of its work done.

    Raises:
        FileExistsError: the file exists. Another checkpoint may link to it, so it is never overwritten.
    """
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
        _write_parts(fd, parts, 0)
        if durable:
            os.fsync(fd)
        elif hurry:
            begin_to_sync(fd)


def write_shared(path: str | Path, runs: Iterable[tuple[int, Iterable[Buffer]]], *, hurry: bool) -> None:
    """Write runs of bytes, each from its offset, into a file that other processes write too.

    Raises:
        FileExistsError: the file has a second name, so that it is another checkpoint's too.
    """
    with opened(path, os.O_WRONLY | os.O_CREAT) as fd:
        if os.fstat(fd).st_nlink > 1:
            raise FileExistsError(f"{path} is linked to another checkpoint's file and can't be written")
        for offset, parts in runs:
            _write_parts(fd, parts, offset)
        if hurry:
            begin_to_sync(fd)


def _write_parts(fd: int, parts: Iterable[Buffer], offset: int) -> None:
    """Write `parts`, one behind the other, from `offset`."""
    waiting: list[memoryview] = []
    size = 0
    for part in parts:
        view = memoryview(part).cast("B")
        # A short last part joins the waiting ones.
        if (size >= _AT_ONCE and len(view) > _SMALL) or len(waiting) == _MOST_PARTS:
            _write_all(fd, waiting, offset)
            waiting, offset, size = [], offset + size, 0
        waiting.append(view)
        size += len(view)
    _write_all(fd, waiting, offset)


def _write_all(fd: int, views: list[memoryview], offset: int) -> None:
    """Write all of `views` from `offset`; the list is emptied."""
    while views:
        written = os.pwritev(fd, views, offset)  # short writes are legal, and usual above 2 GiB
        offset += written
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if views:
            views[0] = views[0][written:]


def begin_to_sync(fd: int, offset: int = 0, size: int = 0) -> None:
    """Begin to write `size` bytes of a file to the disk; with 0, all from `offset`."""
    if _sync_file_range is not None:
        _sync_file_range(fd, offset, size, _SYNC_FILE_RANGE_WRITE)  # a hint, so its result doesn't matter


def _find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Return Linux's `sync_file_range`, which Python doesn't expose; None on other systems."""
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call


_sync_file_range = _find_sync_file_range()


def read_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset` of the file; return the bytes read, fewer only at the file's end."""
    done = 0
    while done < len(buffer):
        got = os.preadv(fd, [buffer[done:]], offset + done)
        if got == 0:
            break
        done += got
    return done


def write_at(fd: int, buffer: memoryview, offset: int) -> None:
    """Write all of `buffer` at `offset` of an open file."""
    done = 0
    while done < len(buffer):
        done += os.pwrite(fd, buffer[done:], offset + done)


def sync_folder(path: str | Path) -> None:
    """Make the folder's entries durable: after a crash, a file is found only if its folder was synced too."""
    with opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)


def sync_tree(folder: Path) -> None:
    """Make every file and folder below `folder` durable.

    Uses one `syncfs` if the system has it: the disk then orders thousands of small files at once, while an
    fsync of each would wait for each.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "syncfs") and _reports_errors(os.uname().release):
        with opened(folder, os.O_RDONLY | os.O_DIRECTORY) as fd:
            if libc.syncfs(fd) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(folder))
        return
    for path, _, names in os.walk(folder, topdown=False):  # files before the folders that name them
        for name in names:
            with opened(os.path.join(path, name)) as fd:
                os.fsync(fd)
        sync_folder(path)


def _reports_errors(release: str) -> bool:
    """Return whether `syncfs` reports data that could not be written, as Linux does since 5.8."""
    return [int(n) for n in re.findall(r"\d+", release)[:2]] >= [5, 8]


def remove_tree(folder: Path) -> OSError | None:
    """Remove a folder as far as possible; return the error of what stays."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    return None


@contextmanager
def new_file(path: Path, temporary: Path | None = None, *, durable: bool) -> Iterator[int]:
    """Yield the descriptor of a file that gets its name when it is whole: if the block fails, it is deleted.

    `temporary` is its name until then. With `durable`, the file is on the disk before it is renamed, and its
    folder after it.
    """
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    try:
        with opened(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as fd:
            yield fd
            if durable:
                os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def replace_file(path: Path, content: bytes, temporary: Path, *, durable: bool) -> None:
    """Replace a small file in one step: readers see the old content or the new, never a part."""
    with new_file(path, temporary, durable=durable) as fd:
        _write_all(fd, [memoryview(content)], 0)


def exchange_folders(a: Path, b: Path) -> None:
    """Swap two folders' names in one step (Linux `renameat2`), so that neither name is ever missing.

    Raises:
        OSError: the system or the file system has no such call.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError("this system has no renameat2")
    result = libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(a), None, str(b))
