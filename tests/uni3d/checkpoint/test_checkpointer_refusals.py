"""Refusals of `uni3d.Checkpointer`: one line, the same on all ranks, and nothing written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, Ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LinearLR, StepLR

import uni3d


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.02)


def cut_by_hand(run: str) -> None:
    model = nn.Linear(4, 2 + dist.get_rank(), bias=False)
    uni3d.save(run, model=model, step=1)


def equal_parts(run: str) -> None:
    torch.manual_seed(dist.get_rank())
    uni3d.save(run, model=nn.Linear(4, 2), step=1)


def early_optimizer(run: str) -> None:
    model = nn.Linear(4, 4)
    optimizer = adamw(model)
    uni3d.save(run, model=fully_shard(model), optimizer=optimizer, step=1)


def other_optimizer(run: str) -> None:
    uni3d.save(run, model=nn.Linear(4, 4), optimizer=adamw(nn.Linear(3, 3)), step=1)


def partial_sum(run: str) -> None:
    model, mesh = nn.Linear(4, 4), init_device_mesh("cpu", (2,))
    model.weight = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    uni3d.save(run, model=model, step=1)


def meta(run: str) -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    uni3d.save(run, model=model, step=1)


def other_rates(run: str) -> None:
    model = nn.Linear(4, 4)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.ones_(model.bias)
    optimizer = adamw(model)
    optimizer.param_groups[0]["lr"] = 0.1 + dist.get_rank()
    uni3d.save(run, model=model, optimizer=optimizer, step=1)


def other_steps(run: str) -> None:
    torch.manual_seed(0)
    uni3d.save(run, model=nn.Linear(4, 4), step=dist.get_rank(), tag="last")


def bad_step_on_one_rank(run: str) -> None:
    uni3d.save(run, model=nn.Linear(4, 4), step=1 if dist.get_rank() else "one")  # type: ignore[arg-type]


def bad_setting_on_one_rank(run: str) -> None:
    uni3d.save(run, model=nn.Linear(4, 4), step=1, keep_last=dist.get_rank())


def strange_names(run: str) -> None:
    uni3d.save(run, model=nn.Linear(4, 4), step=1, names={"wieght": "weight"})


REFUSED: dict[Callable[[str], None], str] = {
    cut_by_hand: r"weight is \[2, 4\] float32 on rank 0, but \[3, 4\] float32 on rank 1: a tensor must",
    equal_parts: r"weight/fp32 has other numbers on rank 1 than on rank 0, though both hold the same part",
    early_optimizer: r"the optimizer has a parameter of shape \[4, 4\] that isn't the model's: make",
    other_optimizer: r"the optimizer has a parameter of shape \[3, 3\] that isn't the model's: make",
    partial_sum: "is a partial sum",
    other_rates: "the optimizer's record of hyperparameters and step counts differs between ranks 0 and 1",
    other_steps: "the step differs between ranks 0 and 1",
    bad_step_on_one_rank: "step must be the number of optimizer steps taken; got 'one'",
    bad_setting_on_one_rank: "checkpoint.keep_last is 0: input should be greater than 0",
    strange_names: "names has wieght, which this rank's model doesn't have",
    meta: "weight is on the meta device: it has no values",
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.__name__)
def test_what_is_refused(ranks: Ranks, tmp_path: Path, case: Callable[[str], None]) -> None:
    run = tmp_path / "run"
    with pytest.raises(RankError) as raised:
        ranks.run(2, case, str(run))
    last = [part.strip().splitlines()[-1] for part in str(raised.value).split("rank 1:\n")]
    assert len(last) == 2, "both ranks raise"
    assert last[0] == last[1]
    assert raised.match(REFUSED[case])
    assert not list(run.glob("*"))


@pytest.mark.usefixtures("alone")
def test_arguments_of_another_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="dataloader is a list, which has no state_dict"):
        uni3d.save(tmp_path, model=model, dataloader=[1], step=1)
    with pytest.raises(TypeError, match=r"optimizer must be a .*, a list of them, or a dict"):
        uni3d.save(tmp_path, model=model, optimizer=[], step=1)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, or a list of them"):
        uni3d.Checkpointer(tmp_path, model=[model, 3])
    with pytest.raises(TypeError, match=r"step must be the number of optimizer steps taken; got 1.5"):
        uni3d.save(tmp_path, model=model, step=1.5)
    with pytest.raises(uni3d.CheckpointError, match=r"client_state"):
        uni3d.save(tmp_path, model=model, step=1, client_state={"a": object()})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="WORLD_SIZE is 2, but there is no process group"):
        uni3d.Checkpointer(tmp_path, model=model)


OF_THE_ENGINE = (
    "load_module",
    "load_optimizer",
    "load_lr",
    "load_checkpoint",
    "save_checkpoint",
    "training_data",
)


class Place:
    """A loader with a state."""

    def state_dict(self) -> dict[str, int]:
        return {"sample": 3}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


class Other(Place):
    pass


@pytest.mark.usefixtures("alone")
def test_texts_name_the_checkpointer_s_arguments(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    optimizer = adamw(model)
    schedule = StepLR(optimizer, 1)
    everything: dict[str, Any] = {"model": model, "optimizer": optimizer, "lr_scheduler": schedule}
    uni3d.save(tmp_path / "bare", model=model, step=1, async_save=False)
    uni3d.save(tmp_path / "full", **everything, dataloader=Place(), step=1, async_save=False)
    alone = (
        "load the model alone, by Checkpointer.load(optimizer=False), or by uni3d.load without an optimizer"
    )
    linear = LinearLR(optimizer)
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("bare", {"optimizer": optimizer}, f"the checkpoint has no optimizer; {alone}"),
        ("bare", everything, "has no scheduler, but this run has StepLR; leave out lr_scheduler"),
        ("full", everything | {"lr_scheduler": linear}, "its keys differ; leave out lr_scheduler"),
        ("full", everything | {"dataloader": Other()}, "dataloader is a Other in this run, a Place in the"),
        ("full", everything | {"dataloader": Other()}, 'go on nevertheless by accept_changes=["dataset"]'),
    ]
    for run, given, text in cases:
        with pytest.raises(uni3d.CheckpointError) as raised:
            uni3d.load(tmp_path / run, **{"model": model} | given)
        assert text in str(raised.value)
        assert not any(word in str(raised.value) for word in OF_THE_ENGINE)
    with pytest.raises(uni3d.CheckpointError, match="not a run's folder: to resume the run, give the folder"):
        uni3d.Checkpointer(tmp_path / "full" / "global_step1", model=model).restore()
