"""The programs, examples and tables of `docs/format.md`, run and checked."""

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from ckpt_helpers import cut, random_array, same, save_arrays

from ckpt import Box
from ckpt.array_files import file_grid
from ckpt.format import FORMAT_NAME, FORMAT_VERSION, array_document, atom_path, decode_manifest

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
PATH = "atoms/embed.weight/fp32"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL)


READERS = [program for program in blocks("python") if PATH in program]
BFLOAT16_READER, PLAIN_READER = [program for program in blocks("python") if PATH not in program]
EXAMPLE, PART, ARRAY, BFLOAT16 = blocks("json")

ARRAYS = {
    ("embed.weight", "fp32"): random_array(np.random.default_rng(0), "float32", (1021, 2570)),
    ("embed.weight", "exp_avg"): random_array(np.random.default_rng(1), "float32", (1021, 2570)),
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
    boxes["embed.weight", "fp32"] = cut((1021, 2570), (3, 1))
    document = {key: json.loads(EXAMPLE)[key] for key in ("step", "aliases", "client_state")}
    save_arrays(tmp_path / "run", "global_step1000", arrays, boxes, document=document)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.mark.parametrize("program", READERS, ids=["zarr", "tensorstore"])
def test_zarr_s_readers_read_every_array(run: Path, program: str) -> None:
    for atom, state in ARRAYS:
        names: dict[str, object] = {}
        exec(program.replace(PATH, f"atoms/{atom}/{state}"), names)
        assert same(np.asarray(names["weight"]), ARRAYS[atom, state])


def test_the_page_s_reader_of_bfloat16(run: Path) -> None:
    names: dict[str, object] = {}
    exec(BFLOAT16_READER, names)
    assert same(names["scale"], SCALE["scale", "value"])


def test_the_page_s_plain_reader_reads_every_array(run: Path) -> None:
    part = json.loads((run / "global_step1000" / "arrays.0.json").read_text())
    record = part["embed.weight"]["fp32"]
    assert record["chunk_shape"] < record["shape"] < record["file_shape"], "several chunks, one cut off"
    names: dict[str, Any] = {}
    exec(PLAIN_READER, names)
    assert names["arrays"].keys() == (ARRAYS | SCALE).keys()
    for key, expected in (ARRAYS | SCALE).items():
        assert same(names["arrays"][key], expected)
    assert len([line for line in PLAIN_READER.splitlines() if line]) <= 40


def test_the_page_s_plain_reader_reads_files_of_several_writers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = {key: [Box.whole(a.shape)] * 3 for key, a in ARRAYS.items()}
    boxes["embed.weight", "fp32"] = cut((1021, 2570), (3, 1))
    save_arrays(tmp_path / "run", "global_step1000", ARRAYS, boxes, planning={"files": "writer"})
    assert len(list((tmp_path / "run" / "global_step1000" / PATH).glob("c.*"))) == 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(PLAIN_READER, names)
    assert all(same(names["arrays"][key], expected) for key, expected in ARRAYS.items())


def test_the_page_s_plain_reader_finds_damage(run: Path) -> None:
    for path in ("manifest.json", "arrays.0.json", f"{PATH}/c.0.0"):
        file = run / "global_step1000" / path
        data = file.read_bytes()
        place = len(data) // 2
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(AssertionError, match="is damaged"):
            exec(PLAIN_READER, {})
        file.write_bytes(data)
    exec(PLAIN_READER, {})


def test_the_page_s_manifest_is_what_is_written(tmp_path):
    example = decode_manifest(EXAMPLE.encode(), "the example")
    own = ("crc32c", "format", "version", "parts", "files", "tag", "commit", "durable")
    document = {key: value for key, value in example.items() if key not in own}
    files = {"zero_to_fp32.py": b"print('hello')\n"}
    save_arrays(tmp_path, "global_step1000", EXAMPLE_ARRAYS, document=document, files=files, durable=True)
    assert (tmp_path / "global_step1000" / "zero_to_fp32.py").read_bytes() == files["zero_to_fp32.py"]
    data = (tmp_path / "global_step1000" / "manifest.json").read_bytes()
    written = json.loads(data)
    assert list(written) == list(example)
    alike = example.keys() - {"crc32c", "files"}  # zarr's releases may write their documents otherwise
    assert {key: written[key] for key in alike} == {key: example[key] for key in alike}
    assert written["files"].keys() == example["files"].keys()
    assert json.loads((tmp_path / "global_step1000" / "arrays.0.json").read_text()) == json.loads(PART)
    assert len(data.splitlines()) == 1 + len(written), "a line for each key, and one for the end"
    assert data.endswith(b"\n}\n")


def test_every_key_of_the_manifest_is_in_the_page() -> None:
    keys = set(re.findall(r"^\| `(\w+)` \| [a-z ]+ \|", PAGE, re.MULTILINE))
    example, part = json.loads(EXAMPLE), json.loads(PART)
    optional = {"data", "dcp"}  # of a run whose loader has a state, and of DCP's saves
    assert keys - optional == set(example) - {"crc32c"} | set(part["embed.weight"]["fp32"])
    assert f"| `version` | integer | of this page: `{FORMAT_VERSION}` |" in PAGE
    assert f'| `format` | string | `"{FORMAT_NAME}"` |' in PAGE
    assert PAGE.startswith(f"# The checkpoint format, version {FORMAT_VERSION}\n")
    for inner in ("writer", "model", "optimizer", "engine"):
        for key in example[inner]:
            assert f"`{key}`" in PAGE, f"{inner}.{key}"


def test_the_page_s_array_is_what_is_written():
    document = json.loads(ARRAY)
    shape = tuple(document["shape"])
    grid = file_grid(shape, shape, shape, 4)
    assert document == array_document("float32", grid)
    bits = json.loads(BFLOAT16)
    assert {**document, **bits} == array_document("bfloat16", grid)
    assert np.isnan(np.array(bits["fill_value"], np.uint16).view(ml_dtypes.bfloat16))


def test_the_page_s_escaped_names():
    names = re.findall(r"^\| `(.+)` \| `(.+)` \|$", PAGE, re.MULTILINE)
    assert len(names) == 6
    for name, folder in names:
        assert atom_path(name) == f"atoms/{folder}"
