"""`uni3d.Checkpointer`, `uni3d.save` and `uni3d.load`: stages, several optimizers, loaders, and refusals."""

import copy
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from marks import slow
from models import Stack, global_batches, make_engine, seeded, take_steps
from ranks import RankError, Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adafactor, AdamW, Muon, Optimizer

import uni3d
from uni3d.optim.lion import Lion

# --- the engine and others ----------------------------------------------------------------------------


def adamw(model: nn.Module) -> Optimizer:
    """Return the optimizer of `models.ADAM`, as another trainer makes it."""
    return AdamW(model.parameters(), lr=0.02, weight_decay=0.1, eps=0.01, foreach=False)


def mean_loss(model: nn.Module, plain: Stack, x: Tensor, y: Tensor) -> Tensor:
    total, count = plain.loss_fn(model(x), y)
    return total / count


def steps(model: nn.Module, plain: Stack, optimizer: Optimizer, first: int, count: int) -> list[float]:
    """Take steps of data parallelism over all ranks on global batches; return the mean losses."""
    losses, ranks = [], dist.get_world_size()
    for x, y in global_batches(6)[first : first + count]:
        part = slice(dist.get_rank() * len(x) // ranks, (dist.get_rank() + 1) * len(x) // ranks)
        optimizer.zero_grad()
        loss = mean_loss(model, plain, x[part], y[part])
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / ranks)
    return losses


def fsdp_case(run: str) -> list[float]:
    plain = seeded(Stack)
    for layer in plain.layers:
        fully_shard(layer)
    model = fully_shard(plain)
    optimizer = adamw(model)
    losses = steps(model, plain, optimizer, 0, 2)
    uni3d.save(run, model=model, optimizer=optimizer, step=2).wait()
    return losses


def engine_case(run: str) -> list[float]:
    engine = make_engine(seeded(Stack), zero=1, pp=2, micro=3)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        engine.load_checkpoint(run)
    if dist.get_rank() == 0:
        assert "the checkpoint doesn't count samples: this run goes on at sample 24" in str(told[0].message)
    assert (engine.global_steps, engine.global_samples) == (2, 24)
    micro = [
        (x[i : i + 3], y[i : i + 3])
        for x, y in global_batches(6)[2:4]
        for i in range(6 * engine.model.topology.dp_rank, 6 * engine.model.topology.dp_rank + 6, 3)
    ]
    losses = take_steps(engine, 2, iter(micro))[0]
    engine.save_checkpoint(run)
    engine.wait_for_checkpoint()
    return losses


def ddp_case(run: str) -> tuple[list[float], dict[str, Tensor]]:
    plain = seeded(Stack)
    model = DistributedDataParallel(plain)
    optimizer = adamw(model)
    report, _ = uni3d.load(run, model=model, optimizer=optimizer)
    assert not report.defaulted
    assert not report.dropped
    losses = steps(model, plain, optimizer, 4, 2)
    return losses, plain.state_dict()


@pytest.mark.slow
def test_a_run_goes_from_fsdp_to_the_engine_to_ddp(ranks: Ranks, tmp_path: Path) -> None:
    run, plain = str(tmp_path / "run"), seeded(Stack)
    optimizer, expected = adamw(plain), []
    for x, y in global_batches(6):
        optimizer.zero_grad()
        loss = mean_loss(plain, plain, x, y)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    for losses in ranks.run(4, fsdp_case, run):
        assert losses == pytest.approx(expected[:2], rel=1e-5)
    for losses in ranks.run(4, engine_case, run):
        assert losses == pytest.approx(expected[2:4], rel=1e-5)
    for losses, weights in ranks.run(2, ddp_case, run):
        assert losses == pytest.approx(expected[4:], rel=1e-5)
        for name, weight in plain.state_dict().items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6)


def validated_case(run: str) -> tuple[list[float], list[float]]:
    """Save after a validation, whose forward leaves whole parameters in the outermost module."""
    plain = seeded(Stack)
    model = fully_shard(plain)
    optimizer = adamw(model)
    keeper = uni3d.Checkpointer(run, model=model, optimizer=optimizer)
    steps(model, plain, optimizer, 0, 1)
    with torch.no_grad():
        mean_loss(model, plain, *global_batches(6)[0])
    keeper.save(1).wait()
    losses = steps(model, plain, optimizer, 1, 2)
    keeper.load()
    return losses, steps(model, plain, optimizer, 1, 2)


def test_the_first_save_may_follow_a_validation(ranks: Ranks, tmp_path: Path) -> None:
    for losses, again in ranks.run(2, validated_case, str(tmp_path / "run")):
        assert again == losses


# --- pipeline stages ----------------------------------------------------------------------------------


class Stage(nn.Module):
    """Half of a chain, which numbers its layers from 0."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        torch.manual_seed(stage)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        if stage == 1:
            self.head = nn.Linear(3, 2)


def stage_names(stage: int) -> dict[str, str]:
    return {f"layers.{i}.{n}": f"layers.{i + 2 * stage}.{n}" for i in range(2) for n in ("weight", "bias")}


def momentum(model: nn.Module) -> Optimizer:
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    return optimizer


def stages_case(run: str, mapped: bool) -> None:
    stage = dist.get_rank() // 2
    model = fully_shard(Stage(stage), mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))["dp"])
    names: Any = stage_names(stage) if mapped else None
    uni3d.save(run, model=model, optimizer=momentum(model), step=1, names=names, async_save=False)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
        self.head = nn.Linear(3, 2)


@pytest.mark.usefixtures("alone")
def test_stages_that_number_their_layers_from_zero(ranks: Ranks, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    with pytest.raises(RankError, match=r"ranks 0 and 2 have different models, and both have layers.0.w"):
        ranks.run(4, stages_case, run, False)
    assert not Path(run).exists()
    ranks.run(4, stages_case, run, True)
    model = Whole()
    optimizer = momentum(model)
    uni3d.load(run, model=model, optimizer=optimizer)
    for stage in range(2):
        part = Stage(stage)
        saved = momentum(part)
        names = stage_names(stage)
        here = dict(model.named_parameters())
        for name, parameter in part.named_parameters():
            mine = here[names.get(name, name)]
            assert torch.equal(mine, parameter)
            for key, value in saved.state[parameter].items():
                assert torch.equal(optimizer.state[mine][key], value)


def parts_case(run: str) -> None:
    """A rank with two stages that have whole-model names, as torchtitan's."""
    whole = Whole()
    uni3d.load(run, model=whole)
    parts = [nn.Module(), nn.Module()]
    for i, part in enumerate(parts):
        part.layers = nn.ModuleDict({str(n): nn.Linear(3, 3) for n in range(2 * i, 2 * i + 2)})
    parts[1].head = nn.Linear(3, 2)
    uni3d.load(run, model=parts)
    for part in parts:
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter, whole.get_parameter(name)), name


def test_a_rank_with_several_stages(ranks: Ranks, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    ranks.run(4, stages_case, run, True)
    ranks.run(2, parts_case, run)


# --- optimizers ---------------------------------------------------------------------------------------


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).square().mean()


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "amsgrad": lambda p: AdamW(p, lr=torch.tensor(0.01), amsgrad=True, fused=False, foreach=False),
    "muon": lambda p: Muon(p, lr=0.01),
    "adafactor": lambda p: Adafactor(p, lr=0.01),
    "lion": lambda p: Lion(p, lr=0.01),
}


def descend(model: nn.Module, optimizer: Optimizer, seed: int) -> float:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    loss = model(torch.randn(4, 6))
    loss.backward()
    optimizer.step()
    return loss.item()


def optimizer_case(run: str, kind: str, shard: bool, loads: bool) -> list[float]:
    model: Any = seeded(Square)
    model = fully_shard(model) if shard else DistributedDataParallel(model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    keeper = uni3d.Checkpointer(run, model=model, optimizer=optimizer, async_save=False)
    if loads:
        keeper.load()
        return [descend(model, optimizer, seed) for seed in (2, 3)]
    losses = [descend(model, optimizer, seed) for seed in range(2)]
    keeper.save(2)
    return losses


@pytest.mark.parametrize("kind", ["sgd", slow("amsgrad"), "muon", slow("adafactor"), slow("lion")])
def test_an_optimizer_goes_on(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    """Train on the same samples on all ranks, whose mean gradient is that of one process."""
    run, model = str(tmp_path / "run"), seeded(Square)
    optimizer = OPTIMIZERS[kind](model.parameters())
    expected = [descend(model, optimizer, seed) for seed in range(4)]
    splits = kind in ("sgd", "amsgrad", "lion")  # torch's others compute on a shard as if it were whole
    assert ranks.run(3, optimizer_case, run, kind, splits, False)[0] == pytest.approx(expected[:2], rel=1e-5)
    assert ranks.run(2, optimizer_case, run, kind, False, True)[1] == pytest.approx(expected[2:], rel=1e-5)


# --- functions, handles, loaders ----------------------------------------------------------------------


class Counter:
    """A loader with a state."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        while True:
            self.at += 1
            yield self.at

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "noise": torch.full((2,), float(self.at))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]
        assert torch.equal(state["noise"], torch.full((2,), float(self.at)))


def loader_case(run: str) -> None:
    loader, model = Counter(), seeded(Square)
    model = DistributedDataParallel(model)
    loader.at = 10 + dist.get_rank()
    uni3d.save(run, model=model, dataloader=loader, step=1).wait()
    loader.at = 0
    uni3d.load(run, model=model, optimizer=None, dataloader=loader)
    assert loader.at == 0, "without an optimizer, weights alone are loaded"
    optimizer = adamw(model)
    uni3d.save(run, model=model, optimizer=optimizer, dataloader=loader, step=2)
    loader.at = 5
    uni3d.load(run, model=model, optimizer=optimizer, dataloader=loader)
    assert loader.at == 0


def test_each_rank_s_loader_goes_on(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, loader_case, str(tmp_path / "run"))


@pytest.mark.usefixtures("alone")
def test_a_process_without_a_process_group_is_alone(tmp_path: Path) -> None:
    model = seeded(Square)
    optimizer = adamw(model)
    keeper = uni3d.Checkpointer(tmp_path / "run", model=model, optimizer=optimizer, keep_last=1)
    assert keeper.restore() is None
    for step in (1, 2):
        descend(model, optimizer, step)
        keeper.save(step)
    assert keeper.save(3, tag="last", client_state={"a": [1]}).wait().tag == "last"
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == ["last"]
    other = seeded(Square)
    restored = uni3d.load(tmp_path / "run", model=other, optimizer=adamw(other))
    assert restored.client_state == {"a": [1]}
    assert torch.equal(other.first.weight, model.first.weight)
    assert not dist.is_initialized()


@pytest.mark.usefixtures("alone")
def test_functions_keep_what_they_plan(tmp_path: Path) -> None:
    model = seeded(Square)
    optimizer = adamw(model)
    uni3d.save(tmp_path / "run", model=model, optimizer=optimizer, step=1)
    kept = vars(model)["_uni3d_checkpointer"]
    uni3d.save(tmp_path / "run", model=model, optimizer=optimizer, step=2).wait()
    assert vars(model)["_uni3d_checkpointer"] is kept
    average = Counter()
    for step in (3, 4):  # lists and dicts are made anew in each call
        given = {"objects": {"average": average}, "names": {"first.weight": "begin.weight"}}
        uni3d.save(tmp_path / "run", model=[model], optimizer=optimizer, step=step, **given).wait()
        kept = vars(model)["_uni3d_checkpointer"] if step == 3 else kept
    assert vars(model)["_uni3d_checkpointer"] is kept
    for name, copied in ("deep", copy.deepcopy(model)), ("pickled", pickle.loads(pickle.dumps(model))):
        uni3d.save(tmp_path / name, model=copied, step=1).wait()
    uni3d.save(tmp_path / "run", model=model, step=5).wait()
    assert vars(model)["_uni3d_checkpointer"] is not kept


FAILING = """
import torch, uni3d
from pathlib import Path
run = Path({run!r})
model = torch.nn.Linear(2, 2)
keeper = uni3d.Checkpointer(run, model=model)
keeper.save(1).wait()

def fails(*args, **kwargs): raise OSError("the disk is full")

import uni3d.checkpoint.save as saves
saves.on_host = fails
keeper.save(2)
print("went on")
"""


@pytest.mark.slow
def test_a_process_whose_last_save_failed_exits_with_1(tmp_path: Path) -> None:
    script = FAILING.format(run=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "went on" in done.stdout
    assert "the disk is full" in done.stderr
    assert json.loads((tmp_path / "run" / "global_step1" / "manifest.json").read_text())["step"] == 1
