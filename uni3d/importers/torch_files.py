"""Files of `torch.save`, read without torch and mapped into memory.

Such a file is a zip archive of a pickle, `data.pkl`, and the uncompressed bytes of each storage, to which the
pickle refers by key (https://docs.pytorch.org/docs/stable/notes/serialization.html). A storage is checked
against the archive's CRC-32 when one of its tensors is first read.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt import CheckpointError, numpy_dtype
from uni3d.importers.pickles import TypeName, read_pickle
from uni3d.importers.source import Options
from uni3d.importers.torch_tensors import NAMES, STORAGES, Storage

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field


class TorchFile:
    """A file written by `torch.save`."""

    def __init__(self, path: Path, options: Options, data: memoryview | None = None) -> None:
        """Read the archive's directory. `data` is the archive, if it is only a part of the file.

        Raises:
            CheckpointError: the file isn't such an archive.
        """
        self.path, self._options = path, options
        try:
            whole = np.memmap(path, np.uint8, mode="r") if data is None else np.frombuffer(data, np.uint8)
        except ValueError:
            whole = np.empty(0, np.uint8)  # an empty file can't be mapped
        self._bytes: npt.NDArray[np.uint8] = whole
        self._entries = _directory(path, whole)
        names = [name for name in self._entries if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise CheckpointError(f"{path} is a zip archive without data.pkl, so torch.save didn't write it")
        self._root = names[0].removesuffix("data.pkl")
        if f"{self._root}constants.pkl" in self._entries:
            raise CheckpointError(f"{path} is a TorchScript program, not a state_dict; save its state_dict()")
        order = self._entries.get(f"{self._root}byteorder")
        if order is not None and bytes(self._part(order)) != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine, which isn't supported")
        self._storages: dict[str, Storage] = {}

    def load(self) -> Any:
        """Return the saved object, with a `StoredTensor` for each tensor."""
        entry = self._entries[f"{self._root}data.pkl"]
        data = bytes(self._part(entry))
        if self._options.verify and zlib.crc32(data) != entry.CRC:
            raise CheckpointError(f"{self.path} is damaged: the CRC-32 of data.pkl doesn't match")
        return read_pickle(
            data,
            str(self.path),
            stand_ins=self._options.stand_ins,
            names=NAMES,
            persistent=self._storage,
            trust=self._options.trust,
        )

    def _storage(self, pid: Any) -> tuple[Storage, str]:
        """Return the storage of a persistent id, and the type of its elements."""
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(dtype, TypeName) or dtype.name not in STORAGES:
            raise CheckpointError(f"{self.path} has a storage of an unknown kind: {dtype}")
        name = STORAGES[dtype.name]
        entry = self._entries.get(f"{self._root}data/{key}")
        size = numel * numpy_dtype(name).itemsize
        if entry is None or entry.file_size != size:
            found = "nothing" if entry is None else f"{entry.file_size} bytes"
            raise CheckpointError(f"{self.path} is damaged: data/{key} has {found}, expected {size} bytes")
        if key not in self._storages:
            checksum = entry.CRC if self._options.verify else None
            self._storages[key] = Storage(self.path, key, self._part(entry), checksum)
        return self._storages[key], name

    def _part(self, entry: zipfile.ZipInfo) -> npt.NDArray[np.uint8]:
        """Return an entry's bytes."""
        start = entry.header_offset
        header = bytes(self._bytes[start : start + _LOCAL_HEADER.size])
        if len(header) < _LOCAL_HEADER.size:
            raise CheckpointError(f"{self.path} is truncated")
        signature, name, extra = _LOCAL_HEADER.unpack(header)
        begin = start + _LOCAL_HEADER.size + name + extra
        if signature != b"PK\x03\x04" or begin + entry.file_size > len(self._bytes):
            raise CheckpointError(f"{self.path} is damaged at {entry.filename}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{self.path} has {entry.filename} compressed; torch.save never compresses")
        return self._bytes[begin : begin + entry.file_size]


def load(path: Path, options: Options) -> Any:
    """Return the object in the file, as `TorchFile.load`."""
    return TorchFile(path, options).load()


def is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _directory(path: Path, data: npt.NDArray[np.uint8]) -> dict[str, zipfile.ZipInfo]:
    if bytes(data[:4]) != b"PK\x03\x04":
        old = bytes(data[:2]) == b"\x80\x02"  # a pickle
        raise CheckpointError(
            f"{path} has the format of torch before 1.6; load and save it again with a current torch"
            if old
            else f"{path} isn't a file of torch.save"
        )
    try:
        with zipfile.ZipFile(_Reader(data)) as archive:
            return {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is damaged or truncated: {error}") from None


class _Reader:
    """File-like view of memory, for `zipfile`."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self._data, self._at = data, 0

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, len(self._data))[whence]
        if self._at < 0:
            raise OSError("the archive is too short")
        return self._at

    def read(self, n: int = -1) -> bytes:
        end = len(self._data) if n < 0 else min(len(self._data), self._at + n)
        data = bytes(self._data[self._at : end])
        self._at += len(data)
        return data
