"""`uni3d verify`, `clean` and `prune`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from commands import answer, refused
from commands import run as uni3d
from whole_arrays import save_whole

import ckpt
from ckpt.stores.local import LocalStore
from uni3d.cli.terminal import open_run

UNI3D = str(Path(sys.executable).parent / "uni3d")
ODD = "layers[red].w"
FILE = "atoms/layers%5Bred%5D.w/fp32/c.0"


def save(run: Path | str, step: int) -> None:
    arrays = {(ODD, "fp32"): np.arange(20_000, dtype=np.float32) + step, ("count", "value"): np.array(step)}
    save_whole(run, f"global_step{step}", arrays, step=step)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2, 3, 4):
        save(tmp_path / "run", step)
    return tmp_path / "run"


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


WHOLE = r"{tag}: ok; 9 objects, \d+\.\d KiB in \d+\.\d\d s \(\d+ MB/s\)\n"


def test_verify_an_intact_checkpoint(run: Path) -> None:
    result = uni3d("verify", run)
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(WHOLE.format(tag="global_step4"), result.stdout)
    other = uni3d("verify", run, "--tag", "global_step2")
    assert re.fullmatch(WHOLE.format(tag="global_step2"), other.stdout)
    for options in ([], ["--all"]):
        own = uni3d("verify", run / "global_step1", *options)
        assert re.fullmatch(WHOLE.format(tag="global_step1"), own.stdout)
    lines = uni3d("verify", run, "--all").stdout
    assert re.fullmatch("".join(WHOLE.format(tag=f"global_step{step}") for step in (1, 2, 3, 4)), lines)


def test_verify_names_damaged_and_missing_objects(run: Path) -> None:
    file, document = run / "global_step2" / FILE, run / "global_step2/atoms/count/value/zarr.json"
    flip(file, 50_000)
    document.unlink()
    whole = uni3d("verify", run)
    assert (whole.returncode, whole.stdout.count("\n")) == (0, 1)
    for arguments in (["--tag", "global_step2"], ["--all"]):
        result = uni3d("verify", run, *arguments)
        assert (result.returncode, result.stderr) == (1, "")
        lines = result.stdout.splitlines()
        found = lines.index(f"count/value: {document} is missing")
        damaged = "is damaged in 1 of 1 chunks, the first is chunk [0] at byte 0"
        assert lines[found + 1] == f"{ODD}/fp32: {file} {damaged}"
        assert lines[found + 2].startswith("global_step2: 2 problems; 9 objects")
        assert len(lines) == (3 if "--tag" in arguments else 6)


def test_verify_as_json(run: Path) -> None:
    flip(run / "global_step2" / FILE, 0)
    result = uni3d("verify", run, "--all", "--json")
    assert result.returncode == 1
    rows = json.loads(result.stdout)
    assert [(row["tag"], row["whole"]) for row in rows] == [
        ("global_step1", True),
        ("global_step2", False),
        ("global_step3", True),
        ("global_step4", True),
    ]
    objects = [path for path in (run / "global_step2").rglob("*") if path.is_file()]
    own = [path for path in objects if path.name == "zarr.json" and "atoms" in path.parts]  # not counted
    size = sum(path.stat().st_size for path in {*objects} - {*own} if path.name != "manifest.json")
    assert (rows[1]["objects"], rows[1]["bytes"]) == (len(objects) - 1, size)
    (problem,) = rows[1]["problems"]
    path = str(run / "global_step2" / FILE)
    assert (problem["atom"], problem["state"]) == (ODD, "fp32")
    assert (problem["path"], problem["what"][:10]) == (path, "is damaged")


def test_a_checkpoint_that_can_t_be_opened_is_damaged(run: Path) -> None:
    flip(run / "global_step4" / "manifest.json", 200)
    lines = uni3d("verify", run, "--all").stdout.splitlines()
    folder = run / "global_step4"
    line = f"{folder} can't be opened: {folder}/manifest.json is damaged: its checksum "
    assert sum(found.startswith(line) for found in lines) == 1
    assert sum(": ok; " in line for line in lines) == 3
    for arguments in ([run], [run, "--tag", "global_step4"], [folder]):
        result = uni3d("verify", *arguments)
        assert (result.returncode, result.stderr, result.stdout.count("\n")) == (1, "", 2)
        (row,) = json.loads(uni3d("verify", *arguments, "--json").stdout)
        assert (row["tag"], row["whole"], len(row["problems"])) == ("global_step4", False, 1)


def test_documents_that_are_damaged(run: Path) -> None:
    """Without a part, its arrays aren't known, but the rest is verified."""
    folder = run / "global_step4"
    flip(folder / "arrays.0.json", 200)
    flip(folder / "atoms" / "zarr.json", 3)
    result = uni3d("verify", run)
    assert (result.returncode, result.stderr) == (1, "")
    lines = result.stdout.splitlines()
    assert lines[:2] == [
        f"{folder}/arrays.0.json is damaged: its checksum isn't the manifest's",
        f"{folder}/atoms/zarr.json isn't what the manifest says of it",
    ]
    assert lines[2].startswith("global_step4: 2 problems; ")
    flip(folder / "arrays.0.json", 200)
    flip(folder / "zarr.json", 200)
    line = f"{folder}/zarr.json is damaged: its checksum isn't the manifest's"
    assert uni3d("verify", run).stdout.splitlines()[0] == line


def test_verify_all_checks_latest(run: Path) -> None:
    (run / "latest").write_text("global_step9\n")
    result = uni3d("verify", run, "--all")
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1].startswith(f"{run}/latest can't be followed: ")
    assert json.loads(uni3d("verify", run, "--all", "--json").stdout)[-1]["tag"] == "latest"


def leave_behind(run: Path) -> None:
    for name in (".saving.global_step5", ".deleting.global_step0"):
        (run / name / "atoms").mkdir(parents=True)
        (run / name / "atoms" / "c").write_text("x")


def test_clean(run: Path) -> None:
    before = sorted(run.rglob("*"))
    leave_behind(run)
    names = [".deleting.global_step0", ".saving.global_step5"]
    dry = uni3d("clean", run, "--dry-run")
    assert (dry.returncode, dry.stdout.splitlines()) == (0, [f"would remove {name}" for name in names])
    assert answer("clean", run, "--dry-run") == {"removed": names, "dry_run": True}
    assert len([*run.rglob("*")]) == len(before) + 6
    result = uni3d("clean", run)
    assert (result.returncode, result.stdout.splitlines()) == (0, [f"removed {name}" for name in names])
    assert sorted(run.rglob("*")) == before
    assert uni3d("clean", run) == (0, f"{run}: nothing to remove\n", "")
    leave_behind(run)
    assert answer("clean", run) == {"removed": names, "dry_run": False}
    assert sorted(run.rglob("*")) == before
    assert "While a process is saving into the run, this is refused" in uni3d("clean", "--help").stdout


def test_while_another_process_is_saving(run: Path) -> None:
    """Neither command waits, and each says who is (here it is the same process)."""
    leave_behind(run)
    store = ckpt.open_store(run)
    store.hold("a" * 32, "saving global_step5")
    for arguments in (("clean", run), ("prune", run, "--keep-last", 1)):
        result = uni3d(*arguments)
        assert (result.returncode, result.stdout) == (1, "")
        assert f"{run} is being written by this process (saving global_step5, since " in result.stderr
    assert uni3d("clean", run, "--dry-run").returncode == 0
    store.release()
    assert uni3d("clean", run).returncode == 0
    assert len(ckpt.committed_tags(run)) == 4


def test_a_copy_under_another_name(run: Path) -> None:
    """It may be a mix-up, so it isn't taken for what its name says; its own folder says what is wanted."""
    shutil.copytree(run / "global_step2", run / "best")
    result = uni3d("verify", run, "--all")
    assert result.returncode == 1
    (line,) = [line for line in result.stdout.splitlines() if "best" in line and "problem" not in line]
    assert line.startswith(
        f"{run}/best can't be opened: {run}/best/manifest.json has the tag 'global_step2', "
    )
    assert uni3d("verify", run / "best").returncode == 0
    rows = {row["tag"]: row["written on"] for row in answer("inspect", run)}
    assert rows["best"].endswith("(saved as global_step2)")
    assert not rows["global_step2"].endswith(")")
    (row,) = answer("inspect", run, "--tag", "best")
    assert row["tag"] == "best"


def test_prune(run: Path) -> None:
    before = sorted(run.rglob("*"))
    arguments = ("prune", run, "--keep-last", 1, "--keep-every", 2)
    deleted, kept = ["global_step1", "global_step3"], ["global_step2", "global_step4"]
    assert uni3d(*arguments, "--dry-run") == (
        0,
        "would delete global_step1\nwould delete global_step3\nwould keep global_step2, global_step4\n",
        "",
    )
    dry = answer(*arguments, "--dry-run")
    assert dry == {"deleted": deleted, "kept": kept, "dry_run": True}
    assert sorted(run.rglob("*")) == before
    assert json.loads(uni3d(*arguments, "--json").stdout) == {**dry, "dry_run": False}
    assert ckpt.committed_tags(run) == kept
    assert uni3d("prune", run, "--keep-last", 1).stdout == "deleted global_step2\nkept global_step4\n"
    assert uni3d("prune", run, "--keep-last", 1).stdout == "kept global_step4\n"
    assert uni3d("verify", run, "--all").returncode == 0


def test_a_run_at_a_url() -> None:
    for step in (1, 2):
        save("memory://upkeep", step)
    assert uni3d("verify", "memory://upkeep", "--all").stdout.count(": ok; 9 objects") == 2
    assert uni3d("clean", "memory://upkeep") == (0, "memory://upkeep: nothing to remove\n", "")
    assert uni3d("prune", "memory://upkeep", "--keep-last", 1).stdout.startswith("deleted global_step1\n")
    assert uni3d("verify", "memory://upkeep", "--all").stdout.count("\n") == 1


NO_FOLDER, EMPTY = "is not a folder", "holds no committed checkpoint"
OWN = "is the folder of a single checkpoint; give the folder of a run"
COMMANDS = {"verify": [], "clean": [], "prune": ["--keep-last", 1]}


@pytest.mark.parametrize(
    ("commands", "place", "message"),
    [
        (["verify", "clean", "prune"], "{run}/nowhere", NO_FOLDER),
        (["verify", "clean", "prune"], "{run}/latest", NO_FOLDER),
        (["verify", "clean", "prune"], "memory://nowhere", NO_FOLDER),
        (["verify", "prune"], "{empty}", EMPTY),
        (["clean", "prune"], "{run}/global_step1", OWN),
        (["verify", "clean", "prune"], "gs://bucket/run", "can't be opened: Please install gcsfs"),
        (["verify", "clean", "prune"], "nope://bucket", "can't be opened: Protocol not known: nope"),
    ],
)
def test_bad_paths_are_one_line_errors(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: list[str], place: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it weren't installed
    (tmp_path / "empty").mkdir()
    place = place.format(run=run, empty=tmp_path / "empty")
    before = sorted(tmp_path.rglob("*"))
    for command in commands:
        assert refused(command, place, *COMMANDS[command]).startswith(f"{place} {message}")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_that_cannot_be_read_is_no_absent_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(store: LocalStore, path: str) -> bool:
        raise PermissionError(13, "Permission denied", store.where(path))

    monkeypatch.setattr(LocalStore, "exists", hidden)
    with pytest.raises(ckpt.CheckpointError, match=f"^{run} can't be read: Permission denied"):
        open_run(str(run))


def test_missing_credentials_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(fsspec.config.conf, "s3", {})
    for command in ("verify", "clean", "prune"):
        told = refused(command, "s3://bucket/run", *COMMANDS[command])
        assert told.startswith("s3://bucket/run can't be read: there are no credentials (Unable to locate")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["verify", "{run}", "--tag", "x"], 1, "the tags there are: global_step1, global_step2,"),
        (["verify", "{run}", "--tag", "x", "--all"], 1, "--all and --tag x are mutually exclusive"),
        (["verify", "{run}/nowhere", "--all"], 1, "is not a folder"),
        (["prune", "{run}"], 2, "Missing option '--keep-last'"),
        (["prune", "{run}", "--keep-last", "0"], 2, "Invalid value for '--keep-last'"),
    ],
)
def test_bad_options(run: Path, arguments: list[str], code: int, message: str) -> None:
    result = uni3d(*(argument.format(run=run) for argument in arguments))
    assert (result.returncode, result.stdout) == (code, "")
    assert message in result.stderr
    assert len(ckpt.committed_tags(run)) == 4


def test_in_a_process_of_its_own(run: Path) -> None:
    """If stderr is a terminal there is a progress bar, which doesn't affect stdout."""
    flip(run / "global_step4" / FILE, 0)
    terminal, end = os.openpty()
    command = [UNI3D, "verify", str(run)]
    environment = {**os.environ, "TERM": "xterm"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=end, text=True, timeout=60, env=environment)
    os.close(end)  # or reading would block if nothing was written
    bar = os.read(terminal, 10_000)
    assert b"verifying global_step4" in bar
    assert re.search(rb"(\d+\.\d)/\1 kB", bar), "the bar is complete at the end"
    os.close(terminal)
    assert done.returncode == 1
    assert done.stdout.splitlines()[0].startswith(f"{ODD}/fp32: {run}/global_step4/")
