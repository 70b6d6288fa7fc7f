"""A model of a disk that loses its power: what wasn't synced is kept, lost, cut or zero, in any order.

The entries of a folder change by steps, one for each call, and a rename is one step. Each step that no sync
has reached is kept or not, whatever came before it or after it. A file has the bytes of its last sync, and
any of the writes since: whole, cut short, or as zeros. That is all that POSIX says; real file systems
promise more.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from ckpt.stores import files

TRUNCATED = -1
"""Offset that stands for the cut of a whole file, which is kept or not as a write is."""
Operation = tuple[Any, ...]
"""Name of a call and its arguments, paths as tuples of names below the traced folder."""


@contextmanager
def traced(root: Path, *, walk: bool) -> Iterator[list[Operation]]:
    """Record, in order, all calls that change or sync what is below `root`. Nothing is really synced.

    With `walk` the system has no `syncfs` of use, and each file is synced by itself.
    """
    log: list[Operation] = []
    lock = threading.RLock()
    real = {
        name: getattr(os, name) for name in ("open", "pwritev", "mkdir", "link", "rename", "unlink", "rmdir")
    }
    exchange = files.exchange_folders

    def parts(path: Any, dir_fd: int | None = None) -> tuple[str, ...]:
        folder = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        return Path(os.path.join(folder, os.fspath(path))).relative_to(root).parts

    def of(fd: int) -> tuple[str, ...]:
        return parts(os.readlink(f"/proc/self/fd/{fd}"))

    def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if not flags & os.O_CREAT:
            return int(real["open"](path, flags, mode, dir_fd=dir_fd))
        with lock:
            new = not os.path.lexists(path)
            assert new or not flags & os.O_TRUNC
            fd = int(real["open"](path, flags, mode, dir_fd=dir_fd))
            if new:
                log.append(("create", parts(path, dir_fd)))
        return fd

    def written(fd: int, views: Any, offset: int) -> int:
        with lock:
            n = int(real["pwritev"](fd, views, offset))
            log.append(("write", of(fd), offset, b"".join(map(bytes, views))[:n]))
        return n

    def changing(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*paths: Any, dir_fd: int | None = None, **more: Any) -> None:
            found = [parts(path, dir_fd) for path in paths if not isinstance(path, int)]
            with lock:
                call(*paths, **more, **({} if dir_fd is None else {"dir_fd": dir_fd}))
                log.append((name, *found))

        return changed

    def synced(fd: int) -> None:
        with lock:
            log.append(("fsync", of(fd)))

    patches = {"open": opened, "pwritev": written, "fsync": synced}
    names = {"mkdir": "mkdir", "link": "link", "rename": "rename", "unlink": "remove", "rmdir": "remove"}
    patches |= {call: changing(name, real[call]) for call, name in names.items()}
    of_files: dict[str, Any] = {"exchange_folders": changing("exchange", exchange)}
    if walk:
        of_files["_reports_errors"] = lambda release: False
    else:
        of_files["sync_tree"] = lambda folder: log.append(("syncfs",))
    with mock.patch.multiple(os, **patches), mock.patch.multiple(files, **of_files):
        yield log


class File:
    """A file: its bytes at the last sync, and the writes since."""

    def __init__(self, durable: bytes = b"") -> None:
        self.durable = durable
        self.writes: list[tuple[int, bytes]] = []

    def sync(self) -> None:
        self.durable = self.after(lambda offset, data: data)
        self.writes = []

    def after(self, part: Callable[[int, bytes], bytes | None]) -> bytes:
        """Return the bytes if of each write `part` gets through."""
        data = bytearray(self.durable)
        for offset, written in self.writes:
            kept = part(offset, written)
            if kept is not None and offset == TRUNCATED:
                data.clear()
            elif kept is not None:
                data.extend(bytes(max(0, offset + len(kept) - len(data))))
                data[offset : offset + len(kept)] = kept
        return bytes(data)


class Folder:
    """A folder: its entries now and at the last sync, and the steps since."""

    def __init__(self) -> None:
        self.now: dict[str, File | Folder] = {}
        self.durable: dict[str, File | Folder] = {}
        self.steps: list[Step] = []

    def sync(self) -> None:
        for step in self.steps:
            step.apply(self, self.durable)
        self.steps = []


class Step:
    """A change of entries that is made as one."""

    def __init__(self, *changes: tuple[Folder, str, File | Folder | None]) -> None:
        self.changes = changes
        for folder in {id(folder): folder for folder, _, _ in changes}.values():
            self.apply(folder, folder.now)
            folder.steps.append(self)

    def apply(self, folder: Folder, entries: dict[str, File | Folder]) -> None:
        """Make those of the changes that are in `folder` to its entries."""
        for where, name, entry in self.changes:
            if where is folder and entry is None:
                entries.pop(name, None)
            elif where is folder and entry is not None:
                entries[name] = entry


class Disk:
    """A tree of folders and files, all of it durable at first."""

    def __init__(self, root: Path) -> None:
        self.nodes: list[File | Folder] = []
        self.root = self._loaded(root, {})

    def _new(self, node: Any) -> Any:
        self.nodes.append(node)
        return node

    def _loaded(self, path: Path, known: dict[int, File]) -> Folder:
        folder: Folder = self._new(Folder())
        for child in sorted(path.iterdir()):
            number = child.stat().st_ino
            if child.is_dir():
                folder.now[child.name] = self._loaded(child, known)
            else:
                if number not in known:
                    known[number] = self._new(File(child.read_bytes()))
                folder.now[child.name] = known[number]
        folder.durable = dict(folder.now)
        return folder

    def at(self, path: tuple[str, ...]) -> Any:
        node: Any = self.root
        for name in path:
            node = node.now[name]
        return node

    def do(self, operation: Operation) -> None:
        """Do an operation of a trace."""
        name, *paths = operation
        if name == "syncfs":
            for node in self.nodes:
                node.sync()
            return
        node = None if name in ("create", "mkdir") else self.at(paths[0])
        if name == "fsync":
            node.sync()
        elif name in ("write", "truncate"):
            node.writes.append((paths[1], paths[2]) if name == "write" else (TRUNCATED, b""))
        else:
            (a, first), *others = [(self.at(path[:-1]), path[-1]) for path in paths]
            if name in ("create", "mkdir"):
                Step((a, first, self._new(File() if name == "create" else Folder())))
            elif name == "remove":
                Step((a, first, None))
            else:
                ((b, second),) = others
                moved = {"link": node, "rename": None, "exchange": b.now.get(second)}[name]
                Step((a, first, moved), (b, second, node)) if name != "link" else Step((b, second, node))

    def cut(self, rng: Random) -> "Cut":
        """Return a state in which the disk may be after a power cut."""
        return Cut(self, rng)


class Cut:
    """A tree after a power cut."""

    def __init__(self, disk: Disk, rng: Random) -> None:
        self.disk, self.rng = disk, rng
        steps = list(
            {id(step): step for node in disk.nodes if isinstance(node, Folder) for step in node.steps}
        )
        self.kept = set(_chosen(steps, rng))
        self.likely = rng.choice((0.0, 0.2, 0.5, 0.9, 1.0))
        self.whole = rng.random() < 0.5
        self.contents: dict[int, bytes] = {}

    def _part(self, offset: int, data: bytes) -> bytes | None:
        if self.rng.random() >= self.likely:
            return bytes(len(data)) if self.rng.random() < 0.3 else None  # its length without its content
        if self.whole:
            return data
        kept = self.rng.randint(0, len(data))
        return data[:kept] + bytes(len(data) - kept) if self.rng.random() < 0.5 else data[:kept]

    def tree(self, folder: Folder | None = None) -> dict[str, Any]:
        """Return the names below a folder: a tree for a folder, and a `File` for a file."""
        folder = folder or self.disk.root
        entries = dict(folder.durable)
        for step in folder.steps:
            if id(step) in self.kept:
                step.apply(folder, entries)
        found: dict[str, Any] = {}
        for name, node in entries.items():
            if isinstance(node, Folder):
                found[name] = self.tree(node)
            else:
                found[name] = node
                if id(node) not in self.contents:
                    self.contents[id(node)] = node.after(self._part) if node.writes else node.durable
        return found

    def make(self, place: Path) -> None:
        """Write the state into a folder."""
        made: dict[int, Path] = {}

        def write(tree: dict[str, Any], folder: Path) -> None:
            folder.mkdir()
            for name, node in tree.items():
                if isinstance(node, dict):
                    write(node, folder / name)
                elif id(node) in made:
                    os.link(made[id(node)], folder / name)
                else:
                    made[id(node)] = folder / name
                    (folder / name).write_bytes(self.contents[id(node)])

        write(self.tree(), place)

    def identity(self) -> int:
        """Return a number that is the same for equal states of one disk."""

        def of(tree: dict[str, Any]) -> Any:
            nodes = sorted(tree.items())
            return tuple((n, of(e) if isinstance(e, dict) else self.contents[id(e)]) for n, e in nodes)

        return hash(of(self.tree()))


def _chosen(steps: list[int], rng: Random) -> list[int]:
    """Choose which of the unsynced steps are kept: none, all, one, all but one, the first, or any."""
    way = rng.randrange(8)
    if way == 0 or not steps:
        return []
    one = rng.randrange(len(steps))
    if way < 5:
        return [steps, steps[one : one + 1], steps[:one] + steps[one + 1 :], steps[:one]][way - 1]
    likely = rng.random()
    return [step for step in steps if rng.random() < likely]
