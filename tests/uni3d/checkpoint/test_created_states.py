"""A load creates an optimizer's states by a step that nobody else sees."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import uni3d

pytestmark = pytest.mark.usefixtures("alone")


def trained(run: Path) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    uni3d.save(run, model=model, optimizer=optimizer, step=2, async_save=False)
    return [state["exp_avg"].clone() for state in optimizer.state.values()]


def test_hooks_and_schedulers_count_no_step(tmp_path: Path) -> None:
    moments, seen = trained(tmp_path), list[str]()
    model = nn.Linear(3, 2)
    optimizer = AdamW(model.parameters(), lr=0.1)
    schedule = StepLR(optimizer, 1)

    def note(name: str) -> Any:
        return lambda *_: seen.append(name)

    hooks = [
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
        register_optimizer_step_pre_hook(note("before any")),
        register_optimizer_step_post_hook(note("after any")),
    ]
    try:
        uni3d.load(tmp_path, model=model, optimizer=optimizer)
        assert seen == []
        assert [state["exp_avg"].tolist() for state in optimizer.state.values()] == [
            m.tolist() for m in moments
        ]
        with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
            schedule.step()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        assert sorted(seen) == ["after", "after any", "before", "before any"]
    finally:
        for hook in hooks:
            hook.remove()


def test_an_object_s_own_step_is_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path)
    model = nn.Linear(3, 2)
    optimizer = AdamW(model.parameters(), lr=0.1)
    monkeypatch.setattr(optimizer, "step", lambda closure=None: pytest.fail("a load isn't a step"))
    uni3d.load(tmp_path, model=model, optimizer=optimizer)
    assert len(optimizer.state) == 2
