"""Tensors in files of `torch.save`, and the functions by which pickles rebuild them."""

from __future__ import annotations

import threading
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt import DTYPES, CheckpointError, numpy_dtype
from uni3d.importers.pickles import Function, TypeName

STORAGES = {
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
_CHECK_BYTES = 16 << 20


class Storage:
    """Bytes of one or more tensors in an archive."""

    def __init__(self, path: Path, key: str, data: npt.NDArray[np.uint8], checksum: int | None) -> None:
        """Wrap the bytes `data` of the archive `path`; a `checksum` of None isn't compared."""
        self.path, self.key, self.size = path, key, data.size
        self._data, self._checksum = data, checksum
        self._lock = threading.Lock()

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a storage is given a state")  # a pickle must not change its place

    def read(self) -> npt.NDArray[np.uint8]:
        """Return the verified bytes, a view of the mapped file.

        Raises:
            CheckpointError: the checksum doesn't match.
        """
        with self._lock:
            if self._checksum is not None:
                found = 0
                for start in range(0, self.size, _CHECK_BYTES):
                    found = zlib.crc32(self._data[start : start + _CHECK_BYTES].data, found)
                if found != self._checksum:
                    raise CheckpointError(
                        f"{self.path} is damaged: data/{self.key} has CRC-32 {found:08x}, expected "
                        f"{self._checksum:08x} (if it was saved with "
                        "torch.serialization.set_crc32_options(False), add --no-checksums)"
                    )
                self._checksum = None  # once is enough
        return self._data


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file of `torch.save`, not read yet."""

    storage: Storage
    dtype: str
    offset: int
    """Offset in the storage, in elements."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Strides in elements."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a tensor is given a state")  # a pickle must not change what was checked

    @property
    def identity(self) -> tuple[Any, ...]:
        """Key that is equal for tensors that are the same part of the same memory: tied weights."""
        where = (str(self.storage.path), self.storage.key)
        return (*where, self.dtype, self.offset, self.shape, self.strides)

    @property
    def size(self) -> int:
        return prod(self.shape)

    def read(self) -> npt.NDArray[Any]:
        """Return the verified values, a read-only view of the mapped file."""
        dtype = numpy_dtype(self.dtype)
        data = self.storage.read()[self.offset * dtype.itemsize :]
        if self.size == 0:
            return np.empty(self.shape, dtype)
        extent = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        flat = np.frombuffer(data, dtype, count=extent)
        strides = [step * dtype.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)

    def read_part(self, part: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Return a part, given a slice for each dim; the whole storage is verified once."""
        return self.read()[part or ...]


def item(value: Any) -> Any:
    """Return the number in a tensor of one element; other values as they are."""
    return value.read().reshape(()).item() if isinstance(value, StoredTensor) else value


# --- functions by their names in torch -----------------------------------------------------------------


def _tensor(
    storage: tuple[Storage, str], offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *rest: Any
) -> StoredTensor:
    """Stand in for `torch._utils._rebuild_tensor_v2`; `rest[2]` is the view's metadata."""
    _check_plain(rest[2] if len(rest) > 2 else None)
    return _checked(StoredTensor(*storage, offset, tuple(shape), tuple(strides)))


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
    """Stand in for `torch._utils._rebuild_tensor_v3`, for types without a storage class."""
    _check_plain(rest[0] if rest else None)
    if dtype.name not in DTYPES:
        raise ValueError(f"a tensor of type {dtype.name}, which can't be stored")
    return _checked(StoredTensor(storage[0], dtype.name, offset, tuple(shape), tuple(strides)))


def _check_plain(metadata: Any) -> None:
    """Refuse a view that negates or conjugates the stored values (`torch._neg_view`, `x.conj()`)."""
    if metadata and any(metadata.values()):
        raise ValueError(
            f"a negated or conjugated view ({dict(metadata)}); save it after resolve_neg().resolve_conj()"
        )


def _checked(tensor: StoredTensor) -> StoredTensor:
    """Return `tensor`; refuse one that isn't within its storage."""
    offset, shape, strides, storage = tensor.offset, tensor.shape, tensor.strides, tensor.storage
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError(f"a tensor of invalid shape {shape}, strides {strides} or offset {offset}")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    itemsize = numpy_dtype(tensor.dtype).itemsize
    if tensor.size and (last + 1) * itemsize > storage.size:
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage data/{storage.key}")
    if tensor.size * itemsize > storage.size:  # expanded along a dim: a few bytes may claim to be terabytes
        raise ValueError(
            f"a tensor of shape {shape} with strides {strides}, which repeats elements of its storage; save "
            "it after contiguous()"
        )
    return tensor


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _with_attributes(function: Any, kind: Any, args: tuple[Any, ...], state: Any) -> Any:
    """Stand in for `torch._tensor._rebuild_from_type_v2`; attributes of the tensor are left out."""
    if not isinstance(kind, TypeName):
        raise ValueError(f"a tensor of class {getattr(kind, 'name', kind)}; save plain, unsharded tensors")
    return function(*args)


_NAMED_ONLY = (
    *("complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
    *("strided", "contiguous_format"),
)
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
    **{f"torch.{name}": TypeName(name) for name in STORAGES},
    **{f"torch.{name}": TypeName(name) for name in DTYPES},
    **{f"torch.{name}": TypeName(f"torch.{name}") for name in _NAMED_ONLY},
}
"""Names allowed in files of `torch.save`, in addition to those of every pickle."""
