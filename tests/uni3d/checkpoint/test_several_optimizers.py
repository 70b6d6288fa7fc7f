"""Several optimizers and schedulers in one Checkpointer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import RankError, Ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, StepLR

import ckpt
import uni3d

SAMPLES = 8


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


class Counting(SGD):
    """Keeps a number under a string, and another in its `state_dict`."""

    taken = 0

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.taken += 1
        self.state["norm"] = {"steps": self.taken}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"taken": self.taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.taken = state_dict["taken"]


def muon_and_adamw(model: nn.Module) -> dict[str, Optimizer]:
    first, *rest = model.parameters()  # torch's Muon takes no DTensor of a single row
    groups = [{"params": rest[:1], "weight_decay": 0.3}, {"params": rest[1:]}]
    return {"muon": Muon([first], lr=0.05), "adamw": AdamW(groups, lr=0.02, eps=0.01, foreach=False)}


def counting_and_adamw(model: nn.Module) -> list[Optimizer]:
    first, *rest = model.parameters()
    return [Counting([first], lr=0.05, momentum=0.9), AdamW(rest, lr=0.02, eps=0.01, foreach=False)]


def members(optimizers: Any) -> list[Optimizer]:
    return list(optimizers.values()) if isinstance(optimizers, dict) else list(optimizers)


def schedules(optimizers: Any) -> Any:
    first, second = members(optimizers)
    made = [StepLR(first, 1, 0.5), ExponentialLR(second, 0.9)]
    return dict(zip(optimizers, made, strict=True)) if isinstance(optimizers, dict) else made


class Loop:
    def __init__(self, wrap: Callable[[nn.Module], nn.Module], make: Callable[[nn.Module], Any], seed: int):
        self.model = wrap(net(seed))
        self.optimizers = make(self.model)
        self.schedules = schedules(self.optimizers)

    def step(self, number: int, part: int = 0, parts: int = 1) -> float:
        inputs = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(number))
        size = SAMPLES // parts
        for optimizer in members(self.optimizers):
            optimizer.zero_grad()
        loss = F.mse_loss(self.model(inputs[part * size : (part + 1) * size]), torch.ones(size, 1))
        loss.backward()
        for item in (*members(self.optimizers), *members(self.schedules)):
            item.step()
        return loss.item()

    def state(self) -> list[Any]:
        """Return the optimizers' own states, and the schedules'."""
        return [item.state_dict() for item in (*members(self.optimizers), *members(self.schedules))]

    def keeper(self, run: str) -> uni3d.Checkpointer:
        kept = {"model": self.model, "optimizer": self.optimizers, "lr_scheduler": self.schedules}
        return uni3d.Checkpointer(run, async_save=False, **kept)


def plain(model: nn.Module) -> nn.Module:
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": plain,
    "ddp": DistributedDataParallel,
    "fsdp": fully_shard,
}
KINDS: dict[str, Callable[[nn.Module], Any]] = {"muon": muon_and_adamw, "counting": counting_and_adamw}


def two_steps(loop: Loop) -> Loop:
    for number in range(2):
        loop.step(number)
    return loop


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", KINDS)
def test_each_comes_back(tmp_path: Path, kind: str) -> None:
    loop = two_steps(Loop(plain, KINDS[kind], 0))
    loop.keeper(str(tmp_path)).save(2)
    other = Loop(plain, KINDS[kind], 1)
    other.keeper(str(tmp_path)).load()
    assert equal(other.state(), loop.state())
    assert other.step(2) == loop.step(2)
    assert equal(other.state(), loop.state())


def equal(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Tensor):
        return torch.equal(mine, theirs)
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(equal(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, list | tuple):
        return len(mine) == len(theirs) and all(map(equal, mine, theirs))
    return bool(mine == theirs)


def save_case(run: str, wrap: str) -> None:
    loop, rank, ranks = Loop(WRAPPERS[wrap], muon_and_adamw, 0), dist.get_rank(), dist.get_world_size()
    for number in range(2):
        loop.step(number, rank, ranks)
    loop.keeper(run).save(2)


def load_case(run: str, wrap: str) -> float:
    loop = Loop(WRAPPERS[wrap], muon_and_adamw, 1)
    loop.keeper(run).load()
    return loop.step(2)  # all samples on each rank


def test_other_ranks_take_the_same_step(ranks: Ranks, tmp_path: Path) -> None:
    """Muon takes whole matrices on each rank of DDP; of `fully_shard` it gathers them by DTensor."""
    run, loop = str(tmp_path), two_steps(Loop(plain, muon_and_adamw, 0))
    expected = loop.step(2)
    ranks.run(2, save_case, run, "ddp")
    for wrap in ("fsdp", "ddp"):
        assert ranks.run(2, load_case, run, wrap) == pytest.approx([expected] * 2, rel=1e-4)


def one_alone_case(run: str) -> None:
    model = net()
    first, *rest = model.parameters()
    uni3d.save(
        run, model=model, optimizer=[AdamW([first]), AdamW(rest if dist.get_rank() else rest[1:])], step=1
    )


def test_ranks_with_other_optimizers(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="record of hyperparameters and step counts differs between"):
        ranks.run(2, one_alone_case, str(tmp_path))


@pytest.mark.usefixtures("alone")
def test_another_set_is_refused(tmp_path: Path) -> None:
    two_steps(Loop(plain, muon_and_adamw, 0)).keeper(str(tmp_path / "two")).save(2)
    model = net()
    one = AdamW(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    uni3d.save(tmp_path / "one", model=model, optimizer=one, step=2, async_save=False)
    two = "2 optimizers (muon: Muon, groups: 1, adamw: AdamW, groups: 2)"
    cases: list[tuple[str, Any, str]] = [
        ("two", one, f"the checkpoint has {two}, but this run has one optimizer (AdamW): give the same"),
        ("one", muon_and_adamw(model), f"has one optimizer (AdamW), but this run has {two}: give the same"),
        (
            "two",
            list(muon_and_adamw(model).values()),
            "2 optimizers (0: Muon, groups: 1, 1: AdamW, groups: 2)",
        ),
    ]
    for run, optimizer, text in cases:
        with pytest.raises(uni3d.CheckpointError) as raised:
            uni3d.load(tmp_path / run, model=model, optimizer=optimizer)
        assert text in str(raised.value)
        assert "Checkpointer.load(optimizer=False), or by uni3d.load without an optimizer" in str(
            raised.value
        )
        assert all(map(torch.equal, model.parameters(), before))
    uni3d.load(tmp_path / "two", model=model)
    assert not any(map(torch.equal, model.parameters(), before))


@pytest.mark.usefixtures("alone")
def test_the_manifest_names_them(tmp_path: Path) -> None:
    two_steps(Loop(plain, muon_and_adamw, 0)).keeper(str(tmp_path)).save(2)
    record = ckpt.open_checkpoint(tmp_path).manifest["optimizer"]
    assert record["type"] == "Muon + AdamW"
    assert record["members"] == [
        {"name": "muon", "type": "Muon", "groups": 1},
        {"name": "adamw", "type": "AdamW", "groups": 2},
    ]
    params = [group["params"] for group in record["groups"]]
    assert params == [["0.weight"], ["0.bias"], ["2.weight", "2.bias"]]


@pytest.mark.usefixtures("alone")
def test_arguments_of_another_kind(tmp_path: Path) -> None:
    model = net()
    one = AdamW(model.parameters())
    bad: list[tuple[Any, type[Exception], str]] = [
        ([one, 3], TypeError, r"optimizer\[1\] must be a torch.optim.Optimizer; got int"),
        ({"": one}, TypeError, "or a dict of them by name; got"),
        ([], TypeError, "optimizer must be a torch.optim.Optimizer, a list of them"),
        (
            {"a": one, "b": AdamW(model[0].parameters())},
            ValueError,
            r"optimizers a and b both have a parameter",
        ),
    ]
    for optimizer, kind, text in bad:
        with pytest.raises(kind, match=text):
            uni3d.save(tmp_path, model=model, optimizer=optimizer, step=1)
    with pytest.raises(TypeError, match=r"lr_scheduler\[0\] is a int, which has no state_dict"):
        uni3d.save(tmp_path, model=model, lr_scheduler=[3], step=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("alone")
def test_other_schedules_are_refused(tmp_path: Path) -> None:
    loop = two_steps(Loop(plain, muon_and_adamw, 0))
    loop.keeper(str(tmp_path)).save(2)
    first, second = loop.optimizers.values()
    loop.schedules = {"muon": ExponentialLR(first, 0.9), "adamw": ExponentialLR(second, 0.9)}
    with pytest.raises(uni3d.CheckpointError, match="its keys differ; leave out lr_scheduler"):
        loop.keeper(str(tmp_path)).load()
