"""Documents of a checkpoint: names, zarr metadata, the manifest. Specified in `docs/format.md`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn
from urllib.parse import quote

import numpy as np

from ckpt.array_files import FileGrid
from ckpt.box import Shape
from ckpt.checksums import crc32c, hexadecimal
from ckpt.errors import CheckpointError

FORMAT_NAME = "uni3d-checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PART = "arrays.{}.json"
"""Name of a part of the manifest, by its number."""
LATEST = "latest"
ZARR = "zarr.json"
ATOMS = "atoms"
"""Folder of a checkpoint's arrays."""
MOST_DOCUMENT_BYTES = 1 << 30
"""Bytes of the largest document that is read: a manifest of a hundred thousand arrays has a hundredth."""
SLACK = 1 << 20
"""Bytes more than recorded up to which a document is read, to tell how it is damaged."""
SAVING, DELETING = ".saving.", ".deleting."
WRITER = ".writer"
"""Lock of a run's folder."""
TOKEN = 32
"""Length of the token of a save, in hexadecimal digits."""
NAMED_LATEST = ".latest"
"""File in a checkpoint whose save found no `latest`, until it has written it."""

_WIDTHS = {"int": (8, 16, 32, 64), "uint": (8, 16, 32, 64), "float": (16, 32, 64)}
DTYPES = frozenset(
    {"bool", "bfloat16"} | {f"{kind}{bits}" for kind, widths in _WIDTHS.items() for bits in widths}
)
"""Element types of arrays: those of zarr v3's core specification, and bfloat16."""

_BFLOAT16_NAN = 0x7FC0

Json = dict[str, Any]


def check_tag(tag: str) -> str:
    """Return the tag; raises ValueError if it can't be a folder's name."""
    if not is_tag(tag):
        raise ValueError(
            f"tag {tag!r} can't name a checkpoint: use up to 200 letters, digits, '_', '-' and '.', "
            f"not '.' or '-' first, and not {LATEST!r}"
        )
    return tag


def tag_text(tag: Any) -> str:
    """Return a tag that may have been given as an integer.

    Raises:
        CheckpointError: it is neither a string nor an integer.
    """
    if isinstance(tag, str):
        return tag
    if isinstance(tag, int | np.integer) and not isinstance(tag, bool):
        return str(tag)
    raise CheckpointError(f"the tag is {tag!r}; expected a string or an integer")


def check_same_tag(tags: Sequence[str]) -> None:
    """Raises CheckpointError if the ranks were given different tags, or one that can't name a checkpoint."""
    if len(set(tags)) > 1:
        given = ", ".join(sorted(set(tags)))
        raise CheckpointError(f"the ranks were asked to save different tags: {given}; use one")
    try:
        check_tag(tags[0])
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def leftover_tag(name: str) -> str | None:
    """Return the tag of an unfinished save or deletion, given its name; None for other names.

    Folders also have the token of their save behind the tag, after a dot, which is part of what is returned.
    """
    for prefix in (SAVING, DELETING):
        tag = name.removeprefix(prefix)
        if tag != name and is_tag(tag[:200]) and len(tag) <= 200 + len(".") + TOKEN:
            return tag if re.fullmatch(r"[\w.\-]+", tag, re.ASCII) else None
    return None


def is_tag(name: str) -> bool:
    return name != LATEST and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}", name) is not None


_PLAIN = re.compile(r"(?!__|zarr\.json$)[A-Za-z0-9_~\-][A-Za-z0-9_.~\-]{,254}").fullmatch
"""Matches names that `_escaped` leaves as they are: nearly all."""


def atom_path(atom: str) -> str:
    """Return the folder of an atom, relative to its checkpoint."""
    return f"{ATOMS}/{_escaped(atom)}"


def array_path(atom: str, state: str) -> str:
    """Return the folder of an array, relative to its checkpoint."""
    return f"{atom_path(atom)}/{_escaped(state)}"


def _escaped(name: str) -> str:
    """Percent-encode the characters that a file name or a zarr node can't have."""
    if _PLAIN(name):
        return name
    quoted = quote(name, safe="")
    if quoted.startswith((".", "__")) or quoted == ZARR:
        quoted = f"%{ord(quoted[0]):02X}{quoted[1:]}"
    if not quoted:
        raise CheckpointError("a tensor or a state without a name can't be stored")
    if len(quoted) > 255:
        raise CheckpointError(f"the name {name[:60]}... is too long for a file name ({len(quoted)} > 255)")
    return quoted


def file_name(index: Shape) -> str:
    """Return zarr's default chunk key with '.' between the indices: `c.0.1`, and `c` for a scalar."""
    return ".".join(["c", *map(str, index)])


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """Return the numpy dtype of one of `DTYPES`."""
    if dtype == "bfloat16":
        from ml_dtypes import bfloat16  # numpy has no such type of its own

        return np.dtype(bfloat16)  # type: ignore[no-any-return]
    return np.dtype(dtype)


def itemsize(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


@lru_cache
def _array_template(dtype: str, dims: int) -> Json:
    """Return zarr's own metadata document for an array of `dtype`. Only writers import zarr: it is slow."""
    from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
    from zarr.core.dtype import get_data_type_from_native_dtype
    from zarr.core.metadata.v3 import ArrayV3Metadata

    stored, ones = np.dtype("uint16" if dtype == "bfloat16" else dtype), (1,) * dims
    codecs = BytesCodec(endian=None if stored.itemsize == 1 else "little"), Crc32cCodec()
    document = ArrayV3Metadata(
        shape=ones,
        data_type=get_data_type_from_native_dtype(stored),
        chunk_grid={"name": "regular", "configuration": {"chunk_shape": ones}},
        chunk_key_encoding={"name": "default", "configuration": {"separator": "."}},
        fill_value=_BFLOAT16_NAN if dtype == "bfloat16" else fill_value(dtype),
        codecs=[ShardingCodec(chunk_shape=ones, codecs=codecs)],
        attributes={"dtype": dtype} if dtype == "bfloat16" else {},
        dimension_names=None,
        storage_transformers=(),
    ).to_dict()
    return json.loads(json.dumps(document))  # type: ignore[no-any-return]


def fill_value(dtype: str) -> float | int | bool:
    """Return the fill value, NaN for floats: a lost chunk must never read as zeros."""
    kind = "f" if dtype == "bfloat16" else np.dtype(dtype).kind
    return float("nan") if kind == "f" else False if kind == "b" else 0


@lru_cache(4096)
def array_document(dtype: str, grid: FileGrid) -> Json:
    """Return the `zarr.json` of one array; not to be changed, as arrays that are alike share it."""
    template = _array_template(dtype, len(grid.shape))
    outer = {"name": "regular", "configuration": {"chunk_shape": list(grid.file_shape)}}
    (codec,) = template["codecs"]
    inner = {**codec["configuration"], "chunk_shape": list(grid.chunk_shape)}
    codecs = [{**codec, "configuration": inner}]
    return {**template, "shape": list(grid.shape), "chunk_grid": outer, "codecs": codecs}


@lru_cache(4096)
def encoded_array_document(dtype: str, grid: FileGrid) -> bytes:
    return encode_document(array_document(dtype, grid))


def group_document(members: Mapping[str, Json] | None = None) -> Json:
    """Return the `zarr.json` of a group; with `members` (path -> document), consolidated."""
    document: Json = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    if members is not None:
        inline = {"kind": "inline", "must_understand": False, "metadata": dict(members)}
        document["consolidated_metadata"] = inline
    return document


def encode_document(document: Json) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def encode_manifest(manifest: Json) -> bytes:
    """Encode as one JSON object, a line per key; the first line holds the checksum of all bytes after it."""
    lines = [
        f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'), allow_nan=False)}"
        for key, value in manifest.items()
    ]
    rest = (" " + ",\n ".join(lines) + "\n}\n").encode()
    return b'{"crc32c": "%08x",\n' % crc32c(rest) + rest


def object_record(data: bytes) -> Json:
    """Return the manifest's record of a whole object."""
    return {"size": len(data), "crc32c": hexadecimal(crc32c(data))}


def decode_manifest(data: bytes, source: str) -> Json:
    """Parse and verify a manifest. `source` names it in errors.

    Raises:
        CheckpointError: it is damaged, or of another format or version.
    """
    head, _, rest = data.partition(b"\n")
    match = re.fullmatch(rb'\{"crc32c": "([0-9a-f]{8})",', head)
    if not match:
        raise CheckpointError(f"{source} is not a manifest of this format: its first line has no crc32c")
    if int(match[1], 16) != crc32c(rest):
        raise CheckpointError(f"{source} is damaged: its checksum doesn't match; use another tag")
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{source} is not JSON; use another tag") from None
    found = manifest.get("format"), manifest.get("version")
    if found[0] == "uni3d":
        raise CheckpointError(
            f"{source} was written before the format was stable (version {found[1]!r}); read it with the "
            "release that wrote it"
        )
    if found != (FORMAT_NAME, FORMAT_VERSION):
        raise CheckpointError(
            f"{source} has format {found[0]!r}, version {found[1]!r}, expected {FORMAT_NAME!r}, version "
            f"{FORMAT_VERSION}; read it with the release that wrote it, or a newer one"
        )
    _check_manifest(manifest, source)
    return manifest  # type: ignore[no-any-return]


def _check_manifest(manifest: Json, source: str) -> None:
    """Check the keys that every reader needs; raises CheckpointError."""

    def fail(what: str) -> NoReturn:
        raise CheckpointError(f"{source} {what}; use another tag")

    missing = [key for key in ("tag", "parts", "files") if key not in manifest]
    if missing:
        fail(f"has no {' and no '.join(map(repr, missing))}")
    if not isinstance(manifest["tag"], str) or not is_tag(manifest["tag"]):
        fail("has a 'tag' that is none")
    records = {"parts": manifest["parts"], "files": manifest["files"]}
    for key, named in records.items():
        if not isinstance(named, dict):
            fail(f"has {key!r} that isn't an object")
        for name, record in named.items():
            if not _is_file_name(name):
                fail(f"has a record of {name!r}, which can't be a file's name")
            if not _is_record(record):
                fail(f"has a record of {name!r} without a size and a crc32c")
    if twice := manifest["parts"].keys() & manifest["files"].keys():
        fail(f"has two records of {min(twice)!r}")
    if ZARR not in manifest["files"]:
        fail(f"has no record of {ZARR!r}")
    arrays = [record.get("arrays") for record in manifest["parts"].values()]
    if not all(isinstance(a, dict) and all(map(_are_names, a.values())) for a in arrays):
        fail("has a part without a list of its arrays")
    keys = [(atom, state) for listed in arrays for atom, states in listed.items() for state in states]
    if len(set(keys)) < len(keys):
        fail("lists an array twice")
    aliases = manifest.get("aliases", {})
    if not isinstance(aliases, dict) or not _are_names([*aliases.values()]):
        fail("has 'aliases' that aren't names")


def _is_file_name(name: str) -> bool:
    """Return whether the name is that of a file directly in the checkpoint's folder."""
    return name.isprintable() and "/" not in name and name not in ("", ".", "..", MANIFEST)


def _is_record(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and type(value.get("size")) is int
        and isinstance(value.get("crc32c"), str)
        and re.fullmatch("[0-9a-f]{8}", value["crc32c"]) is not None
    )


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def check_json(value: Any, where: str) -> None:
    """Check that JSON would return `value` unchanged: a type that changes silently breaks a resume.

    Raises:
        CheckpointError: it wouldn't; the message names the place of the first such value.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(
                    f"{where} has the key {key!r}; keys must be strings to come back as they were"
                )
            check_json(item, f"{where}[{key!r}]")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            check_json(item, f"{where}[{i}]")
    elif isinstance(value, float) and not np.isfinite(value):
        raise CheckpointError(f"{where} is {value}; JSON has no such number")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise CheckpointError(
            f"{where} is a {type(value).__name__}; a checkpoint keeps dicts, lists, strings, numbers, "
            "booleans and None (convert tensors and tuples to lists)"
        )
