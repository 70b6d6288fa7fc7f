"""`uni3d export --format dcp`: torch's own functions load it, and training goes on."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from commands import answer, refused
from models import OwnLoss, global_batches, make_engine, save_and_wait, seeded, train
from ranks import Ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from whole_arrays import save_whole

import ckpt
import uni3d
from uni3d.manifest import RunManifest

BEFORE, AFTER = 3, 2


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return two parameter groups with hyperparameters of their own."""
    last = [*model.out.parameters()]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is each for each in last)]
    return [{"params": others, "lr": 0.02}, {"params": last, "lr": 0.05, "betas": (0.8, 0.95)}]


def save_case(run: str) -> None:
    model = seeded(OwnLoss)
    engine = make_engine(model, zero=1, model_parameters=groups(model))
    train(engine, global_batches(BEFORE + AFTER)[:BEFORE])
    save_and_wait(engine, run)


@pytest.fixture(scope="module")
def run(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of an engine on two ranks."""
    folder = tmp_path_factory.mktemp("dcp") / "run"
    ranks.run(2, save_case, str(folder))
    return folder


@pytest.fixture(scope="module")
def out(run: Path) -> Path:
    answer("export", run, run.parent / "out", "--format", "dcp", "--optimizer")
    return run.parent / "out"


def array(value: Any) -> np.ndarray:
    tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return tensor.detach().numpy().copy()


def resume_case(folder: str, sharded: bool) -> tuple[dict[str, Any], dict[str, Any], list[dict], list[float]]:
    """Load into another model and optimizer; return weights, states, groups and the next losses."""
    model = seeded(OwnLoss)
    for parameter in model.parameters():
        nn.init.ones_(parameter.data)
    if sharded:
        fully_shard(model)
    others = [{**group, "lr": 1.0} for group in groups(model)]
    optimizer = torch.optim.AdamW(others, lr=1.0, betas=(0.5, 0.5), eps=1.0, weight_decay=0.0)
    weights, states = get_state_dict(model, optimizer)
    tree = {"model": weights, "optim": states}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process")
        dcp.load(tree, storage_reader=dcp.FileSystemReader(folder), no_dist=not sharded)
    set_state_dict(model, optimizer, model_state_dict=tree["model"], optim_state_dict=tree["optim"])
    weights, states = get_state_dict(model, optimizer)
    found = {name: array(tensor) for name, tensor in weights.items()}
    moments = {
        f"{name}/{key}": array(tensor)
        for name, state in states["state"].items()
        for key, tensor in state.items()
    }
    rank, world = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
    losses = []
    for x, y in global_batches(BEFORE + AFTER)[BEFORE:]:
        loss = model(x.chunk(world)[rank], y.chunk(world)[rank])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if sharded:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return found, moments, states["param_groups"], losses


def test_training_goes_on_in_plain_pytorch(ranks: Ranks, run: Path, out: Path) -> None:
    """FSDP2 on two ranks and one process without it take up the same bits, and the oracle's next steps."""
    stored = ckpt.open_checkpoint(run)
    expected = {key.atom: stored.read(*key) for key in stored.arrays if key.state in ("fp32", "value")}
    expected["decode.weight"] = expected["encode.weight"]
    moments = {f"{key.atom}/{key.state}": stored.read(*key) for key in stored.arrays}
    moments = {name: x for name, x in moments.items() if name.endswith(("exp_avg", "exp_avg_sq"))}
    assert len(moments) == 8
    losses = losses_without_a_stop()
    for found, states, hyper, after in (
        *ranks.run(2, resume_case, str(out), True),
        resume_case(str(out), False),
    ):
        assert found.keys() == expected.keys()
        assert all(found[name].tobytes() == x.tobytes() for name, x in expected.items())
        steps = {name.removesuffix("/step"): x for name, x in states.items() if name.endswith("/step")}
        assert all(x.dtype == np.float32 and x == BEFORE for x in steps.values())
        assert states.keys() - moments.keys() == {f"{name}/step" for name in steps}
        assert all(states[name].tobytes() == x.tobytes() for name, x in moments.items())
        assert [(g["lr"], g["betas"], g["eps"], g["weight_decay"]) for g in hyper] == [
            (0.02, (0.9, 0.999), 0.01, 0.1),
            (0.05, (0.8, 0.95), 0.01, 0.1),
        ]
        assert after == pytest.approx(losses, rel=1e-5)


def losses_without_a_stop() -> list[float]:
    """Return the losses that plain PyTorch has after the save's step."""
    model, losses = seeded(OwnLoss), []
    optimizer = torch.optim.AdamW(groups(model), lr=0.02, weight_decay=0.1, eps=0.01, foreach=False)
    for x, y in global_batches(BEFORE + AFTER):
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[BEFORE:]


def test_it_comes_back_by_the_importer(run: Path, out: Path, tmp_path: Path) -> None:
    answer("import", out, tmp_path / "back")
    here, there = ckpt.open_checkpoint(run), ckpt.open_checkpoint(tmp_path / "back")
    assert {*there.arrays} == {*here.arrays}
    assert all(there.read(*key).tobytes() == here.read(*key).tobytes() for key in here.arrays)
    ours, theirs = RunManifest.of(here), RunManifest.of(there)
    assert theirs.aliases == ours.aliases == {"decode.weight": "encode.weight"}
    assert ours.optimizer is not None
    assert theirs.optimizer is not None
    assert theirs.optimizer.groups == ours.optimizer.groups
    assert theirs.optimizer.scalars == ours.optimizer.scalars


def loaded(folder: Path, like: dict[str, Any]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process")
        dcp.load(like, checkpoint_id=folder, no_dist=True)
    return like


def test_some_weights_in_a_smaller_type(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    row = answer("export", run, out, "--format", "dcp", "--dtype", "bf16", "--exclude", "fixed.*")
    keys = dcp.FileSystemReader(out).read_metadata().state_dict_metadata.keys()
    names = {"encode.weight", "encode.bias", "decode.weight", "out.weight", "out.bias", "calls"}
    assert keys == {f"model.{name}" for name in names}
    assert {*row["left_out"]} == {"fixed.weight", "fixed.bias"}
    stored = ckpt.open_checkpoint(run)
    like = {"encode.weight": torch.zeros(6, 6, dtype=torch.bfloat16), "calls": torch.tensor(0)}
    found = loaded(out, {"model": like})["model"]
    expected = torch.from_numpy(stored.read("encode.weight", "fp32").copy()).to(torch.bfloat16)
    assert torch.equal(found["encode.weight"], expected)
    assert found["calls"] == int(stored.read("calls", "value")) > 0
    files = [path.name for path in out.iterdir() if path.suffix == ".distcp"]
    assert len(files) == len(names) - 1, "the names of a tied weight share one"


class Counting(nn.Linear):
    """A layer with an extra state."""

    def get_extra_state(self) -> Any:
        return {"seen": 3, "mean": torch.ones(2)}

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def test_extra_states_of_modules(alone: None, tmp_path: Path) -> None:
    model = nn.Sequential(Counting(2, 2))
    uni3d.Checkpointer(tmp_path / "run", model=model).save(2)
    answer("export", tmp_path / "run", tmp_path / "out", "--format", "dcp")
    like = get_model_state_dict(model) | {"0._extra_state": {"seen": 0, "mean": torch.zeros(2)}}
    found = loaded(tmp_path / "out", {"model": like})["model"]
    assert found["0._extra_state"]["seen"] == 3
    assert torch.equal(found["0._extra_state"]["mean"], torch.ones(2))


STATES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "SGD alone": (torch.optim.SGD, {}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "RMSprop": (torch.optim.RMSprop, {"centered": True}),
}


@pytest.mark.parametrize("name", STATES)
def test_any_optimizer_of_torch(alone: None, tmp_path: Path, name: str) -> None:
    """The next step in torch's own class has the same bits, whatever the states are."""
    kind, options = STATES[name]
    batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, kind(model.parameters(), lr=0.1, **options)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(batch).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = made()
    step(model, optimizer)
    step(model, optimizer)
    uni3d.Checkpointer(tmp_path / "run", model=model, optimizer=optimizer).save(2)
    answer("export", tmp_path / "run", tmp_path / "out", "--format", "dcp", "--optimizer")
    other, fresh = made()
    weights, states = get_state_dict(other, fresh)
    tree = loaded(tmp_path / "out", {"model": weights, "optim": states})
    set_state_dict(other, fresh, model_state_dict=tree["model"], optim_state_dict=tree["optim"])
    step(model, optimizer)
    step(other, fresh)
    assert torch.equal(other.weight, model.weight)  # type: ignore[arg-type]
    assert torch.equal(other.bias, model.bias)  # type: ignore[arg-type]


REFUSED = {
    "--optimizer": "--optimizer needs --format dcp or megatron",
    "--format dcp --max-shard-size 5GB": "leave out --max-shard-size",
    "--format dcp --optimizer --include out.*": "leave out --include and --exclude",
    "--format dcp --optimizer --dtype bf16": "leave out --dtype bf16",
    "--format dcp --hf-config c.json": "--hf-config needs --format hf",
}


@pytest.mark.parametrize("options", REFUSED)
def test_options_that_contradict(run: Path, tmp_path: Path, options: str) -> None:
    assert REFUSED[options] in refused("export", run, tmp_path / "out", *options.split())
    assert list(tmp_path.iterdir()) == []


UNHELD: dict[str, tuple[dict[str, Any] | None, str]] = {
    "no optimizer": (None, "has no optimizer"),
    "not torch's": ({"type": "Lion", "scalars": {}}, "the optimizer Lion isn't one of torch.optim's"),
    "unknown state": ({"type": "AdamW", "scalars": {"w": {"pace": 1}}}, "torch's AdamW has no state 'pace'"),
    "not trained": ({"type": "AdamW", "scalars": {}}, "AdamW has no state for w"),
    "more of its own": (
        {"type": "AdamW", "scalars": {}, "extra_state": {"value": {"k": 1}, "tensors": {}}},
        "AdamW has states of its own",
    ),
}


@pytest.mark.parametrize("name", UNHELD)
def test_optimizers_that_torch_cannot_hold(tmp_path: Path, name: str) -> None:
    record, message = UNHELD[name]
    if record is not None:
        record = record | {"groups": [{"params": ["w"], "lr": 0.1}]}
    save_whole(tmp_path / "run", "t1", {("w", "fp32"): np.ones(3, np.float32)}, step=1, optimizer=record)
    error = refused("export", tmp_path / "run", tmp_path / "out", "--format", "dcp", "--optimizer")
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
