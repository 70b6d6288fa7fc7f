"""A save that fails or is killed at any call: a reader only ever sees the old or the new numbers."""

import errno
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from ckpt_faults import Faults, killed_at, recorded
from ckpt_helpers import Arrays, cut, files_below, holding, layout_of, run_ranks, save_arrays, shards_of
from ckpt_saved import flipped
from marks import matrix, slow

from ckpt import (
    CheckpointError,
    Retention,
    SaveReport,
    committed_tags,
    make_plan,
    open_checkpoint,
    read_latest,
    save,
    verify,
)
from ckpt.stores.files import sync_tree, write_file, write_shared

W, B, F, S = ("w", "fp32"), ("w", "exp_avg"), ("frozen", "fp32"), ("frozen", "value")
PLANNING = {"chunk_bytes": 1 << 16, "gather_below": 1 << 12}
LINKED = {F: 3 * 4 + 4, S: 2 * (32 * 510 * 4 + 4)}
"""Bytes of the chunks of the arrays that never change."""


def arrays_of(seed: int) -> Arrays:
    """Make an array that all ranks write, a gathered one, and two fixed ones, of one writer and of all."""
    rng = np.random.default_rng(seed)
    changing = {W: rng.standard_normal((256, 512), np.float32), B: rng.standard_normal(5, np.float32)}
    fixed = np.random.default_rng(0).standard_normal((64, 510), np.float32)
    return {**changing, F: np.ones(3, np.float32), S: fixed}


OLD, NEW = arrays_of(1), arrays_of(2)

SITUATIONS = {"first": "t1", "next": "t2", "again": "t1", "only": "t2"}
"""Tag to save: in an empty run; beside t1; replacing t1; and beside t1, which retention then deletes."""

CASES = [("first", 1), ("next", 2), ("again", 1), ("again", 2), ("only", 1), ("only", 2)]
FAILED = [slow(*case) if case == ("again", 1) else matrix(*case) for case in CASES]
KILLED = [slow(*CASES[0]), *(matrix(*case) for case in CASES[1:])]
"""All calls of a few saves; a quick look has some calls of all saves of `tests/faults`."""


def saving(run: Path, situation: str, ranks: int) -> Callable[[], list[object]]:
    """Return a save of the new numbers, which returns each rank's result or exception."""
    boxes = {W: cut((256, 512), (ranks, 1)), B: cut((5,), (ranks,)), F: cut((3,), (1,)) * ranks}
    layout = layout_of(NEW, boxes | {S: cut((64, 510), (ranks, 1))})
    shards = [shards_of(NEW, specs) for specs in layout.values()]
    options = {"plan": make_plan(layout, **PLANNING), "document": {}}
    options["retention"] = Retention(keep_last=1 if situation == "only" else None)
    options["threads"] = ranks  # with one of each, the calls come in the same order each time
    tag = SITUATIONS[situation]
    return lambda: run_ranks(ranks, lambda comm: save(run, tag, shards[comm.rank], comm=comm, **options))


@pytest.fixture(scope="module")
def prepare(memory_path) -> Callable[[str], Path]:
    """Return a function that makes the run's folder of a situation anew."""
    save_arrays(memory_path / "before", "t1", OLD, planning=PLANNING)

    def make(situation: str) -> Path:
        run = memory_path / situation
        shutil.rmtree(run, ignore_errors=True)
        if situation != "first":
            shutil.copytree(memory_path / "before", run)
        return run

    yield make
    for path in memory_path.iterdir():
        shutil.rmtree(path)


def number_of_calls(prepare: Callable[[str], Path], situation: str, ranks: int) -> int:
    work = saving(prepare(situation), situation, ranks)
    with Faults(0).active() as faults:
        (report,) = {*work()}
    assert isinstance(report, SaveReport)
    assert report.bytes_linked == (0 if situation == "first" else sum(LINKED.values()))
    assert report.pruned == (("t1",) if situation == "only" else ())
    assert len(faults.names) > 20
    return len(faults.names)


holds = partial(holding, {"old": OLD, "new": NEW})


def check_what_is_left(run: Path, situation: str, committed: bool) -> None:
    """Check that the old checkpoint is whole, the new one if it was committed, and that a next save works."""
    tag, there = SITUATIONS[situation], committed_tags(run)
    expected = {} if situation == "first" else {"t1": "old"}
    assert read_latest(run) in (there or [None])
    if committed and situation == "only" and "t1" not in there:
        del expected["t1"]  # wholly, or not at all
    if committed:
        expected[tag] = "new"
    assert {t: holds(run, t) for t in there} == expected
    assert not [problem for t in there for problem in verify(open_checkpoint(run, t), threads=1)]
    hidden = {str(p.relative_to(run)) for t in there for p in (run / t).rglob(".*")}
    assert hidden <= ({"t1/.latest"} if situation == "first" else set()), "what served the save is gone"
    save_arrays(run, tag, NEW)
    assert holds(run, tag) == "new"
    assert read_latest(run) == tag
    left = {path.name for path in run.iterdir()}
    assert left == {*expected, tag, "latest"}, "nothing of the failed save is left"


@pytest.mark.parametrize("forever", [False, True], ids=["one-call-fails", "all-fail-from-then-on"])
@pytest.mark.parametrize(("situation", "ranks"), FAILED)
def test_a_save_in_which_a_call_fails(prepare, situation, ranks, forever):
    tag, survived = SITUATIONS[situation], set()
    for k in range(1, number_of_calls(prepare, situation, ranks) + 1):
        run = prepare(situation)
        with Faults(k, forever=forever).active() as faults:
            results = saving(run, situation, ranks)()
        errors = {str(r) for r in results if isinstance(r, Exception)}
        if errors:
            assert all(isinstance(r, CheckpointError) for r in results), results
            assert len(errors) == 1, "all ranks tell the same"
            assert forever or not [*run.glob(".saving.*")], "a failed save cleans up where it can"
        else:
            assert [(r.tag, r.url) for r in results] == [(tag, str(run / tag))] * ranks
            there = committed_tags(run)
            assert {*there} == {"t1", tag} - {*results[0].pruned}
            assert there == [tag] or situation == "next" or faults.struck[0] in ("open", "rename"), (
                "its manifest was read, or it was renamed to be deleted"
            )
            survived |= {*faults.struck}
        check_what_is_left(run, situation, not errors or "is committed" in errors.pop())
    # What may fail: comparing and linking an old chunk, removing what isn't kept or was replaced, and giving
    # back the lock.
    linking = {"open", "link"} if situation != "first" and not forever else set()
    removing = {"open", "rmdir"} | ({"fsync", "rename"} if situation == "only" else set())
    may_fail = linking | (removing if situation in ("again", "only") else set()) | {"open", "unlink"}
    assert survived <= may_fail
    assert survived == may_fail or ranks > 1, "one rank and one thread make the same calls each time"


@pytest.mark.parametrize(("situation", "ranks"), KILLED)
def test_a_save_that_is_killed(prepare, situation, ranks):
    tag, exists, killed = SITUATIONS[situation], [], 0
    calls = number_of_calls(prepare, situation, ranks)
    for k in range(1, calls + 1):
        run = prepare(situation)
        killed += killed_at(k, saving(run, situation, ranks))
        exists.append(tag in committed_tags(run) and holds(run, tag) == "new")
        check_what_is_left(run, situation, exists[-1])
    assert {*exists} == {False, True}
    assert exists == sorted(exists), "there is one call from which on the new checkpoint exists"
    assert killed == calls


@pytest.mark.parametrize("k", [2, 5, 9, 20, 40])
def test_an_interrupt_of_one_rank_ends_the_save_on_all(prepare, k):
    def interrupt() -> None:
        raise KeyboardInterrupt

    run = prepare("next")
    with Faults(k, at_fault=interrupt).active():
        results = saving(run, "next", 2)()
    assert sorted(type(r).__name__ for r in results) == ["CheckpointError", "KeyboardInterrupt"]
    check_what_is_left(run, "next", committed=False)


def test_a_full_disk_is_told_with_the_file(prepare):
    """The system tells of it by a write or a sync, which know no name."""
    work = saving(prepare("next"), "next", 1)
    with Faults(0).active() as faults:
        work()
    nameless = [k for k, name in enumerate(faults.names, start=1) if name in ("pwritev", "fsync")]
    assert len(nameless) > 10
    for k in nameless:
        run = prepare("next")
        with Faults(k, error=errno.ENOSPC).active():
            (error,) = saving(run, "next", 1)()
        assert isinstance(error, CheckpointError)
        assert re.search(rf"\[Errno {errno.ENOSPC}\] .*'{run}[/']", str(error)), error


STRIDE = 1 << 16
"""Bytes from one chunk of S to the next."""
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "first page": lambda data: flipped(data, 5),
    "of another rank": lambda data: flipped(data, STRIDE + 5),
    "gap": lambda data: flipped(data, STRIDE - 1),
    "index": lambda data: flipped(data, len(data) - 9),
    "cut short": lambda data: data[:-1],
    "too long": lambda data: data + b"x",
    "deleted": lambda data: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_the_disk_has_lost_is_written_again(prepare, damage, ranks):
    """A file that would have been linked has changed on the disk."""
    run = prepare("next")
    old = run / "t1" / "atoms" / "frozen" / "value" / "c.0.0"
    data = old.read_bytes()
    assert len(data) == 2 * STRIDE + 2 * 16 + 4
    old.unlink()
    if (damaged := DAMAGES[damage](data)) is not None:
        old.write_bytes(damaged)
    reports = saving(run, "next", ranks)()
    assert {report.bytes_linked for report in reports} == {LINKED[F]}
    assert holds(run, "t2") == "new"
    assert verify(open_checkpoint(run, "t2")) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_files_are_copied_where_they_cannot_be_linked(prepare, monkeypatch, ranks):
    def refuse(old, new):
        raise OSError(errno.EMLINK, "Too many links")

    monkeypatch.setattr("os.link", refuse)
    run = prepare("next")
    with Faults(0).active() as faults:
        (report,) = {*saving(run, "next", ranks)()}
    assert report.bytes_linked == sum(LINKED.values())
    assert faults.names.count("copyfile") == 2
    assert {path.stat().st_nlink for path in run.rglob("c.*")} == {1}
    check_what_is_left(run, "next", committed=True)

    def fail(old, new):
        Path(new).write_bytes(Path(old).read_bytes()[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    run = prepare("next")
    monkeypatch.setattr("shutil.copyfile", fail)
    results = saving(run, "next", ranks)()
    assert {type(result) for result in results} == {CheckpointError}
    assert len({str(result) for result in results}) == 1
    assert "No space left" in str(results[0])
    monkeypatch.undo()
    check_what_is_left(run, "next", committed=False)


@pytest.mark.parametrize("ranks", [1, 2])
def test_short_writes_and_many_at_once_make_the_same_files(prepare, monkeypatch, ranks):
    """A system may write less than it was asked to, and threads write parts of a large file."""
    run, pwritev = prepare("first"), os.pwritev
    saving(run, "first", ranks)()
    expected = files_below(run)
    monkeypatch.setattr("os.pwritev", lambda fd, views, at: pwritev(fd, [views[0][:4999]], at))
    monkeypatch.setattr("ckpt.write.JOB_BYTES", 1 << 16)
    run = prepare("first")
    saving(run, "first", ranks)()
    assert files_below(run) == expected


def test_a_file_with_a_second_name_is_never_written(tmp_path):
    """It is another checkpoint's too."""
    (tmp_path / "old").write_bytes(b"as it was")
    (tmp_path / "new").hardlink_to(tmp_path / "old")
    with pytest.raises(FileExistsError, match="is linked to another checkpoint's file"):
        write_shared(tmp_path / "new", [(0, [b"x"])], hurry=False)
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "new", [b"x"], durable=False)
    assert (tmp_path / "old").read_bytes() == b"as it was"


@pytest.mark.parametrize("situation", SITUATIONS)
def test_everything_is_on_the_disk_before_what_makes_it_visible(prepare, situation):
    """A power cut loses what wasn't synced, in any order: so sync all, then commit, sync, then `latest`."""
    run, tag = prepare(situation), SITUATIONS[situation]
    with recorded() as calls:
        saving(run, situation, 2)()
    calls = [call for call in calls if ".writer" not in call[1]]  # the lock, which no crash needs
    (staging,) = {Path(path).parent for _, path, _ in calls if path.endswith("/arrays.0.json")}
    token = staging.name.removeprefix(f".saving.{tag}.")
    assert len(token) == 32

    def place(name: str, path: object, after: int = 0) -> int:
        return next(i for i, call in enumerate(calls) if i >= after and call[:2] == (name, str(path)))

    commit = place("move", f"{staging} -> {run / tag}")
    last = [place("write", staging / name) for name in ("zarr.json", "arrays.0.json", "manifest.json")]
    root, _, manifest = last
    written = [(i, Path(path)) for i, (name, path, _) in enumerate(calls[:commit]) if name == "write"]
    marks = [i for i, path in written if path == staging / ".latest"]
    assert len(marks) == (1 if situation == "first" else 0)
    assert all(i < manifest for i in marks)
    written = [(i, path) for i, path in written if i not in marks]
    linked = [i for i, (name, _, _) in enumerate(calls) if name == "link"]
    assert [i for i, _ in written[-3:]] == last, "written last"
    shared = staging / "atoms" / "w" / "fp32" / "c.0.0"
    assert len({thread for name, path, thread in calls if path == str(shared)}) == 2
    assert {"zarr.json", "c.0.0", "c.0"} <= {path.name for _, path in written}
    assert len(linked) == (0 if situation == "first" else 2)
    before = [*linked, *(i for i, _ in written[:-3])]
    assert all(i < place("sync_tree", staging, i) < root for i in before)
    last_chunk = max([*linked, *(i for i, path in written if path.name.startswith("c."))])
    by = {thread for name, _, thread in calls[last_chunk:commit] if name == "sync_tree"}
    assert by == {"rank 0", "rank 1"}, "each rank's machine has a cache of its own"
    assert all(i < place("sync", calls[i][1], i) < commit for i in last)
    assert manifest < place("sync", staging / "manifest.json") < place("sync", staging, manifest) < commit
    temporary = run / f".latest.{token}.tmp"
    latest = place("move", f"{temporary} -> {run / 'latest'}")
    assert commit < place("sync", run, commit) < latest
    assert commit < place("write", temporary) < place("sync", temporary) < latest < place("sync", run, latest)
    gone = place("sync", run, latest)
    if situation == "only":
        deleting = f"{run / 't1'} -> {run / '.deleting.t1.'}"
        (deleted,) = [i for i, call in enumerate(calls) if call[1].startswith(deleting)]
        assert gone < deleted < place("sync", run, deleted)
        gone = place("sync", run, deleted)
    removed = [i for i, (name, path, _) in enumerate(calls) if name == "remove" and path[0] != "/"]
    assert all(i > gone for i in removed), (
        "nothing is taken away before what takes its place is there for good"
    )
    assert bool(removed) == (situation in ("again", "only"))


def test_syncing_a_tree_by_hand_reaches_every_file_and_folder(tmp_path, monkeypatch):
    """Where the system has no `syncfs`: files before the folders that they are in."""
    for path in ("a/b/c.0", "a/zarr.json", "d"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    sync_tree(tmp_path)  # the real one, by whatever this system has
    monkeypatch.setattr("ctypes.CDLL", lambda *args, **kwargs: object())
    with recorded() as calls:
        sync_tree(tmp_path)
    synced = [Path(path) for name, path, _ in calls if name == "sync"]
    assert sorted(synced) == sorted([tmp_path, *tmp_path.rglob("*")])
    assert all(synced.index(path) < synced.index(path.parent) for path in synced if path != tmp_path)


def test_without_durable_nothing_is_synced(tmp_path):
    with recorded() as calls:
        save_arrays(tmp_path, "t1", NEW, durable=False)
    assert {name for name, _, _ in calls} == {"write", "move", "link", "remove"}


def test_a_file_system_that_cannot_exchange_keeps_the_old(tmp_path, monkeypatch):
    def refuse(a, b):
        raise OSError(22, "Invalid argument")

    save_arrays(tmp_path, "t1", OLD)
    monkeypatch.setattr("ckpt.stores.files.exchange_folders", refuse)
    with pytest.raises(CheckpointError, match=r"t1 exists and can't be replaced.*another tag"):
        save_arrays(tmp_path, "t1", NEW)
    assert holds(tmp_path, "t1") == "old"
    save_arrays(tmp_path, "t2", NEW)
    assert holds(tmp_path, "t2") == "new"


@pytest.mark.parametrize("tag", ["", ".", "..", "../up", "a/b", ".hidden", "-rf", "latest", "x" * 201, "a b"])
def test_tags_that_cannot_be_folders_are_refused(tmp_path, tag):
    with pytest.raises(CheckpointError, match="can't name a checkpoint"):
        save_arrays(tmp_path / "run", tag, NEW)
    assert not [*tmp_path.iterdir()]
