"""Documents with a right checksum and a wrong form: one error that names the file and the key."""

import base64
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ckpt_helpers import save_arrays
from ckpt_saved import PART_0, Saved

from ckpt import CheckpointError, absent, export_safetensors, extent, open_checkpoint, verify
from ckpt.array_files import file_grid
from ckpt.checksums import crc32c
from ckpt.parts import ArrayInfo, _grid, _shape, consolidated, decode_part, encode_part, uncollected
from ckpt.shards import ArrayKey

ARRAYS = {("w", "fp32"): np.arange(12, dtype=np.float32).reshape(4, 3), ("count", "value"): np.array(7)}
ANYTHING: list[Any] = [
    None,
    True,
    7,
    -1,
    1.5,
    10**400,
    "",
    "word",
    "\ud800",
    [],
    ["word"],
]
ANYTHING += [{}, {"word": 7}, [[7]], [None], [-1, 3], [1.5, 3], [True, True], ["4", "3"]]
DEEP = b"[" * 300 + b"]" * 300, b"[" * 100_000, b'{"a":' * 900 + b"7" + b"}" * 900


@pytest.fixture(scope="module")
def saved(memory_path: Path) -> Saved:
    """A checkpoint whose first array has two chunks."""
    saved = Saved(f"{memory_path}/forms")
    save_arrays(saved.run, "t1", ARRAYS, planning={"chunk_bytes": 24, "gather_below": 1}, document={})
    return saved


def everything_tells(saved: Saved, path: str, *words: str) -> None:
    """Check that all readers say the same of the checkpoint: one error that has `words`."""
    where = f"{saved.run}/t1/{path} "
    texts = []

    @contextmanager
    def failing() -> Iterator[None]:
        with pytest.raises(CheckpointError) as caught:
            yield
        texts.append(str(caught.value))

    with failing():
        checkpoint = open_checkpoint(saved.run)
        for key in ARRAYS:
            checkpoint.read(*key)
    with failing():
        export_safetensors(open_checkpoint(saved.run), Path(saved.run) / "out.safetensors")
    for check in (verify, absent):
        with failing():
            (problem, *others) = [p for p in check(open_checkpoint(saved.run)) if "zarr.json" not in p.path]
            assert others == []
            raise CheckpointError(f"{problem.path} {problem.what}")
    for text in texts:
        assert text.startswith(where), text
        assert all(word in text for word in words), text
        assert len(text) < len(where) + 300, "whatever the content"


def test_the_checkpoint_is_sound(saved: Saved) -> None:
    assert saved.problems() == []
    record = json.loads(saved.get(PART_0))["w"]["fp32"]
    assert len(base64.b64decode(record["crc32c"])) == 8


@pytest.mark.parametrize("value", ANYTHING, ids=lambda value: ascii(value)[:20])
@pytest.mark.parametrize("key", ["dtype", "shape", "chunk_shape", "file_shape", "crc32c"])
def test_a_value_of_another_type_in_an_array_s_record(saved: Saved, key: str, value: Any) -> None:
    with saved.with_part(lambda part: part["w"]["fp32"].update({key: value})):
        everything_tells(saved, PART_0, "has a record of w/fp32 that can't be followed (")


def sums(count: int) -> str:
    return base64.b64encode(bytes(4 * count)).decode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(({key: None}, f"no '{key}'") for key in ("dtype", "shape", "chunk_shape", "file_shape", "crc32c")),
        ({"dtype": "float128"}, "dtype 'float128'"),
        ({"dtype": "object"}, "dtype 'object'"),
        ({"dtype": "f4"}, "dtype 'f4'"),
        ({"shape": [4, 3, 1]}, "shapes of different lengths"),
        ({"chunk_shape": [0, 3]}, "file_shape [4, 3] isn't whole chunks of [0, 3]"),
        ({"chunk_shape": [3, 3]}, "file_shape [4, 3] isn't whole chunks of [3, 3]"),
        ({"file_shape": [0, 3]}, "file_shape [0, 3] isn't whole chunks of [2, 3]"),
        ({"shape": [5, 3]}, "2 checksums of 3 chunks"),
        ({"shape": [2, 3]}, "2 checksums of 1 chunks"),
        ({"shape": [0, 3]}, "2 checksums of 0 chunks"),
        ({"shape": [2**62, 0], "crc32c": ""}, "-bit places"),
        ({"crc32c": sums(1)}, "1 checksums of 2 chunks"),
        ({"crc32c": sums(3)}, "3 checksums of 2 chunks"),
        ({"crc32c": sums(2)[:-1]}, "crc32c: "),
        ({"crc32c": sums(2) + "!"}, "crc32c: "),
        ({"crc32c": sums(2)[:-2] + "\n="}, "crc32c: "),
        ({"crc32c": base64.b64encode(bytes(7)).decode()}, "multiple of element size"),
        (
            {name: [1] * 64 for name in ("shape", "chunk_shape", "file_shape")} | {"crc32c": sums(1)},
            "64 dims",
        ),
        (
            {name: [2**70] * 2 for name in ("shape", "chunk_shape", "file_shape")} | {"crc32c": sums(1)},
            "places",
        ),
        (
            {name: [2**31] * 2 for name in ("shape", "chunk_shape", "file_shape")} | {"crc32c": sums(1)},
            "places",
        ),
        ({"file_shape": [2**62, 3]}, "places"),
    ],
    ids=str,
)
def test_records_of_arrays_that_cannot_be_followed(saved: Saved, change: dict[str, Any], words: str) -> None:
    def edit(part: dict[str, Any]) -> None:
        record = part["w"]["fp32"]
        record.update(change)
        for key in [key for key, value in record.items() if value is None]:
            del record[key]

    with saved.with_part(edit):
        everything_tells(saved, PART_0, "has a record of w/fp32 that can't be followed (", words)


def renamed(part: dict[str, Any], old: str, new: str) -> None:
    part[new] = part.pop(old)


@pytest.mark.parametrize(
    "change",
    [
        lambda part: part.clear(),
        lambda part: part["w"].clear(),
        lambda part: part.pop("count"),
        lambda part: renamed(part, "count", "other"),
        lambda part: renamed(part["w"], "fp32", "exp_avg"),
        lambda part: part.update(more={"fp32": part["w"]["fp32"]}),
        lambda part: part.update(more={}),
        lambda part: part["w"].update(exp_avg=part["w"]["fp32"]),
        *(lambda part, value=value: part.update(w=value) for value in [*ANYTHING, ["fp32"], "fp32"]),
        *(
            lambda part, content=content: content
            for content in (*DEEP, b"", b"\xff\xfe", b"{", b"[]", b"7", b'"w"')
        ),
        lambda part: b'{"w": {"fp32": ' + b"9" * 5000 + b"}}",
        lambda part: b"null",
    ],
)
def test_a_part_that_lists_other_arrays_than_the_manifest(saved: Saved, change: Callable[..., Any]) -> None:
    with saved.with_part(change):
        everything_tells(saved, PART_0, "doesn't describe the arrays that the manifest lists for it")


@pytest.mark.parametrize("record", [*ANYTHING, *DEEP], ids=lambda value: ascii(value)[:20])
def test_a_record_that_is_something_else(saved: Saved, record: Any) -> None:
    """Also one so deep that Python can parse it, but not walk through it."""
    if isinstance(record, bytes):
        marked = saved.with_part(
            lambda part: json.dumps({**part, "w": {"fp32": "HERE"}}).encode().replace(b'"HERE"', record)
        )
    else:
        marked = saved.with_part(lambda part: part["w"].update(fp32=record))
    with marked:
        everything_tells(saved, PART_0)


def test_the_order_of_a_part_is_free(saved: Saved) -> None:
    """Read the states of an atom in another order."""

    def turn(part: dict[str, Any]) -> bytes:
        return json.dumps({atom: part[atom] for atom in reversed(part)}).encode()

    with saved.with_part(turn):
        assert saved.problems() == []


@pytest.mark.parametrize(
    "name", ["", "x" * 256, "ö" * 50, "\ud800"], ids=["empty", "long", "escaped", "no-utf8"]
)
@pytest.mark.parametrize("of", ["atom", "state"])
def test_names_that_no_file_can_have(saved: Saved, name: str, of: str) -> None:
    part = json.loads(saved.get(PART_0))
    if of == "atom":
        renamed(part, "w", name)
    else:
        renamed(part["w"], "fp32", name)
    content = json.dumps(part).encode()

    def edit(manifest: dict[str, Any]) -> None:
        manifest["parts"][PART_0].update(arrays={atom: [*states] for atom, states in part.items()})

    with saved.with_content(PART_0, content), saved.with_manifest(edit):
        checkpoint = open_checkpoint(saved.run)
        for read in (checkpoint.read, lambda *key: raise_first(verify(checkpoint))):
            with pytest.raises(CheckpointError, match=rf"{PART_0} has a record of .*that can't be followed"):
                read(*next(key for key in checkpoint.arrays if name in key))


def raise_first(problems: list[Any]) -> None:
    raise CheckpointError(str(next(p for p in problems if "zarr.json" not in p.path)))


@pytest.mark.parametrize("value", ANYTHING, ids=lambda value: ascii(value)[:20])
@pytest.mark.parametrize(
    "keys",
    [
        *(("tag",), ("parts",), ("files",), ("aliases",), ("aliases", "head"), ("version",), ("format",)),
        *(("files", "zarr.json"), ("files", "zarr.json", "size"), ("files", "zarr.json", "crc32c")),
        *(("parts", PART_0), ("parts", PART_0, "size"), ("parts", PART_0, "crc32c")),
        *(("parts", PART_0, "arrays"), ("parts", PART_0, "arrays", "w")),
    ],
    ids="-".join,
)
def test_a_value_of_another_type_in_the_manifest(saved: Saved, keys: tuple[str, ...], value: Any) -> None:
    sound = {"tag": value == "word", "aliases": value == {}, "aliases-head": isinstance(value, str)}
    sound |= {"version": value is True}  # which is 1

    def edit(manifest: dict[str, Any]) -> None:
        manifest.setdefault("aliases", {})
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    with saved.with_manifest(edit):
        refused = None
        try:
            checkpoint = open_checkpoint(saved.run)
        except CheckpointError as error:
            refused = str(error)
        if refused is not None:
            assert refused.startswith(f"{saved.run}/t1/manifest.json has ")
            return
        told = [problem.path for problem in verify(checkpoint)]
        assert bool(told) != sound.get("-".join(keys), False)
        extent(checkpoint)


RECORD = {"size": 3, "crc32c": "00000000"}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: m["files"].update({"a/b": RECORD}), "has a record of 'a/b', which can't be a file's name"),
        (lambda m: m["files"].update({"..": RECORD}), "has a record of '..', which can't"),
        (lambda m: m["parts"].update({"": RECORD}), "has a record of '', which can't"),
        (
            lambda m: m["files"].update({"manifest.json": RECORD}),
            "has a record of 'manifest.json', which can't",
        ),
        (lambda m: m["files"].update({"a\nb": RECORD}), "has a record of 'a\\nb', which can't"),
        (lambda m: m["files"].update(m["parts"]), f"has two records of {PART_0!r}"),
        (lambda m: m["files"].clear(), "has no record of 'zarr.json'"),
        (lambda m: m["parts"].update({"arrays.1.json": m["parts"][PART_0]}), "lists an array twice"),
    ],
    ids=["path", "parent", "empty", "manifest", "newline", "two", "none", "twice"],
)
def test_records_that_contradict_each_other(saved: Saved, edit: Callable[..., Any], words: str) -> None:
    with saved.with_manifest(edit), pytest.raises(CheckpointError, match="use another tag") as caught:
        open_checkpoint(saved.run)
    assert str(caught.value).startswith(f"{saved.run}/t1/manifest.json {words}")


@pytest.mark.parametrize("rest", [b"", b" no: json\n}\n", b' "a": ' + DEEP[1]], ids=["empty", "text", "deep"])
def test_a_manifest_that_is_no_json(saved: Saved, rest: bytes) -> None:
    content = b'{"crc32c": "%08x",\n' % crc32c(rest) + rest
    with saved.changed(("manifest.json", content)), pytest.raises(CheckpointError, match="is not JSON; use"):
        open_checkpoint(saved.run)


def test_chunks_and_arrays_larger_than_memory(saved: Saved) -> None:
    large, path = [2**42, 3], f"{saved.run}/t1/atoms/w/fp32/c.0.0"
    for shape in ([4, 3], large):
        record = {"shape": shape, "chunk_shape": large, "file_shape": large, "crc32c": sums(1)}
        with saved.with_part(lambda part, record=record: part["w"]["fp32"].update(record)):
            checkpoint = open_checkpoint(saved.run)
            with pytest.raises(CheckpointError, match="w/fp32"):
                checkpoint.read("w")
            assert path in [problem.path for problem in verify(checkpoint)]


def test_the_largest_arrays_whose_places_can_be_counted() -> None:
    """Each chunk of a byte takes a page, and 16 bytes of the index."""
    most = (2**63 - 1) // (4096 + 16)
    _, count = _grid((most,), (1,), (1,), 1)
    assert count == most
    for shape, file in (((most + 1,), (1,)), ((1,), (most + 1,))):
        with pytest.raises(ValueError, match="64-bit places"):
            _grid(shape, (1,), file, 1)
    ones = (1,) * 63
    assert _grid(ones, ones, ones, 1)[1] == 1
    with pytest.raises(ValueError, match="64 dims"):
        _grid((*ones, 1), (*ones, 1), (*ones, 1), 1)


def test_states_of_an_atom_come_in_any_order() -> None:
    grid = file_grid((3,), (3,), (3,), 4)
    infos = [ArrayInfo(ArrayKey("w", s), "float32", grid, np.ones(1, np.uint32)) for s in ("fp32", "exp_avg")]
    for order in (infos, infos[::-1]):
        for listed in (["fp32", "exp_avg"], ["exp_avg", "fp32"]):
            found = decode_part(encode_part(order), "it", {"w": listed})
            assert found.keys() == {info.key for info in infos}
            assert all(info.sums.tolist() == [1] and info.nbytes == 12 for info in found.values())


@pytest.mark.parametrize(
    "shape", [[-1, 3], [True, 3], [1.0, 3], ["4", 3], [[4], 3], (4, 3), "43", {4: 3}], ids=str
)
def test_a_shape_is_a_list_of_lengths(shape: Any) -> None:
    with pytest.raises(ValueError, match=r"^chunk_shape "):
        _shape({"chunk_shape": shape, "shape": [4, 3]}, "chunk_shape")
    assert _shape({"chunk_shape": shape, "shape": [4, 0]}, "shape") == (4, 0)


def test_the_root_s_document_lists_nodes_by_name() -> None:
    grid = file_grid((3,), (3,), (3,), 4)
    infos = [
        ArrayInfo(ArrayKey(a, "fp32"), "float32", grid, np.ones(1, np.uint32)) for a in ("b", "a", "a.b")
    ]
    nodes = [*consolidated([infos[:1], infos[1:]])["consolidated_metadata"]["metadata"]]
    folders = {"atoms", *(f"atoms/{a}" for a in ("a", "a.b", "b")), *(info.path for info in infos)}
    assert nodes == sorted(folders)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_rests_while_documents_are_parsed(enabled: bool) -> None:
    try:
        gc.enable() if enabled else gc.disable()
        with suppress(KeyError), uncollected():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
