"""Resumes with values of other kinds than a new run has: the script's own, or standing for the same."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR, SequentialLR, StepLR

import uni3d

BEFORE, STEPS = 3, 6

pytestmark = pytest.mark.usefixtures("alone")


class Phases:
    """A scheduler of a script, whose values change their kinds as it goes on."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.warm: int | None = 2
        self.phase: Any = "warm"
        self.seen: list[Any] = ["nothing"]

    def step(self) -> None:
        self.seen.append(len(self.seen))
        if len(self.seen) > 2:
            self.warm, self.phase = None, 0.5
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.5 if self.warm else 0.9

    def state_dict(self) -> dict[str, Any]:
        return {"warm": self.warm, "phase": self.phase, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(copy.deepcopy(state))


class Window(SGD):
    """An optimizer of a script, with a group that grows and values that come and go."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        for group in self.param_groups:
            group |= {"recent": [], "best": 1.0}

    def step(self) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            group["recent"] = [*group["recent"], len(group["recent"])][-2:]
            group["best"] = None
            for parameter in group["params"]:
                state = self.state[parameter]
                state["taken"] = state.get("taken", 0) + 1
                state["phase"] = "warm" if state["taken"] < 2 else None


class Decay:
    """A function with a state."""

    def __init__(self, by: float = 0.8) -> None:
        self.by = by

    def __call__(self, epoch: int) -> float:
        return self.by**epoch


def plain(epoch: int) -> float:
    return 0.8**epoch


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def train(model: nn.Module, optimizer: Optimizer, scheduler: Any, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.mse_loss(model(x), x[:, :1]).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


Maker = Callable[[Any], Optimizer]


def adamw(lr: Any = 0.01, **given: Any) -> Maker:
    return lambda params: AdamW(params, lr=copy.deepcopy(lr), eps=0.01, foreach=False, **given)


def in_turn(optimizer: Optimizer, function: Callable[[int], float]) -> Any:
    first, second = LambdaLR(optimizer, function), StepLR(optimizer, 2)
    return SequentialLR(optimizer, [first, second], milestones=[2])


@pytest.mark.filterwarnings("ignore:.*is kept", "ignore:.*epoch parameter")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((adamw(), Phases), (adamw(), Phases), id="own scheduler"),
        pytest.param((Window, None), (Window, None), id="own optimizer"),
        pytest.param(
            (adamw(0.25), lambda o: StepLR(o, 2, 0.5)),
            (adamw(torch.tensor(0.25)), lambda o: StepLR(o, 2, 0.5)),
            id="rate to tensor",
        ),
        pytest.param(
            (adamw(torch.tensor(0.25)), lambda o: LambdaLR(o, lambda n: 0.5**n)),
            (adamw(0.25), lambda o: LambdaLR(o, lambda n: 0.5**n)),
            id="rate to number",
        ),
        pytest.param((adamw(amsgrad=1), None), (adamw(amsgrad=True), None), id="1 for true"),
        pytest.param(
            (adamw(), lambda o: in_turn(o, plain)),
            (adamw(), lambda o: in_turn(o, Decay())),
            id="function to object",
        ),
        pytest.param(
            (lambda p: Adafactor(p, eps=(None, 1e-3)), None),
            (lambda p: Adafactor(p, eps=(1e-30, 1e-3)), None),
            id="None to value",
        ),
        pytest.param(
            (lambda p: SGD([{"params": p, "tags": ["a"]}], lr=0.1), None),
            (lambda p: SGD([{"params": p, "tags": ["a", "b"]}], lr=0.1), None),
            id="own key of a group",
        ),
    ],
)
def test_a_resume_is_as_if_never_interrupted(tmp_path: Path, before: Any, after: Any) -> None:
    oracle, (model, resumed) = net(), (net(), net())
    make_optimizer, make_scheduler = before
    optimizer = make_optimizer(oracle.parameters())
    train(oracle, optimizer, make_scheduler and make_scheduler(optimizer), 0, STEPS)

    optimizer = make_optimizer(model.parameters())
    scheduler = make_scheduler and make_scheduler(optimizer)
    train(model, optimizer, scheduler, 0, BEFORE)
    uni3d.Checkpointer(tmp_path, model=model, optimizer=optimizer, lr_scheduler=scheduler).save(BEFORE).wait()

    make_optimizer, make_scheduler = after
    optimizer = make_optimizer(resumed.parameters())
    scheduler = make_scheduler and make_scheduler(optimizer)
    uni3d.Checkpointer(tmp_path, model=resumed, optimizer=optimizer, lr_scheduler=scheduler).load()
    train(resumed, optimizer, scheduler, BEFORE, STEPS)
    for mine, expected in zip(resumed.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)


def test_progress_is_no_change(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for _ in range(2):
        model = net()
        optimizer = adamw()(model.parameters())
        scheduler = CosineAnnealingWarmRestarts(optimizer, 2, 2)
        given = {"model": model, "optimizer": optimizer, "lr_scheduler": scheduler}
        checkpointer = uni3d.Checkpointer(tmp_path, **given)
        if checkpointer.restore() is None:
            train(model, optimizer, scheduler, 0, BEFORE)
            checkpointer.save(BEFORE).wait()
    assert not [str(each.message) for each in recwarn if "is kept" in str(each.message)]
    assert (scheduler.T_cur, scheduler.T_i) == (1, 4)


def test_several_in_another_order(tmp_path: Path) -> None:
    model = net()
    halves = {"a": SGD(model[0].parameters(), lr=0.1), "b": SGD(model[2].parameters(), lr=0.1)}
    uni3d.Checkpointer(tmp_path, model=model, optimizer=halves).save(1).wait()
    turned = {name: halves[name] for name in "ba"}
    with pytest.raises(uni3d.CheckpointError, match="of the same names, in the same order"):
        uni3d.Checkpointer(tmp_path, model=model, optimizer=turned).load()


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("optimizer", {"lr": "fast"}, r"groups\[0\]: lr is 'fast'; expected a number"),
        ("optimizer", {"lr": None}, r"groups\[0\]: lr is None; expected a number"),
        ("optimizer", {"betas": [0.9]}, r"groups\[0\]: betas is \[0.9\]; expected 2 values"),
        ("optimizer", {"amsgrad": 7}, r"groups\[0\]: amsgrad is 7; expected a boolean"),
        ("scheduler", {"gamma": "slow"}, r"scheduler: gamma is 'slow'; expected a number"),
        ("scheduler", {"base_lrs": [None]}, r"scheduler: base_lrs\[0\] is None; expected a number"),
    ],
)
def test_values_of_torch_s_own_are_refused(
    tmp_path: Path, kind: str, edit: dict[str, Any], message: str
) -> None:
    model = net()
    optimizer = adamw()(model.parameters())
    scheduler = StepLR(optimizer, 2)
    checkpointer = uni3d.Checkpointer(tmp_path, model=model, optimizer=optimizer, lr_scheduler=scheduler)
    train(model, optimizer, scheduler, 0, 1)
    if kind == "optimizer":
        optimizer.param_groups[0] |= edit
    else:
        vars(scheduler).update(edit)
    checkpointer.save(1).wait()

    model = net()
    optimizer = adamw()(model.parameters())
    scheduler = StepLR(optimizer, 2)
    before = copy.deepcopy(model.state_dict())
    checkpointer = uni3d.Checkpointer(tmp_path, model=model, optimizer=optimizer, lr_scheduler=scheduler)
    with pytest.raises(uni3d.CheckpointError, match=message):
        checkpointer.load()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
