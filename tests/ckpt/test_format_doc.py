"""What `docs/format.md` shows is run and checked: its programs, its examples, its table of names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from ckpt_helpers import cut, random_array, same, save_arrays

from ckpt import Box, open_checkpoint
from ckpt.checksum import BLOCK_BYTES
from ckpt.format import array_document, atom_path, decode_manifest

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
PATH = "atoms/embed.weight/fp32"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL)


READERS = [program for program in blocks("python") if PATH in program]
(CHECKER,) = [program for program in blocks("python") if PATH not in program]
EXAMPLE, ARRAY = blocks("json")

ARRAYS = {
    ("embed.weight", "fp32"): random_array(np.random.default_rng(0), "float32", (1023, 257)),
    ("embed.weight", "exp_avg"): random_array(np.random.default_rng(1), "float32", (1023, 257)),
    ("rope.base", "value"): np.array(10000.0),
    ("mask", "value"): np.array([[True, False, True]]),
}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A checkpoint where the page's programs look for it, one array in uneven chunks."""
    boxes = {key: [Box.whole(a.shape)] * 3 for key, a in ARRAYS.items()}
    boxes["embed.weight", "fp32"] = cut((1023, 257), (3, 1))
    document = {key: json.loads(EXAMPLE)[key] for key in ("step", "aliases", "client_state")}
    save_arrays(tmp_path / "run", "global_step1000", ARRAYS, boxes, document=document)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.mark.parametrize("program", READERS, ids=["zarr", "tensorstore", "numpy"])
def test_the_page_s_readers_read_every_array(run, program):
    assert len(list((run / "global_step1000" / PATH).glob("c.*"))) == 3
    for atom, state in ARRAYS:
        names: dict[str, object] = {}
        exec(program.replace(PATH, f"atoms/{atom}/{state}"), names)
        assert same(np.asarray(names["weight"]), ARRAYS[atom, state])


def test_the_page_s_readers_are_short():
    assert len(READERS) == 3
    assert all(len([line for line in program.splitlines() if line]) <= 13 for program in READERS)


def test_the_page_s_check_finds_damage(run):
    exec(CHECKER, {})
    for path in ("manifest.json", f"{PATH}/c.1.0"):
        file = run / "global_step1000" / path
        data = file.read_bytes()
        file.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        with pytest.raises(AssertionError):
            exec(CHECKER, {})
        file.write_bytes(data)


def test_the_page_s_manifest_is_a_whole_one(run):
    example = decode_manifest(EXAMPLE.encode(), "the example")
    written = open_checkpoint(run).manifest
    assert set(written) <= set(example)
    assert (example["format"], example["version"]) == (written["format"], written["version"])
    assert example["block_bytes"] == BLOCK_BYTES == written["block_bytes"]
    assert all(f"{path}/zarr.json" in example["documents"] for path in example["chunks"])
    for chunks in example["chunks"].values():
        for chunk in chunks.values():
            assert len(chunk.get("blocks", [1])) == -(-(chunk["size"] - 4) // BLOCK_BYTES)


def test_every_key_of_the_manifest_is_in_the_page():
    keys = set(re.findall(r"^\| `(\w+)` \| [a-z ]+ \|", PAGE, re.MULTILINE))
    example = json.loads(EXAMPLE)
    (chunk,) = example["chunks"][PATH].values()
    assert keys - {"blocks"} == set(example) - {"crc32c"} | set(chunk) - {"blocks"}
    for inner in ("writer", "model", "optimizer", "engine"):
        for key in example[inner]:
            assert f"`{key}`" in PAGE, f"{inner}.{key}"


def test_the_page_s_array_is_what_is_written():
    document = json.loads(ARRAY)
    shape = tuple(document["shape"])
    assert document == array_document("float32", shape, shape)


def test_the_page_s_escaped_names():
    names = re.findall(r"^\| `(.+)` \| `(.+)` \|$", PAGE, re.MULTILINE)
    assert len(names) == 6
    for name, folder in names:
        assert atom_path(name) == f"atoms/{folder}"
