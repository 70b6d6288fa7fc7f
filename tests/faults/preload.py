"""Calls of a process to the file system, counted by a C library, `calls.c`, which is built when needed."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_name("calls.c")


class Call(NamedTuple):
    """A call that changed or synced what is below the watched folder."""

    name: str
    path: str
    other: str
    """Second path of a call that has two."""
    offset: int
    data: bytes
    """Bytes that a write wrote."""


def build(folder: Path) -> Path:
    """Build the library in a folder; return its path.

    Raises:
        RuntimeError: there is no C compiler, or it fails.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError(
            "counting the calls of other libraries needs a C compiler (cc or gcc): install one"
        )
    path = folder / "calls.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(path), str(SOURCE), "-ldl", "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return path


def preloaded() -> bool:
    """Return whether this process was started with the library."""
    return hasattr(ctypes.CDLL(None), "watched")


def watch(folder: Path, *, kill_at: int = 0, part: float = 0.0, log: int = -1) -> None:
    """Count the calls of this process from now on, and kill it at one of them, when `part` of it is done."""
    library = ctypes.CDLL(None)
    library.watch.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_double, ctypes.c_int]
    library.watch(os.fsencode(folder), kill_at, part, log)


def read_log(path: Path) -> list[Call]:
    """Read the calls of a log that a watched process wrote."""
    calls = []
    with path.open("rb") as file:
        while line := file.readline():
            name, offset, size, first, second = line.decode().rstrip("\n").split("\t")
            data = file.read(int(size)) if name == "write" else b""
            calls.append(Call(name, first, second, int(offset), data))
    return calls
