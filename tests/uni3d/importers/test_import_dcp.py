"""Imports of torch's distributed checkpoints equal the live run."""

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from foreign_files import FIXTURES, assert_bits, expected, saved, source_of, values
from marks import slow
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import uni3d
from ckpt import CheckpointError
from uni3d.importers.write import write

# --- what torch wrote on real ranks -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dcp_fsdp", "dcp_fsdp_tp", "dcp_torchtitan", "dcp_weights"])
def test_every_array_is_the_live_runs(name: str) -> None:
    source = source_of(FIXTURES / name / "checkpoint")
    arrays, facts = expected(name)
    assert source.kind == "dcp"
    if source.optimizer is None:  # then nothing tells which weights are tied
        kinds = facts["aliases"].items()
        arrays |= {f"fp32/{alias}": arrays[f"fp32/{first}"] for alias, first in kinds}
    assert_bits(values(source), arrays)
    assert source.aliases == (facts["aliases"] if source.optimizer else {})


@pytest.mark.parametrize("name", ["dcp_fsdp", "dcp_fsdp_tp", "dcp_torchtitan"])
def test_the_optimizer_is_the_live_runs(name: str) -> None:
    source = source_of(FIXTURES / name / "checkpoint")
    _, facts = expected(name)
    assert source.optimizer.type == "AdamW"
    how = {"foreach", "fused", "capturable", "differentiable", "names"}
    for group, fact in zip(source.optimizer.groups, facts["groups"], strict=True):
        assert group["params"] == fact["names"]
        hyper = {key: value for key, value in fact.items() if key not in how}
        assert {key: value for key, value in group.items() if key != "params"} == hyper
    steps = {parameter: numbers["step"] for parameter, numbers in source.optimizer.scalars.items()}
    assert steps == facts["parameter_steps"]
    assert source.frozen == set(facts["frozen"])
    assert source.step == facts["step"]


def test_what_is_beside_becomes_the_client_state_or_is_named() -> None:
    assert source_of(FIXTURES / "dcp_fsdp/checkpoint").client_state == expected("dcp_fsdp")[1]["client_state"]
    source = source_of(FIXTURES / "dcp_torchtitan/checkpoint")
    assert source.client_state["train_state"] == {"step": 4, "ntokens_seen": 480}
    assert source.client_state["lr_scheduler"]["last_epoch"] == 4
    for name in ("dataloader.dp_rank_0", "dataloader.dp_rank_1", "lr_scheduler", "head.weight"):
        assert any(line.startswith(f"{name}: ") for line in source.left_out), name


# --- a run that goes on -----------------------------------------------------------------------------------

BATCH, BEFORE, AFTER = 12, 4, 8
LR, BETAS, DECAY = 0.02, (0.9, 0.98), 0.1


class Regressor(nn.Module):
    """Rows that three ranks don't divide: with five, one has fewer; with two, one has none."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 5)
        self.outer = nn.Linear(5, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.outer(torch.tanh(self.inner(x))), y)


def regressor() -> Regressor:
    torch.manual_seed(3)
    return Regressor()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 3, generator=generator)
    return x, x[:, :2] - 2 * x[:, 1:]


def train_fsdp(folder: str, sizes: tuple[int, ...], flat: bool) -> tuple[dict[str, Tensor], list[float]]:
    """Train, save by DCP, and train on: what was held at the save, and the losses after it.

    The mesh is of ranks that shard the model, or of groups of them that hold the same.
    """
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
    model = regressor()
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY)
    losses = [fsdp_step(model, optimizer, step) for step in range(BEFORE)]
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    weights, states = get_state_dict(model, optimizer, options=options)
    dcp.save({"app": {"model": weights, "optim": states}, "epoch": 2}, checkpoint_id=folder)
    held = {f"fp32/{name}": full(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for state in ("exp_avg", "exp_avg_sq"):
            held[f"{state}/{name}"] = full(optimizer.state[p][state])
    losses += [fsdp_step(model, optimizer, BEFORE + step) for step in range(AFTER)]
    return held, losses[BEFORE:]


def fsdp_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    ranks = dist.get_world_size()
    loss = model(*(part.chunk(ranks)[dist.get_rank()] for part in batch(step)))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / ranks


def full(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor().detach()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("sizes", "flat"), [((3,), False), slow((2, 2), True)], ids=["uneven, groups", "replicated, flat"]
)
def test_an_fsdp_run_goes_on_as_it_would_have(tmp_path: Path, ranks: Ranks, sizes: Any, flat: bool) -> None:
    held, losses = ranks.run(prod(sizes), train_fsdp, str(tmp_path / "dcp"), sizes, flat)[0]
    source = source_of(tmp_path / "dcp")
    assert_bits(values(source), {name: tensor.numpy() for name, tensor in held.items()})
    write(source, tmp_path / "run", "imported")
    config = {
        "train_batch_size": BATCH,
        "gradient_clipping": 0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LR, "betas": list(BETAS), "weight_decay": DECAY, "eps": 1e-8},
        },
    }
    engine, *_ = uni3d.initialize(model=Regressor(), config=config)
    with pytest.warns(UserWarning, match="the checkpoint doesn't say in which order") as warned:
        _, client_state = engine.load_checkpoint(tmp_path / "run")
    assert "group" not in str(warned[0].message), "a hyperparameter isn't what it was"
    assert client_state == {"epoch": 2}
    assert engine.global_steps == BEFORE
    found = []
    for step in range(BEFORE, BEFORE + AFTER):
        loss = engine(*batch(step))
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    assert found == pytest.approx(losses, rel=1e-6)
    assert found[-1] < losses[0], "or nothing was learnt"


# --- what names mean --------------------------------------------------------------------------------------


def trained(kind: Callable[..., torch.optim.Optimizer], **settings: Any) -> tuple[nn.Module, Any]:
    model = regressor()
    model.outer.bias.requires_grad_(False)
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=0.1, **settings)
    model(*batch(0)).backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    ("optimizer", "settings", "kind", "states"),
    [
        (torch.optim.Adam, {}, "Adam", {"exp_avg", "exp_avg_sq"}),
        (torch.optim.AdamW, {"amsgrad": True}, "AdamW", {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        (torch.optim.SGD, {"momentum": 0.9}, None, {"momentum_buffer"}),
        (torch.optim.NAdam, {}, None, {"exp_avg", "exp_avg_sq"}),
    ],
)
def test_optimizers(tmp_path: Path, optimizer: Any, settings: Any, kind: str | None, states: Any) -> None:
    model, live = trained(optimizer, **settings)
    weights, states_of = get_state_dict(model, live)
    source = source_of(saved(tmp_path / "dcp", {"model": weights, "optim": states_of}))
    assert source.optimizer.type == kind
    assert {array.state for array in source.arrays} == {"fp32", *states}
    assert source.frozen == {"outer.bias"}
    p = model.inner.weight
    assert source.optimizer.scalars.get("inner.weight", {}) == {
        key: value.item() for key, value in live.state[p].items() if value.ndim == 0
    }


def test_bf16_becomes_float32_and_its_moments_too(tmp_path: Path) -> None:
    model = regressor().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    model(*(part.bfloat16() for part in batch(0))).backward()
    optimizer.step()
    weights, states = get_state_dict(model, optimizer)
    source = source_of(saved(tmp_path / "dcp", {"model": weights, "optim": states}))
    assert {array.dtype for array in source.arrays} == {"float32"}
    live = {f"fp32/{name}": p.detach().float().numpy() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        live |= {f"{s}/{name}": optimizer.state[p][s].float().numpy() for s in ("exp_avg", "exp_avg_sq")}
    assert_bits(values(source), live)


def test_equal_hyperparameters_are_one_group_and_others_another(tmp_path: Path) -> None:
    model = regressor()
    bare = [model.inner.bias, model.outer.bias]
    groups = [{"params": bare, "weight_decay": 0.0}, {"params": [model.outer.weight, model.inner.weight]}]
    optimizer = torch.optim.AdamW(groups)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    weights, states = get_state_dict(model, optimizer, options=options)
    source = source_of(saved(tmp_path / "dcp", {**weights, "optimizer": states}))
    assert [group["params"] for group in source.optimizer.groups] == [
        ["inner.bias", "outer.bias"],
        ["outer.weight", "inner.weight"],
    ]


def test_groups_that_older_torch_stored_as_one_value(tmp_path: Path) -> None:
    model, optimizer = trained(torch.optim.AdamW)
    weights, states = get_state_dict(model, optimizer)
    plainly = source_of(saved(tmp_path / "new", {"model": weights, "optim": states}))
    states = {**states, "param_groups": tuple(states["param_groups"])}  # which isn't taken apart
    as_one = source_of(saved(tmp_path / "old", {"model": weights, "optim": states}))
    assert plainly.optimizer is not None
    assert as_one.optimizer == plainly.optimizer


def test_weights_alone_are_read_where_the_optimizer_cannot_be(tmp_path: Path) -> None:
    model, optimizer = trained(torch.optim.AdamW)
    folder = saved(tmp_path / "dcp", {"model": model.state_dict(), "optim": optimizer.state_dict()})
    with pytest.raises(CheckpointError, match=r"has numbers \(0\) for parameters.*--weights-only"):
        source_of(folder)
    source = source_of(folder, weights_only=True)
    assert source.optimizer is None
    assert any("optimizer state: --weights-only" in line for line in source.left_out)
    assert_bits(values(source), {f"fp32/{n}": p.detach().numpy() for n, p in model.named_parameters()})


def test_what_is_taken_for_tied(tmp_path: Path) -> None:
    one = torch.randn(40, 3)
    weights = {
        "a": one,
        "b": one,
        "c": one + torch.eye(40)[:, -3:],
        "zeros": torch.zeros(9),
        "more": torch.zeros(9),
    }
    alone = source_of(saved(tmp_path / "weights", weights))
    assert not alone.aliases, "nothing tells a tied weight from a copy"
    assert {array.name for array in alone.arrays} == weights.keys()
    states = {name: {"exp_avg": torch.ones_like(weights[name])} for name in ("a", "zeros")}
    optim = {"state": states, "param_groups": [{"lr": 0.1, "params": ["a", "zeros"]}]}
    folder = saved(tmp_path / "both", {"model": weights, "optim": optim})
    source = source_of(folder)
    assert source.aliases == {"b": "a"}
    assert {array.name for array in source.arrays} == {"a", "c", "zeros", "more"}
    assert any("taken to be tied" in line for line in source.left_out)
    assert not source_of(folder, untie=True).aliases


def test_a_padding_row_does_not_hide_a_tie(tmp_path: Path) -> None:
    weight = torch.cat([torch.zeros(2, 64), torch.randn(3, 64)])
    optim = {"state": {"e": {"exp_avg": weight}}, "param_groups": [{"lr": 0.1, "params": ["e"]}]}
    assert source_of(
        saved(tmp_path / "it", {"model": {"e": weight, "h": weight}, "optim": optim})
    ).aliases == {"h": "e"}


def test_two_trained_weights_are_never_one(tmp_path: Path) -> None:
    model = nn.ModuleList([nn.Linear(9, 9), nn.Linear(9, 9)])
    model[1].load_state_dict(model[0].state_dict())
    weights, states = get_state_dict(model, torch.optim.AdamW(model.parameters()))
    assert not source_of(saved(tmp_path / "both", {"model": weights, "optim": states})).aliases


W = {"w": torch.ones(2), "b": torch.zeros(3)}
GROUP = {"lr": 0.1, "params": ["w"]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two optimizers": (
        {"model": W, "optim": {"state": {"x": 1}}, "optimizer": {"a": 1}},
        "several optimizers",
    ),
    "two models": ({"a": {"model": W}, "b": {"model": W}}, "several models"),
    "weights under several keys": ({"gan": W, "net": W}, "no weights at the top.*under gan, net"),
    "no tensors": ({"epoch": 3}, "no weights"),
    "an unknown parameter": (
        {"model": W, "optim": {"state": {"v": {"m": torch.ones(2)}}, "param_groups": [GROUP]}},
        "v isn't a tensor of the model",
    ),
    "a group of unknown ones": (
        {"model": W, "optim": {"state": {}, "param_groups": [{"lr": 0.1, "params": ["v"]}]}},
        "group 0 has 'v'",
    ),
    "a state that is in no group": (
        {"model": W, "optim": {"state": {"b": {"m": torch.ones(3)}}, "param_groups": [GROUP]}},
        "b is in no parameter group",
    ),
    "flat parameters of FSDP": ({"model": {"_flat_param": torch.ones(9)}}, "a flat parameter of FSDP"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused(tmp_path: Path, case: str) -> None:
    state, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        source_of(saved(tmp_path / "dcp", state))
