"""Files of `torch.save`, without torch: tensors stay in the file, which is mapped into memory.

The file is a zip archive: a pickle, `data.pkl`, and uncompressed beside it the bytes of each storage, to
which the pickle refers by key (https://docs.pytorch.org/docs/stable/notes/serialization.html). A storage is
checked against the archive's CRC-32 when a tensor of it is first read.
"""

from __future__ import annotations

import struct
import threading
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt import CheckpointError, numpy_dtype
from uni3d.foreign.pickles import Function, TypeName, read_pickle

_STORAGES = {
    "BFloat16Storage": "bfloat16",
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ShortStorage": "int16",
    "UntypedStorage": "uint8",
}
_DTYPES = {
    **{name: name for name in _STORAGES.values()},
    **{name: name for name in ("uint16", "uint32", "uint64")},
}
_CHECK_BYTES = 16 << 20
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # its signature; the lengths of the name and of the extra field


class Storage:
    """The bytes of one or more tensors, in an archive."""

    def __init__(self, file: TorchFile, key: str, begin: int, size: int, checksum: int) -> None:
        self.file, self.key = file, key
        self._begin, self.size, self._checksum = begin, size, checksum
        self._checked = False
        self._lock = threading.Lock()

    def read(self) -> npt.NDArray[np.uint8]:
        """All of it, in the file's memory, verified.

        Raises:
            CheckpointError: it isn't what was written.
        """
        data = self.file.bytes[self._begin : self._begin + self.size]
        with self._lock:
            if not self._checked and self.file.verify:
                found = 0
                for start in range(0, self.size, _CHECK_BYTES):
                    found = zlib.crc32(data[start : start + _CHECK_BYTES].data, found)
                if found != self._checksum:
                    raise CheckpointError(
                        f"{self.file.path} is damaged: data/{self.key} has the CRC-32 {found:08x}, and was "
                        f"written with {self._checksum:08x} (if torch was told not to compute it, by "
                        "torch.serialization.set_crc32_options(False), add --no-checksums)"
                    )
            self._checked = True
        return data


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file of torch's, not read yet."""

    storage: Storage
    dtype: str
    offset: int
    """In elements."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""
    requires_grad: bool = False

    @property
    def identity(self) -> tuple[Any, ...]:
        """The same for two that are the same part of the same memory: tied weights."""
        where = (str(self.storage.file.path), self.storage.key)
        return (*where, self.dtype, self.offset, self.shape, self.strides)

    @property
    def size(self) -> int:
        return prod(self.shape)

    def read(self) -> npt.NDArray[Any]:
        """Its values, verified: a view of the file's memory, which can't be written to."""
        dtype = numpy_dtype(self.dtype)
        data = self.storage.read()[self.offset * dtype.itemsize :]
        if self.size == 0:
            return np.empty(self.shape, dtype)
        extent = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        flat = np.frombuffer(data, dtype, count=extent)
        strides = [step * dtype.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)


class TorchFile:
    """A file that `torch.save` wrote."""

    def __init__(
        self,
        path: Path,
        *,
        data: memoryview | None = None,
        verify: bool = True,
        stand_ins: Collection[str] = (),
    ) -> None:
        """Open it; only its directory is read.

        Args:
            path: the file.
            data: the archive, where it is only a part of the file.
            verify: whether storages are checked.
            stand_ins: more classes that may be pickled in it, as `pickles.read_pickle` has it.

        Raises:
            CheckpointError: it isn't such a file.
        """
        self.path, self.verify, self._stand_ins = path, verify, stand_ins
        try:
            whole = np.memmap(path, np.uint8, mode="r") if data is None else np.frombuffer(data, np.uint8)
        except ValueError:
            whole = np.empty(0, np.uint8)  # an empty file can't be mapped
        self.bytes: npt.NDArray[np.uint8] = whole
        self._entries = _directory(path, whole)
        names = [name for name in self._entries if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise CheckpointError(f"{path} is a zip archive, but not one of torch.save: it has no data.pkl")
        self._root = names[0].removesuffix("data.pkl")
        if f"{self._root}constants.pkl" in self._entries:
            raise CheckpointError(f"{path} is a TorchScript program, not a state_dict; save its state_dict()")
        order = self._entries.get(f"{self._root}byteorder")
        if order is not None and bytes(self._part(order)) != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine, which isn't read")
        self._storages: dict[str, Storage] = {}

    def load(self) -> Any:
        """What was saved, with a `StoredTensor` for each tensor.

        Raises:
            CheckpointError: it is damaged, or has something in it that isn't read.
        """
        entry = self._entries[f"{self._root}data.pkl"]
        data = bytes(self._part(entry))
        if self.verify and zlib.crc32(data) != entry.CRC:
            raise CheckpointError(f"{self.path} is damaged: its data.pkl isn't what was written")
        return read_pickle(
            data, str(self.path), stand_ins=self._stand_ins, names=NAMES, persistent=self._storage
        )

    def _storage(self, pid: Any) -> tuple[Storage, str]:
        """A storage that the pickle refers to, and the type of its elements."""
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(dtype, TypeName) or dtype.name not in _STORAGES:
            raise CheckpointError(f"{self.path} has a storage of an unknown kind: {dtype}")
        name = _STORAGES[dtype.name]
        entry = self._entries.get(f"{self._root}data/{key}")
        size = numel * numpy_dtype(name).itemsize
        if entry is None or entry.file_size != size:
            found = "nothing" if entry is None else f"{entry.file_size} bytes"
            raise CheckpointError(f"{self.path} is damaged: data/{key} should have {size} bytes, has {found}")
        if key not in self._storages:
            begin = _begin(self.path, self.bytes, entry)
            self._storages[key] = Storage(self, key, begin, size, entry.CRC)
        return self._storages[key], name

    def _part(self, entry: zipfile.ZipInfo) -> npt.NDArray[np.uint8]:
        begin = _begin(self.path, self.bytes, entry)
        return self.bytes[begin : begin + entry.file_size]


def is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _directory(path: Path, data: npt.NDArray[np.uint8]) -> dict[str, zipfile.ZipInfo]:
    if bytes(data[:4]) != b"PK\x03\x04":
        old = bytes(data[:2]) == b"\x80\x02"  # a pickle
        raise CheckpointError(
            f"{path} is not a file of torch.save"
            + (
                ", or one in the format before torch 1.6; load and save it again by a current torch"
                if old
                else ""
            )
        )
    try:
        with zipfile.ZipFile(_Reader(data)) as archive:
            return {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is damaged, or was cut short: {error}") from None


def _begin(path: Path, data: npt.NDArray[np.uint8], entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin in the archive."""
    start = entry.header_offset
    header = bytes(data[start : start + _LOCAL_HEADER.size])
    if len(header) < _LOCAL_HEADER.size:
        raise CheckpointError(f"{path} is cut short")
    signature, name, extra = _LOCAL_HEADER.unpack(header)
    begin = start + _LOCAL_HEADER.size + name + extra
    if signature != b"PK\x03\x04" or begin + entry.file_size > len(data):
        raise CheckpointError(f"{path} is damaged at {entry.filename}")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{path} has {entry.filename} compressed, which torch.save doesn't do")
    return int(begin)


class _Reader:
    """Memory as a file, which `zipfile` reads the archive's directory from."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self._data, self._at = data, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, len(self._data))[whence]
        if self._at < 0:
            raise OSError("it is too short")
        return self._at

    def read(self, n: int = -1) -> bytes:
        end = len(self._data) if n < 0 else min(len(self._data), self._at + n)
        data = bytes(self._data[self._at : end])
        self._at += len(data)
        return data


# --- the functions by which torch's pickles put tensors together ------------------------------------------


def _tensor(
    storage: tuple[Storage, str], offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *rest: Any
) -> StoredTensor:
    """`torch._utils._rebuild_tensor_v2`."""
    where, dtype = storage
    return _checked(where, dtype, offset, shape, strides, requires_grad=bool(rest and rest[0] is True))


def _typed_tensor(
    storage: tuple[Storage, str],
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    dtype: TypeName,
    *rest: Any,
) -> StoredTensor:
    """`torch._utils._rebuild_tensor_v3`: of types for which there are no storages."""
    return _checked(storage[0], _DTYPES[dtype.name], offset, shape, strides, requires_grad=requires_grad)


def _checked(
    storage: Storage,
    dtype: str,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    *,
    requires_grad: bool,
) -> StoredTensor:
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError(f"a tensor of the shape {shape} with the strides {strides} at {offset}")
    tensor = StoredTensor(storage, dtype, offset, tuple(shape), tuple(strides), requires_grad)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    itemsize = numpy_dtype(dtype).itemsize
    if tensor.size and (last + 1) * itemsize > storage.size:
        raise ValueError(f"a tensor of the shape {shape} reaches beyond its storage data/{storage.key}")
    if tensor.size * itemsize > storage.size:  # expanded along a dim: a few bytes may say to be terabytes
        raise ValueError(
            f"a tensor of the shape {shape} with the strides {strides}, which repeats what is in its "
            "storage; save it after contiguous()"
        )
    return tensor


def _parameter(data: StoredTensor, requires_grad: bool = True, *rest: Any) -> StoredTensor:
    return StoredTensor(data.storage, data.dtype, data.offset, data.shape, data.strides, bool(requires_grad))


def _with_attributes(function: Any, kind: Any, args: tuple[Any, ...], state: Any) -> Any:
    """`torch._tensor._rebuild_from_type_v2`: a tensor with attributes of its own, which are left out."""
    if not isinstance(kind, TypeName):
        raise ValueError(
            f"a tensor of the class {getattr(kind, 'name', kind)}; save plain tensors, whole ones"
        )
    return function(*args)


NAMES: dict[str, Any] = {
    "torch._tensor._rebuild_from_type_v2": Function(_with_attributes),
    "torch._utils._rebuild_parameter": Function(_parameter),
    "torch._utils._rebuild_parameter_with_state": Function(_parameter),
    "torch._utils._rebuild_tensor": Function(_tensor),
    "torch._utils._rebuild_tensor_v2": Function(_tensor),
    "torch._utils._rebuild_tensor_v3": Function(_typed_tensor),
    "torch._tensor.Tensor": TypeName("torch.Tensor"),
    "torch.Tensor": TypeName("torch.Tensor"),
    "torch.nn.parameter.Parameter": TypeName("torch.nn.Parameter"),
    "torch.storage.UntypedStorage": TypeName("UntypedStorage"),
    **{f"torch.{name}": TypeName(name) for name in _STORAGES},
    **{f"torch.{name}": TypeName(name) for name in _DTYPES},
    **{
        f"torch.{name}": TypeName(f"torch.{name}")
        for name in (
            "complex64",
            "complex128",
            "float8_e4m3fn",
            "float8_e5m2",
            "strided",
            "contiguous_format",
        )
    },
}
"""What a file of `torch.save` may name beside what every pickle may."""
