#!/usr/bin/env python3
"""Make one fp32 state_dict from a checkpoint, without the package, the model or the cluster behind it.

    python zero_to_fp32.py . out --safe_serialization      safetensors files; needs numpy alone
    python zero_to_fp32.py . out                           pytorch_model.bin; needs torch too

A copy of this file lies in every checkpoint. Its arguments are those of DeepSpeed's script of the same name.
Everything that is read is checked against the checkpoint's checksums, which is fast if the package crc32c or
google_crc32c (a dependency of zarr) is installed. A safetensors file is written chunk by chunk; a .bin file
is built in memory.
"""

from __future__ import annotations

import base64
import filecmp
import json
import math
import os
import re
import shutil
import sys
import uuid
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

Json = dict[str, Any]

EXISTS = "{} exists; delete it, or write to another folder"
BITS = {"BF16": np.uint16}  # numpy has no bfloat16, so its bits are copied
NAMES = {
    "bfloat16": "BF16",
    "bool": "BOOL",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    **{f"int{n}": f"I{n}" for n in (8, 16, 32, 64)},
    **{f"uint{n}": f"U{n}" for n in (8, 16, 32, 64)},
}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS.update({f"{unit}iB": 1 << 10 * (i + 1) for i, unit in enumerate("KMGT")})


class UnreadableError(Exception):
    """The checkpoint is damaged, or doesn't exist."""


# --- checksums ---------------------------------------------------------------------------------------------


def crc32c(data: Any) -> int:
    """Return the CRC-32C (Castagnoli) of `data`, with the fastest implementation installed."""
    try:
        import crc32c as package

        return int(package.crc32c(data))
    except ImportError:
        pass
    try:
        import google_crc32c

        return int(google_crc32c.value(bytes(data)))
    except ImportError:
        return crc32c_by_numpy(data)


TABLE = np.arange(256, dtype=np.uint32)
for _ in range(8):
    TABLE = np.where(TABLE & 1, (TABLE >> 1) ^ np.uint32(0x82F63B78), TABLE >> 1).astype(np.uint32)


def crc32c_by_numpy(data: Any, lanes: int = 4096) -> int:
    """Return the CRC-32C of `data`: many equal stretches at once, then their checksums combined."""
    data = np.frombuffer(data, np.uint8)
    each = len(data) // lanes
    crc = np.uint32(0xFFFFFFFF)
    if each:
        columns = np.ascontiguousarray(data[: each * lanes].reshape(lanes, each).T)
        sums = np.zeros(lanes, np.uint32)
        for column in columns:
            sums = TABLE[(sums ^ column) & 0xFF] ^ (sums >> 8)
        # Appending `each` zero bytes multiplies a checksum by a 32 x 32 matrix of bits.
        step = np.uint32(1) << np.arange(32, dtype=np.uint32)  # its columns: the identity
        for _ in range(each):
            step = TABLE[step & 0xFF] ^ (step >> 8)
        while len(sums) > 1:  # twice as many zero bytes: the matrix squared
            sums = _times(step, sums[::2]) ^ sums[1::2]
            step = _times(step, step)
        crc = _times(step, np.full(1, crc))[0] ^ sums[0]
    for byte in data[each * lanes :]:
        crc = TABLE[(crc ^ byte) & np.uint32(0xFF)] ^ (crc >> np.uint32(8))
    return int(crc ^ np.uint32(0xFFFFFFFF))


def _times(matrix: Any, vectors: Any) -> Any:
    """Multiply a 32 x 32 matrix of bits, given by its columns, by vectors of 32 bits."""
    result = np.zeros_like(vectors)
    for bit in range(32):
        result ^= np.where((vectors >> np.uint32(bit)) & np.uint32(1), matrix[bit], np.uint32(0))
    return result


# --- the checkpoint ----------------------------------------------------------------------------------------


class Array:
    """The value of one tensor in a checkpoint's folder."""

    def __init__(self, folder: Path, atom: str, state: str, record: Json) -> None:
        self.folder = folder / "atoms" / escaped(atom) / escaped(state)
        self.shape, self.chunk, self.file = (tuple(record[f"{x}shape"]) for x in ("", "chunk_", "file_"))
        self.dtype = record["dtype"]
        self.bits = np.dtype(BITS.get(NAMES[self.dtype], self.dtype)).newbyteorder("<")
        self.nbytes = math.prod(self.shape) * self.bits.itemsize
        self.sums = np.frombuffer(base64.b64decode(record["crc32c"]), "<u4")
        self._check(f"{atom}/{state}")

    def _check(self, name: str) -> None:
        """Raise ValueError if the numbers of the record don't fit each other."""
        sizes = [*zip(self.shape, self.chunk, self.file, strict=True)]
        if not all(type(n) is int and n >= 0 for each in sizes for n in each):
            raise ValueError(f"{name} has a shape that isn't of whole numbers")
        chunked = all(c and f % c == 0 for _, c, f in sizes)
        self.counts = [-(-n // c) for n, c, _ in sizes] if chunked else []  # chunks along each dim
        if not chunked or math.prod(self.counts) != len(self.sums):
            raise ValueError(f"the chunks of {name} don't fit its shape")

    def fill(self, out: Any) -> None:
        """Verify all chunks and copy them into `out`, an array of this shape."""
        per_file = [f // c for f, c in zip(self.file, self.chunk, strict=True)]
        files: dict[tuple[int, ...], int] = {}
        for sum_, index in zip(self.sums, product(*map(range, self.counts)), strict=True):
            file = tuple(i // n for i, n in zip(index, per_file, strict=True))
            position = files[file] = files.get(file, -1) + 1  # a file's chunks lie in C order
            box = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, self.chunk, strict=True))
            place = out[box or ...]
            data = self._verified(".".join(["c", *map(str, file)]), position, sum_)
            place[...] = data.reshape(self.chunk)[tuple(slice(n) for n in place.shape) or ...]

    def _verified(self, name: str, position: int, checksum: int) -> Any:
        """Return the elements of the chunk at a position in a file."""
        path, count = self.folder / name, math.prod(self.chunk)
        stride = -(-(count * self.bits.itemsize + 4) // 4096) * 4096  # with the chunk's own checksum
        try:
            data = np.fromfile(regular(path), self.bits, count, offset=position * stride)
        except OSError as error:
            raise UnreadableError(f"{path} can't be read: {error.strerror}") from None
        if len(data) != count or crc32c(data.view(np.uint8)) != checksum:
            raise UnreadableError(f"{path} is damaged: the checksum of chunk {position} isn't the manifest's")
        return data


def regular(path: Path) -> Path:
    """Return the path; raise UnreadableError for a pipe, which never ends, and a link, which leads away."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UnreadableError(f"{path} isn't a regular file")
    return path


def escaped(name: str) -> str:
    """Return the folder's name of an atom or a state."""
    quoted = quote(name, safe="")
    special = quoted.startswith((".", "__")) or quoted == "zarr.json"
    return f"%{ord(quoted[0]):02X}{quoted[1:]}" if special else quoted


def find(checkpoint_dir: str, tag: str | None) -> Path:
    """Return the checkpoint's folder: `checkpoint_dir` itself, or the tag in it, by default the latest."""
    run = Path(checkpoint_dir)
    if tag is None and (run / "manifest.json").exists():
        return run
    if tag is None:
        try:
            tag = (run / "latest").read_text().strip()
        except (FileNotFoundError, NotADirectoryError):
            raise UnreadableError(f"{run} has neither manifest.json nor latest; give --tag") from None
    if not (run / tag / "manifest.json").exists():
        tags = sorted(path.parent.name for path in run.glob("[!.]*/manifest.json"))
        raise UnreadableError(f"{run} has no checkpoint {tag!r}; there are: {', '.join(tags) or 'none'}")
    try:
        saved = json.loads((run / tag / "manifest.json").read_bytes())["tag"]
    except (OSError, ValueError, KeyError):  # `read` says what is wrong with it
        return run / tag
    if saved != tag:
        raise UnreadableError(
            f"{run / tag} has the tag {saved!r}, not {tag!r}; if you want this one, name its own folder"
        )
    return run / tag


def read(folder: Path, exclude_frozen_parameters: bool = False) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the arrays by name, and the other names of tied weights, after checking the manifest."""
    try:
        return _decoded(folder, exclude_frozen_parameters)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        text = f"{folder} has a document that isn't of its format: {type(error).__name__}: {error}"
        raise UnreadableError(text[:500]) from None


def _decoded(folder: Path, exclude_frozen_parameters: bool) -> tuple[dict[str, Array], dict[str, str]]:
    head, _, rest = regular(folder / "manifest.json").read_bytes().partition(b"\n")
    if head != b'{"crc32c": "%08x",' % crc32c(rest):
        raise UnreadableError(f"{folder / 'manifest.json'} is damaged: its checksum doesn't match")
    manifest = json.loads(head + rest)
    if (manifest["format"], manifest["version"]) != ("uni3d-checkpoint", 1):
        raise UnreadableError(f"{folder} has format version {manifest['version']}; use its own script")
    parameters = manifest.get("model", {}).get("parameters", {})
    arrays: dict[str, Array] = {}
    for part, record in manifest["parts"].items():
        if Path(part).name != part:
            raise ValueError(f"{part!r} as the name of a file")
        data = regular(folder / part).read_bytes()
        if crc32c(data) != int(record["crc32c"], 16):
            raise UnreadableError(f"{folder / part} is damaged: its checksum isn't the manifest's")
        for atom, states in json.loads(data).items():
            trained = parameters.get(atom, {}).get("requires_grad", True)
            wanted = {"value", "fp32"} if trained or not exclude_frozen_parameters else {"value"}
            arrays.update((atom, Array(folder, atom, s, states[s])) for s in states.keys() & wanted)
    return arrays, {k: v for k, v in manifest.get("aliases", {}).items() if v in arrays}


# --- files -------------------------------------------------------------------------------------------------


def size_in_bytes(size: str | int) -> int:
    """Return the bytes of a size such as "5GB", "500MiB" or a plain number.

    Raises:
        ValueError: `size` is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)?", str(size))
    if not match or not float(match[1]):
        raise ValueError(f"the size {size!r} isn't a number above 0 with a known unit; write 5GB or 500MiB")
    return int(float(match[1]) * UNITS[match[2] or ""])


def cut(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Group names in order, with at most `limit` bytes per group except for single larger tensors."""
    parts: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not parts or (parts[-1] and held + size > limit):
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += size
    return parts or [[]]


def file_names(count: int, safe: bool) -> tuple[list[str], str | None]:
    """Return the file names that Hugging Face's libraries expect, and the index's if there are several."""
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    if count == 1:
        return [f"{stem}.{suffix}"], None
    names = [f"{stem}-{i + 1:05}-of-{count:05}.{suffix}" for i in range(count)]
    return names, f"{stem}.{suffix}.index.json"


def index_of(
    parts: list[list[str]], names: list[str], sizes: dict[str, int], aliases: dict[str, str]
) -> Json:
    """Return the index, tensor -> file; `aliases` are further names of tied weights."""
    where = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    where.update({alias: where[first] for alias, first in aliases.items()})
    return {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(where.items()))}


def write_safetensors(path: Path, arrays: dict[str, Array], aliases: dict[str, str]) -> None:
    """Write a header, then the tensors (https://github.com/huggingface/safetensors, "Format")."""
    head: Json = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    end = 0
    if aliases:
        head["__metadata__"]["aliases"] = json.dumps(aliases)
    for name, array in sorted(arrays.items(), key=lambda item: -item[1].bits.itemsize):
        places[name], begin, end = end, end, end + array.nbytes
        head[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    data = json.dumps(head).encode()
    data += b" " * (-len(data) % 8)
    with open(path, "wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + end)
    for name, array in arrays.items():
        if array.nbytes:
            start = 8 + len(data) + places[name]
            out = np.memmap(path, array.bits, "r+", start, array.shape or (1,))
            array.fill(out.reshape(array.shape))
            out.flush()


def write_bin(path: Path, arrays: dict[str, Array], aliases: dict[str, str]) -> None:
    """Write with `torch.save`; tied weights are one tensor under several names."""
    import torch

    tensors = {}
    for name, array in arrays.items():
        whole = np.empty(array.shape, array.bits)
        array.fill(whole)
        tensors[name] = torch.from_numpy(whole.view(np.int16) if array.dtype == "bfloat16" else whole)
        if array.dtype == "bfloat16":
            tensors[name] = tensors[name].view(torch.bfloat16)
    tensors.update({alias: tensors[first] for alias, first in aliases.items()})
    torch.save(tensors, path)


def write_files(
    output_dir: str | Path,
    sizes: dict[str, int],
    aliases: dict[str, str],
    max_shard_size: str | int,
    safe: bool,
    write: Callable[[Path, list[str], dict[str, str]], object],
) -> list[str]:
    """Write tensors of `sizes` bytes to one or several files, calling `write(path, names, aliases)` for each.

    Files get their final names once all of them are whole. Several processes may write the same files at
    once. Returns the names, including that of an index.

    Raises:
        FileExistsError: another file of one of these names exists; nothing was written.
        ValueError: `max_shard_size` isn't a size.
    """
    parts, out = cut(sizes, size_in_bytes(max_shard_size)), Path(output_dir)
    names, index = file_names(len(parts), safe)
    for name, part in zip(names, parts, strict=True):  # smaller than its tensors: another file, said at once
        if (out / name).exists() and (out / name).stat().st_size <= sum(sizes[tensor] for tensor in part):
            raise FileExistsError(EXISTS.format(out / name))
    out.mkdir(parents=True, exist_ok=True)
    work = out / f".zero_to_fp32.{uuid.uuid4().hex}.tmp"  # a process's own
    work.mkdir()
    try:
        for name, part in zip(names, parts, strict=True):
            write(work / name, part, {alias: first for alias, first in aliases.items() if first in part})
        if index:
            content = index_of(parts, names, sizes, {} if safe else aliases)
            (work / index).write_text(json.dumps(content, indent=2) + "\n")
            names.append(index)
        for name in names:  # equal if another process has just written it
            if (out / name).exists() and not filecmp.cmp(work / name, out / name, shallow=False):
                raise FileExistsError(EXISTS.format(out / name))
        for name in names:
            os.replace(work / name, out / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return names


def convert(
    folder: Path,
    output_dir: str,
    max_shard_size: str = "5GB",
    safe_serialization: bool = False,
    exclude_frozen: bool = False,
) -> list[str]:
    """Write the files of a checkpoint; return their names."""
    arrays, aliases = read(folder, exclude_frozen)
    sizes = {name: array.nbytes for name, array in arrays.items()}

    def write(path: Path, names: list[str], aliases: dict[str, str]) -> None:
        each = write_safetensors if safe_serialization else write_bin
        each(path, {name: arrays[name] for name in names}, aliases)

    return write_files(output_dir, sizes, aliases, max_shard_size, safe_serialization, write)


def main() -> None:
    """Parse the command line, convert, and print the names of the files."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint_dir", help="a run's folder, or a checkpoint's own folder")
    add("output_dir", help="folder to write the weights to")
    add("--max_shard_size", default="5GB", help="largest size of a file, by default 5GB")
    add("--safe_serialization", action="store_true", help="safetensors instead of torch's format")
    add("-t", "--tag", help="the checkpoint to read; the latest by default")
    add("--exclude_frozen_parameters", action="store_true", help="leave out frozen parameters")
    add("-d", "--debug", action="store_true", help="print each tensor, and tracebacks")
    args = parser.parse_args()
    try:
        folder = find(args.checkpoint_dir, args.tag)
        if args.debug:
            for name, array in read(folder, args.exclude_frozen_parameters)[0].items():
                print(f"{name}: {list(array.shape)} {array.dtype}")
        frozen = args.exclude_frozen_parameters
        names = convert(folder, args.output_dir, args.max_shard_size, args.safe_serialization, frozen)
    except (UnreadableError, ValueError, KeyError, OSError, ImportError) as error:
        if args.debug:
            raise
        sys.exit(f"error: {error}")
    for name in names:
        print(Path(args.output_dir) / name)


if __name__ == "__main__":
    main()
