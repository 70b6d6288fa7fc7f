"""Partial loads and a choice of tags: exactly the excluded parts are left out, and reported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import Stack, assert_same, global_batches, make_engine, seeded, train, train_plainly, whole
from test_live_weights import Renamed

STEPS = 3
WARMUP = {"type": "WarmupLR", "params": {"warmup_num_steps": 6, "warmup_type": "linear"}}


def saved_run(folder: Path, **given: Any) -> tuple[Any, Any]:
    """Return an engine that has taken three steps and saved, and the trained oracle."""
    engine = make_engine(seeded(Stack), **given)
    train(engine, global_batches(STEPS))
    engine.save_checkpoint(folder)
    return engine, train_plainly(seeded(Stack), global_batches(STEPS))[2]


def test_without_optimizer_states(alone: None, tmp_path: Path) -> None:
    """Load weights, counters and schedule, not moments; the schedule's rate holds from the next step on."""
    first, _ = saved_run(tmp_path, config={"scheduler": WARMUP})
    engine = make_engine(seeded(Stack), config={"scheduler": WARMUP})
    engine.load_checkpoint(tmp_path, load_optimizer_states=False)
    assert not engine.optimizer.state
    assert engine.global_steps == STEPS
    assert engine.get_lr() == first.get_lr() != make_engine(seeded(Stack)).get_lr()
    assert_same(whole(engine.module), first.module)
    assert len(engine.last_load.dropped) == 2 * 10, "both moments of each parameter"
    assert set(engine.last_load.dropped.values()) == {"optimizer states were not requested"}


def test_the_module_only(alone: None, tmp_path: Path) -> None:
    _, oracle = saved_run(tmp_path)
    engine = make_engine(seeded(Stack), config={"scheduler": WARMUP})
    lr = engine.get_lr()
    engine.load_checkpoint(tmp_path, load_module_only=True)
    assert_same(whole(engine.module), oracle)
    assert not engine.optimizer.state
    assert (engine.global_steps, engine.global_samples, engine.get_lr()) == (0, 0, lr)


def test_not_strict_is_not_silent(alone: None, tmp_path: Path) -> None:
    first, _ = saved_run(tmp_path)
    engine = make_engine(seeded(Renamed))
    final = whole(engine.module)["final.weight"]
    missing = r"2 missing in the checkpoint: final\.bias/fp32, final\.weight/fp32"
    with pytest.raises(RuntimeError, match=missing):
        engine.load_checkpoint(tmp_path, load_module_only=True)
    engine.load_checkpoint(tmp_path, load_module_only=True, load_module_strict=False)
    report = engine.last_load
    assert set(report.defaulted) == {"final.weight/fp32", "final.bias/fp32"}
    assert {"out.weight/fp32", "out.bias/fp32"} < set(report.dropped)
    assert "2 defaulted (final.bias/fp32, final.weight/fp32)" in str(report)
    state, saved = whole(engine.module), whole(first.module)
    assert torch.equal(state["final.weight"], final)
    for name in ("layers.0.0.weight", "layers.2.0.bias", "layers.3.0.weight"):
        assert torch.equal(state[name], saved[name])


def test_tags_and_latest(alone: None, tmp_path: Path) -> None:
    engine = make_engine(seeded(Stack))
    assert engine.resume(tmp_path / "new") is None
    values = {"at": [1, 2.5, None, "x", True]}
    engine.save_checkpoint(tmp_path, client_state={"at": 0})
    train(engine, global_batches(1))
    engine.save_checkpoint(tmp_path, tag="mine", client_state=values, save_latest=False)
    folder, client_state = engine.load_checkpoint(tmp_path)
    assert (Path(folder).name, client_state, engine.global_steps) == ("global_step0", {"at": 0}, 0)
    folder, client_state = engine.load_checkpoint(tmp_path, tag="mine")
    assert (folder, engine.global_steps) == (str(tmp_path / "mine"), 1)
    assert client_state == values
    assert [type(x) for x in client_state["at"]] == [int, float, type(None), str, bool]
