"""`uni3d inspect`, `export` and `diff`."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import answer, refused, run
from safetensors.numpy import load_file
from whole_arrays import save_whole


def save(folder: Path, tag: str, step: int) -> None:
    data = np.arange(12, dtype=np.float32).reshape(3, 4) + step
    arrays = {
        ("a.weight", "fp32"): data,
        ("a.weight", "exp_avg"): data * 2,
        ("count", "value"): np.array(step),
    }
    document = {
        "step": step,
        "created": "2026-01-02T03:04:05+00:00",
        "writer": {"topology": {"pp": 2, "dp": 1, "tp": 1}, "zero_stage": 1},
        "aliases": {"b.weight": "a.weight"},
    }
    save_whole(folder, tag, arrays, **document)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "run", "global_step1", 1)
    save(tmp_path / "run", "global_step2", 2)
    return tmp_path / "run"


def test_inspect_lists_the_tags(folder: Path) -> None:
    table = run("inspect", folder).stdout
    assert "global_step1" in table
    assert "pp2 dp1 tp1" in table
    rows = answer("inspect", folder)
    assert [(r["tag"], r["step"], r["latest"], r["atoms"], r["bytes"]) for r in rows] == [
        ("global_step1", 1, False, 2, 104),
        ("global_step2", 2, True, 2, 104),
    ]
    alone = answer("inspect", folder / "global_step1")
    assert [(r["tag"], r["latest"]) for r in alone] == [("global_step1", False)]


def test_inspect_shows_a_checkpoint_without_a_date(tmp_path: Path) -> None:
    """`ckpt.save` by itself writes none."""
    save_whole(tmp_path, "t1", {("a", "fp32"): np.zeros(2, np.float32)})
    assert "t1" in run("inspect", tmp_path).stdout


def test_inspect_lists_the_atoms(folder: Path) -> None:
    rows = answer("inspect", folder, "--atoms")
    assert {(r["atom"], r["state"], r["dtype"], r["shape"]) for r in rows} == {
        ("a.weight", "fp32", "float32", "3x4"),
        ("a.weight", "exp_avg", "float32", "3x4"),
        ("count", "value", "int64", "scalar"),
    }


def test_export_writes_only_weights(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.safetensors"
    assert answer("export", folder, output, "--tag", "global_step1")["tensors"] == 2
    tensors = load_file(output)
    assert tensors.keys() == {"a.weight", "count"}
    np.testing.assert_array_equal(tensors["a.weight"], np.arange(12, dtype=np.float32).reshape(3, 4) + 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{run}/nowhere"], "is not a folder"),
        (["inspect", "{run}/latest"], "is not a folder"),
        (["inspect", "{run}", "--tag", "global_step7"], "the tags there are: global_step1, global_step2"),
        (["inspect", "{empty}"], "holds no committed checkpoint"),
        (["export", "{empty}", "{empty}/m.safetensors"], "holds no committed checkpoint"),
        (["export", "{run}", "{run}/model.xyz"], "expected a suffix of .safetensors, .bin, .pt, .pth"),
        (["export", "{run}", "{run}/model.bin", "--format", "safetensors"], "its suffix contradicts"),
        (["export", "{run}", "{run}/m.bin", "--format", "gguf"], "--format gguf: expected safetensors,"),
        (["export", "{run}", "{run}/m.bin", "--dtype", "fp8"], "--dtype fp8: expected fp32, bf16, fp16"),
        (["export", "{run}", "{run}/m.bin", "--include", "x.*"], "--include x.* matches no tensor of 2"),
        (["export", "{run}", "{run}/m.bin", "--exclude", "*"], "leave no tensor to export"),
        (["export", "{run}", "{empty}/no/m.safetensors"], "No such file or directory"),
        (["export", "gs://bucket/run", "m.safetensors"], "gs://bucket/run can't be opened"),
    ],
)
def test_mistakes_are_one_line(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert message in refused(*(a.format(run=folder, empty=empty) for a in arguments))


def test_inspect_computes_statistics(folder: Path) -> None:
    rows = answer("inspect", folder, "a.*", "--atoms", "--stats")
    assert [(r["atom"], r["state"]) for r in rows] == [("a.weight", "exp_avg"), ("a.weight", "fp32")]
    weight = rows[1]
    assert (weight["min"], weight["max"], weight["mean"], weight["nan"]) == (2, 13, 7.5, 0)
    assert "7.5" in run("inspect", folder, "--atoms", "--stats").stdout


def test_diff_and_its_exit_codes(folder: Path) -> None:
    same = run("diff", folder, folder / "global_step2")
    assert (same.returncode, same.stdout) == (0, "3 arrays are identical\n")
    other = run("diff", folder, folder, "--second-tag", "global_step1", "--json")
    assert other.returncode == 1
    differences = json.loads(other.stdout)["differences"]
    assert [(d["atom"], d["state"], d["differs"], d["absolute"]) for d in differences] == [
        ("a.weight", "exp_avg", "values", 2.0),
        ("a.weight", "fp32", "values", 1.0),
        ("count", "value", "values", 1.0),
    ]
    text = run("diff", folder / "global_step1", folder / "global_step2").stdout
    assert "3 of 3 arrays differ; largest difference 2 absolute, 0.5 relative" in text
    missing = run("diff", folder, folder / "nowhere")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: ")


def test_names_do_not_steer_the_terminal(tmp_path: Path) -> None:
    name = "a\x1b[2J\x07\u202eb"
    arrays = {(name, "fp32"): np.zeros(2, np.float32)}
    save_whole(tmp_path / "a", "t1", arrays)
    save_whole(tmp_path / "b", "t1", {("c", "fp32"): np.zeros(2, np.float32)})
    (file,) = (tmp_path / "a").glob("t1/atoms/*/fp32/c.0")
    file.write_bytes(b"")
    told = [run("inspect", tmp_path / "a", "--atoms"), run("verify", tmp_path / "a")]
    told += [run("diff", tmp_path / "a", tmp_path / "b"), run("export", tmp_path / "a", tmp_path / "out.pt")]
    for done in told:
        text = done.stdout + done.stderr
        assert r"a\x1b[2J\x07\u202eb" in text
        assert all(c.isprintable() or c == "\n" for c in text)
