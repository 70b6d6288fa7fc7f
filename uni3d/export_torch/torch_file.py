"""Files of `torch.save` with arrays of a checkpoint, streamed: a few MiB are in memory, whatever their size.

torch writes the file without the tensors' bytes (`torch.serialization.skip_data`), for fake tensors that hold
no memory. The bytes then go to their places in that file, a zip archive whose checksums are filled in last
(https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.9 and 4.3.12).
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

import ckpt
from ckpt.parts import ArrayInfo
from ckpt.stores import files
from ckpt.threads import cores, for_each

_READ_BYTES = 4 << 20
_LOCAL = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field
_CENTRAL = struct.Struct("<4s12xI8xHHH12x")  # signature, CRC-32, lengths of name, extra field and comment
_CHECKSUM = struct.Struct("<I")
_DESCRIPTOR = b"PK\x07\x08"


class Shaped(NamedTuple):
    """An array in another shape of as many elements."""

    info: ArrayInfo
    shape: tuple[int, ...]


class _Entry(NamedTuple):
    """Place of a storage in the archive, in bytes."""

    begin: int
    size: int
    central: int
    """Place of its CRC-32 in the archive's directory."""


def write_torch_file(
    checkpoint: ckpt.Checkpoint,
    path: Path,
    content: Any,
    *,
    dtype: str | None = None,
    durable: bool = True,
    progress: Callable[[int], None] = lambda n: None,
) -> int:
    """Write `content` so that `torch.load(path, weights_only=True)` returns it; return the file's size.

    The file gets its name when it is whole.

    Args:
        checkpoint: holds the arrays.
        path: the file, in an existing folder.
        content: dicts, nested, with an `ArrayInfo` for each tensor, one that occurs twice being one tensor;
            or an object without any.
        dtype: "bfloat16" or "float16" to round parameters to.
        durable: sync the file, and its folder.
        progress: gets the bytes written.

    Raises:
        ckpt.CheckpointError: a chunk is damaged, or a number is too large for `dtype`.
        OSError: the file can't be written.
    """
    arrays: dict[ArrayInfo, Tensor] = {}
    if there_are_arrays := bool(arrays_in(content)):
        with FakeTensorMode():
            content = _with_tensors(content, dtype, arrays)
    data = skip_data(materialize_fake_tensors=True) if there_are_arrays else nullcontext()
    with files.new_file(path, durable=durable) as fd:
        with os.fdopen(fd, "wb", closefd=False) as file, data:
            torch.save(content, file)
        entries = _entries(fd, len(arrays))
        todo = [
            (info, ckpt.exported_type(info, dtype), entry.begin)
            for info, entry in zip(arrays, entries, strict=True)
        ]
        ckpt.copy_arrays(checkpoint, fd, todo, durable=durable, progress=progress)
        for_each(lambda entry: _fill_in_checksum(fd, entry), entries, cores())
        return os.fstat(fd).st_size


def arrays_in(content: Any) -> set[ArrayInfo]:
    """Return the arrays in nested dicts, each once."""
    if isinstance(content, Mapping):
        return set[ArrayInfo]().union(*map(arrays_in, content.values()))
    if isinstance(content, Shaped):
        return {content.info}
    return {content} if isinstance(content, ArrayInfo) else set()


def _with_tensors(content: Any, dtype: str | None, arrays: dict[ArrayInfo, Tensor]) -> Any:
    """Return `content` with a fake tensor for each array; they are added to `arrays`, in torch's order."""
    if isinstance(content, ArrayInfo):
        if content not in arrays:
            kind = getattr(torch, ckpt.exported_type(content, dtype))
            arrays[content] = torch.empty(content.shape, dtype=kind)
        return arrays[content]
    if isinstance(content, Shaped):
        whole: Tensor = _with_tensors(content.info, dtype, arrays)
        return whole.view(content.shape)
    assert not isinstance(content, Tensor), "its bytes would be left out"
    if isinstance(content, Mapping):
        return {key: _with_tensors(value, dtype, arrays) for key, value in content.items()}
    return content


def _entries(fd: int, number: int) -> list[_Entry]:
    """Return the archive's storages, in the order in which torch met them."""
    with os.fdopen(fd, "rb", closefd=False) as file, zipfile.ZipFile(file) as archive:
        infos, central = archive.infolist(), archive.start_dir
    root = infos[0].filename.removesuffix("data.pkl")
    found = {}
    for info in infos:  # the directory lists them in this order
        head = os.pread(fd, _CENTRAL.size, central)
        signature, _, *lengths = _CENTRAL.unpack(head)
        assert signature == b"PK\x01\x02", f"no entry at {central}"
        local = os.pread(fd, _LOCAL.size, info.header_offset)
        begin = info.header_offset + _LOCAL.size + sum(_LOCAL.unpack(local)[1:])
        found[info.filename] = _Entry(begin, info.file_size, central + 16)
        central += 46 + sum(lengths)
    return [found[f"{root}data/{i}"] for i in range(number)]


def _fill_in_checksum(fd: int, entry: _Entry) -> None:
    """Write a storage's CRC-32 to the archive's directory, and behind the bytes."""
    if not entry.size:
        return
    checksum, buffer = 0, memoryview(bytearray(min(entry.size, _READ_BYTES)))
    for start in range(0, entry.size, _READ_BYTES):
        part = buffer[: min(_READ_BYTES, entry.size - start)]
        files.read_into(fd, part, entry.begin + start)
        checksum = zlib.crc32(part, checksum)
    written, end = memoryview(_CHECKSUM.pack(checksum)), entry.begin + entry.size
    files.write_at(fd, written, entry.central)
    if os.pread(fd, 4, end) == _DESCRIPTOR:
        files.write_at(fd, written, end + 4)
