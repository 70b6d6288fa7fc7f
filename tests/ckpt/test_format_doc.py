"""The programs, examples and tables of `docs/format.md`, run and checked."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from ckpt_helpers import cut, random_array, same, save_arrays
from crc32c import crc32c

from ckpt import Box
from ckpt.checksums import BLOCKS, SMALLEST_BLOCK
from ckpt.format import FORMAT_VERSION, array_document, atom_path, decode_manifest

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
PATH = "atoms/embed.weight/fp32"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL)


READERS = [program for program in blocks("python") if PATH in program]
BFLOAT16_READER, CHECKER = [program for program in blocks("python") if PATH not in program]
EXAMPLE, ARRAY, BFLOAT16 = blocks("json")

ARRAYS = {
    ("embed.weight", "fp32"): random_array(np.random.default_rng(0), "float32", (1023, 257)),
    ("embed.weight", "exp_avg"): random_array(np.random.default_rng(1), "float32", (1023, 257)),
    ("rope.base", "value"): np.array(10000.0),
    ("mask", "value"): np.array([[True, False, True]]),
}
SCALE = {("scale", "value"): np.array([0.5, 1, 2], ml_dtypes.bfloat16)}

EXAMPLE_ARRAYS = {
    ("embed.weight", "fp32"): np.arange(16384, dtype=np.float32).reshape(256, 64),
    ("embed.weight", "exp_avg"): np.zeros((256, 64), np.float32),
    ("rope.base", "value"): np.array(10000.0),
    **SCALE,
}
"""Arrays of the page's example manifest."""


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A checkpoint in the place that the page's programs read, with one array in uneven chunks."""
    arrays = ARRAYS | SCALE
    boxes = {key: [Box.whole(a.shape)] * 3 for key, a in arrays.items()}
    boxes["embed.weight", "fp32"] = cut((1023, 257), (3, 1))
    document = {key: json.loads(EXAMPLE)[key] for key in ("step", "aliases", "client_state")}
    save_arrays(tmp_path / "run", "global_step1000", arrays, boxes, document=document)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.mark.parametrize("program", READERS, ids=["zarr", "tensorstore", "numpy"])
def test_the_page_s_readers_read_every_array(run, program):
    assert len(list((run / "global_step1000" / PATH).glob("c.*"))) == 3
    for atom, state in ARRAYS:
        names: dict[str, object] = {}
        exec(program.replace(PATH, f"atoms/{atom}/{state}"), names)
        assert same(np.asarray(names["weight"]), ARRAYS[atom, state])


def test_the_page_s_reader_of_bfloat16(run):
    names: dict[str, object] = {}
    exec(BFLOAT16_READER, names)
    assert same(names["scale"], SCALE["scale", "value"])


def test_the_page_s_readers_are_short():
    assert len(READERS) == 3
    assert all(len([line for line in program.splitlines() if line]) <= 13 for program in READERS)


def test_the_page_s_check_finds_damage(run):
    exec(CHECKER, {})
    manifest = run / "global_step1000" / "manifest.json"
    whole = manifest.read_bytes()
    for path in ("manifest.json", f"{PATH}/c.1.0"):
        file = run / "global_step1000" / path
        data = file.read_bytes()
        file.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        with pytest.raises(AssertionError):
            exec(CHECKER, {})
        file.write_bytes(data)
    for key, change in (
        ("block", lambda n: n + 8),
        ("running", lambda t: f"{int(t[:8], 16) ^ 1:08x}{t[8:]}"),
    ):
        content = {k: v for k, v in json.loads(whole).items() if k != "crc32c"}
        chunk = content["chunks"][PATH]["c.1.0"]
        chunk[key] = change(chunk[key])
        rest = json.dumps(content)[1:].encode()
        manifest.write_bytes(b'{"crc32c": "%08x",\n' % crc32c(rest) + rest)
        with pytest.raises(AssertionError):
            exec(CHECKER, {})
    manifest.write_bytes(whole)
    exec(CHECKER, {})


def test_the_page_s_manifest_is_what_is_written(tmp_path):
    example = decode_manifest(EXAMPLE.encode(), "the example")
    own = ("crc32c", "format", "version", "documents", "files", "chunks", "tag")
    document = {key: value for key, value in example.items() if key not in own}
    files = {"zero_to_fp32.py": b"print('hello')\n"}
    save_arrays(tmp_path, "global_step1000", EXAMPLE_ARRAYS, document=document, files=files)
    assert (tmp_path / "global_step1000" / "zero_to_fp32.py").read_bytes() == files["zero_to_fp32.py"]
    data = (tmp_path / "global_step1000" / "manifest.json").read_bytes()
    written = json.loads(data)
    assert list(written) == list(example)
    assert written["documents"].keys() == example["documents"].keys()
    alike = example.keys() - {"crc32c", "documents"}  # zarr's releases may write their documents otherwise
    assert {key: written[key] for key in alike} == {key: example[key] for key in alike}
    assert len(data.splitlines()) == 1 + len(written), "a line for each key, and one for the end"
    assert data.endswith(b"\n}\n")


def test_the_page_s_blocks_are_those_that_are_made():
    sizes = re.search(r"uni3d makes up to (\d+), of (\d+) KiB or more", PAGE)
    assert sizes
    assert [int(n) for n in sizes.groups()] == [BLOCKS, SMALLEST_BLOCK >> 10]


def test_every_key_of_the_manifest_is_in_the_page():
    keys = set(re.findall(r"^\| `(\w+)` \| [a-z ]+ \|", PAGE, re.MULTILINE))
    example = json.loads(EXAMPLE)
    (chunk,) = example["chunks"][PATH].values()
    assert keys == set(example) - {"crc32c"} | set(chunk)
    assert f"| `version` | integer | of this page: `{FORMAT_VERSION}` |" in PAGE
    assert PAGE.startswith(f"# The checkpoint format, version {FORMAT_VERSION}\n")
    for inner in ("writer", "model", "optimizer", "engine"):
        for key in example[inner]:
            assert f"`{key}`" in PAGE, f"{inner}.{key}"


def test_the_page_s_array_is_what_is_written():
    document = json.loads(ARRAY)
    shape = tuple(document["shape"])
    assert document == array_document("float32", shape, shape)
    bits = json.loads(BFLOAT16)
    assert {**document, **bits} == array_document("bfloat16", shape, shape)
    assert np.isnan(np.array(bits["fill_value"], np.uint16).view(ml_dtypes.bfloat16))


def test_the_page_s_escaped_names():
    names = re.findall(r"^\| `(.+)` \| `(.+)` \|$", PAGE, re.MULTILINE)
    assert len(names) == 6
    for name, folder in names:
        assert atom_path(name) == f"atoms/{folder}"
