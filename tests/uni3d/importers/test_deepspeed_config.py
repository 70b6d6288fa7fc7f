"""The config in a DeepSpeed checkpoint, in the forms of values that DeepSpeed accepts."""

from typing import Any

import pytest

from uni3d.importers.deepspeed.optimizer_state import batch_size, loss_scale, scheduler_state


@pytest.mark.parametrize("enabled", [True, 1, "true", "Yes"])
def test_a_loss_scale_of_fp16(enabled: Any) -> None:
    config = {"fp16": {"enabled": enabled, "hysteresis": "3"}}
    saved = {"cur_scale": 256.0, "cur_iter": 9, "last_overflow_iter": 4}
    expected = {"scale": 256.0, "terms": None, "hysteresis": 3, "good_steps": 4}
    assert loss_scale(config, saved) == expected


@pytest.mark.parametrize("section", [None, {}, {"enabled": "false"}, {"enabled": 0}, {"enabled": None}])
def test_no_loss_scale_without_fp16(section: Any) -> None:
    assert loss_scale({"fp16": section}, {"cur_scale": 256.0}) is None


def test_whole_floats_are_batch_sizes() -> None:
    assert batch_size({"train_batch_size": 8.0}, {}) == 8
    sizes = {"train_micro_batch_size_per_gpu": 2.0, "gradient_accumulation_steps": 3.0}
    assert batch_size(sizes, {"dp_world_size": 4}) == 24


def test_a_schedule_for_another_number_of_groups_is_left_out() -> None:
    params = {"warmup_max_lr": [0.1, 0.2], "warmup_num_steps": 2}
    config = {"scheduler": {"type": "WarmupLR", "params": params}}
    left_out: list[str] = []
    groups = [{"lr": 0.1}, {"lr": 0.2}]
    state = scheduler_state(config, {"last_batch_iteration": 5}, groups, left_out)
    assert state is not None
    assert (state["base_lrs"], left_out) == ([0.1, 0.2], [])
    assert scheduler_state(config, {"last_batch_iteration": 5}, groups[:1], left_out) is None
    (reason,) = left_out
    assert reason.startswith("LR schedule: scheduler.params.warmup_max_lr has 2 numbers, but there are 1 par")
