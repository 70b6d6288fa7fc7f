"""Loads of arrays that differ are refused or reported before anything changes."""

from pathlib import Path

import numpy as np
import pytest
from ckpt_helpers import Arrays, all_ranks, cut, layout_of, run_ranks, same, save_arrays, targets_of

from ckpt import ArrayKey, Box, CheckpointError, LoadReport, Shard, ShardSpec, load, open_checkpoint

RANKS = 2
SAVED: Arrays = {
    ("embed", "fp32"): np.arange(24, dtype=np.float32).reshape(6, 4),
    ("embed", "exp_avg"): np.arange(24, dtype=np.float32).reshape(6, 4) / 8,
    ("mask", "value"): np.array([True, False, True]),
}


@pytest.fixture
def run(tmp_path) -> Path:
    save_arrays(tmp_path, "t1", SAVED)
    return tmp_path


def targets(wanted: Arrays) -> list[list[Shard]]:
    """Return each rank's targets: its rows of matrices, and copies of the rest."""
    boxes = {
        key: cut(a.shape, (RANKS, 1)) if a.ndim == 2 else [Box.whole(a.shape)] * RANKS
        for key, a in wanted.items()
    }
    return [targets_of(specs) for specs in layout_of(wanted, boxes).values()]


def loading(run: Path, shards: list[list[Shard]], **options: object) -> list[object]:
    checkpoint = open_checkpoint(run)
    return run_ranks(RANKS, lambda comm: load(checkpoint, shards[comm.rank], comm=comm, **options))


def refused(run: Path, shards: list[list[Shard]], **options: object) -> str:
    """Return the message that all ranks raise, after checking that nothing has changed."""
    before = [[t.data.tobytes() for t in rank] for rank in shards]
    results = loading(run, shards, **options)
    assert all(isinstance(r, CheckpointError) for r in results), results
    assert [[t.data.tobytes() for t in rank] for rank in shards] == before
    (message,) = {str(r) for r in results}
    return message


def without(key: tuple[str, str]) -> Arrays:
    return {k: a for k, a in SAVED.items() if k != key}


def test_all_that_fits_is_restored_and_told(run):
    shards = targets(SAVED)
    for report in loading(run, shards):
        assert report.restored == ["embed/exp_avg", "embed/fp32", "mask/value"]
        assert (report.defaulted, report.dropped) == ({}, {})
        assert str(report) == "t1: 3 arrays restored, 0 defaulted, 0 dropped"
    for target in shards[0] + shards[1]:
        assert same(target.data, SAVED[target.spec.key][target.spec.box.slices])


def test_missing_is_refused_and_without_strict_left_as_it_was(run):
    shards = targets({**SAVED, ("head", "fp32"): np.ones((3, 3), np.float32)})
    message = refused(run, shards)
    assert "1 missing in the checkpoint: head/fp32" in message
    assert str(run) in message
    before = shards[1][-1].data.copy()
    for report in loading(run, shards, strict=False):
        assert report.defaulted == {"head/fp32": "not in the checkpoint"}
        assert len(report.restored) == 3
        assert "1 defaulted (head/fp32)" in str(report)
    assert shards[1][-1].spec.key == ("head", "fp32")
    assert same(shards[1][-1].data, before)
    assert same(shards[0][0].data, SAVED["embed", "fp32"][:3])


def test_unexpected_is_refused_and_without_strict_dropped(run):
    shards = targets(without(("embed", "exp_avg")))
    assert "1 unexpected in the checkpoint: embed/exp_avg" in refused(run, shards)
    for report in loading(run, shards, strict=False):
        assert report.dropped == {"embed/exp_avg": "not in the model or its optimizer"}
        assert report.restored == ["embed/fp32", "mask/value"]


def test_what_is_left_on_purpose_keeps_its_reason(run):
    shards = targets(without(("embed", "exp_avg")))
    reason = "optimizer states were not asked for"
    results = loading(run, shards, leave=lambda key: reason if key.state == "exp_avg" else None)
    for report in results:
        assert report.dropped == {"embed/exp_avg": reason}
        assert "1 dropped (embed/exp_avg)" in str(report)
    assert "mask/value" in refused(run, [[], []], leave=lambda k: reason if k.atom == "embed" else None)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("other", "found"),
    [
        (np.zeros((6, 5), np.float32), r"float32\[6, 4\].*float32\[6, 5\]"),
        (np.zeros((6, 4), np.float16), r"float32\[6, 4\].*float16\[6, 4\]"),
    ],
    ids=["shape", "dtype"],
)
def test_another_shape_or_type_is_always_refused(run, other, found, strict):
    message = refused(run, targets({**SAVED, ("embed", "fp32"): other}), strict=strict)
    assert message.startswith("embed/fp32 is ")
    with pytest.raises(CheckpointError, match=found):
        raise CheckpointError(message)


def test_a_difference_that_one_rank_alone_sees_stops_all(run):
    shards = targets(SAVED)
    wrong = ShardSpec(ArrayKey("mask", "value"), "int8", (3,), Box.whole((3,)))
    shards[1][-1] = targets_of([wrong])[0]
    assert "mask/value is bool[3]" in refused(run, shards)
    assert "(rank 1)" in refused(run, shards)


def test_what_only_some_ranks_want_is_neither_missing_nor_unexpected(run):
    """Ranks of different pipeline stages load different arrays."""
    wholes = {key: [Box.whole(a.shape)] for key, a in SAVED.items()}
    shards = targets_of(layout_of(SAVED, wholes)[0])
    reports = loading(run, [shards[:1], shards[1:]])
    assert all(len(r.restored) == 3 for r in reports)
    assert [r.bytes_read for r in reports] == [96, 96 + 3]
    assert all(same(t.data, SAVED[t.spec.key]) for t in shards)


def test_the_report_is_one_line():
    report = LoadReport(tag="t1", restored=["a/fp32"], extra=["rng", "schedule"], left_out=["x (why)", "y"])
    expected = "t1: 1 arrays and 2 extra states restored, 0 defaulted, 0 dropped, left out: x (why); y"
    assert str(report) == expected


def test_long_lists_are_shortened_in_messages(run):
    extra = {(f"x{i:02}", "fp32"): np.zeros((2, 2), np.float32) for i in range(20)}
    message = refused(run, targets({**SAVED, **extra}))
    assert "20 missing in the checkpoint: x00/fp32, " in message
    assert "x07/fp32, ..." in message
    assert "x08" not in message


def test_empty_targets_are_no_trouble(run):
    """A rank that holds nothing of an array."""
    empty = ShardSpec(ArrayKey("embed", "fp32"), "float32", (6, 4), Box((6, 0), (0, 4)))
    shards = targets(SAVED)
    shards[1][0] = targets_of([empty])[0]
    checkpoint = open_checkpoint(run)
    reports = all_ranks(RANKS, lambda comm: load(checkpoint, shards[comm.rank], comm=comm))
    assert [r.bytes_read for r in reports] == [96 + 96 + 3, 96 + 3]
