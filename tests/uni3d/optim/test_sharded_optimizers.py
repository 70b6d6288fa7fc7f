"""Every optimizer that a config can name, on sharded parameters, against plain PyTorch on one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from models import (
    Stack,
    assert_same,
    global_batches,
    make_engine,
    save_and_wait,
    seeded,
    train,
    train_plainly,
    whole,
)
from ranks import Ranks
from torch import Tensor, nn

import ckpt
import uni3d
from uni3d.config import load_config

pytestmark = pytest.mark.slow

STEPS, BEFORE = 4, 2


class PlainLion(torch.optim.Optimizer):
    """Lion, written from algorithm 2 of its paper."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        (one, two), lr = group["betas"], group["lr"]
        for p in group["params"]:
            m = self.state[p].get("m", torch.zeros_like(p))
            update = torch.sign(one * m + (1 - one) * p.grad)
            self.state[p]["m"] = two * m + (1 - two) * p.grad
            p -= lr * (update + group["weight_decay"] * p)


class PlainMuon(torch.optim.Optimizer):
    """Muon for matrices and AdamW for vectors, as in DeepSpeed; written from Jordan's post."""

    def __init__(self, params: Any, muon_lr: float, adam_lr: float, weight_decay: float) -> None:
        params = list(params)
        vectors = [p for p in params if p.ndim != 2]
        self.adam = torch.optim.AdamW(
            [{"params": vectors}],
            lr=adam_lr,
            betas=(0.9, 0.95),
            eps=1e-10,
            weight_decay=weight_decay,
            foreach=False,
        )
        matrices = [p for p in params if p.ndim == 2]
        super().__init__(matrices, {"lr": muon_lr, "weight_decay": weight_decay})

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad()
        self.adam.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.adam.step()
        group = self.param_groups[0]
        for p in group["params"]:
            m = self.state[p].get("m", torch.zeros_like(p))
            self.state[p]["m"] = m = 0.95 * m + 0.05 * p.grad
            o = newton_schulz(0.05 * p.grad + 0.95 * m) * max(1, p.shape[0] / p.shape[1]) ** 0.5
            p *= 1 - group["lr"] * group["weight_decay"]
            p -= group["lr"] * o


def newton_schulz(g: Tensor) -> Tensor:
    tall = g.shape[0] > g.shape[1]
    x = g / torch.linalg.matrix_norm(g)
    x = x.mT if tall else x
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return x.mT if tall else x


def gpt_case() -> list[float]:
    """Run Muon with tensor parallelism and ZeRO on the same dim: a rank's rows aren't contiguous."""
    config = {
        "train_batch_size": oracle.BATCH,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "Muon", "params": {"lr": 0.02}},
        "parallel": {"tp": 2, "device": "cpu"},
        "zero_optimization": {"stage": 3},
    }
    engine = uni3d.initialize(model=oracle.initial_model(oracle.MODEL), config=config)[0]
    inputs, targets = oracle.samples()
    size, rank = engine.triad.micro_batch, engine.model.topology.dp_rank
    losses = []
    for step in range(3):
        index = oracle.batch_indices(step)[rank * size :][:size]
        losses.append(engine.train_batch(iter([(inputs[index], targets[index])])).item())
    return losses


def test_muon_where_tensor_parallelism_cuts_too(ranks: Ranks) -> None:
    model = oracle.initial_model(oracle.MODEL)
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for p in model.parameters() if not any(p is h for h in hidden)]
    muon = PlainMuon(hidden, 0.02, 0.0, 0.0)
    adam = torch.optim.AdamW(rest, lr=0.02, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, foreach=False)
    inputs, targets = oracle.samples()
    losses = []
    for step in range(3):
        index = oracle.batch_indices(step)
        loss = F.cross_entropy(model(inputs[index]).flatten(0, 1), targets[index].flatten())
        loss.backward()
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    for found in ranks.run(4, gpt_case):
        assert found == pytest.approx(losses, rel=1e-5)


Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[dict[str, Any], Make]] = {
    "Adam": (
        {"lr": 0.02, "adam_w_mode": False, "weight_decay": 0.1, "eps": 0.01},
        lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1, eps=0.01, foreach=False),
    ),
    "AdamW": (
        {"lr": 0.02, "torch_adam": True, "eps": 0.01, "amsgrad": True},
        lambda p: torch.optim.AdamW(p, lr=0.02, eps=0.01, amsgrad=True, foreach=False),
    ),
    "SGD": (
        {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True, foreach=False),
    ),
    "Adagrad": (
        {"lr": 0.02, "lr_decay": 0.1, "initial_accumulator_value": 0.1},
        lambda p: torch.optim.Adagrad(p, lr=0.02, lr_decay=0.1, initial_accumulator_value=0.1, foreach=False),
    ),
    "Lion": (
        {"lr": 0.003, "betas": [0.8, 0.95], "weight_decay": 0.1},
        lambda p: PlainLion(p, 0.003, (0.8, 0.95), 0.1),
    ),
    "Muon": ({"lr": 0.02, "adam_lr": 0.01, "weight_decay": 0.1}, lambda p: PlainMuon(p, 0.02, 0.01, 0.1)),
    "RMSprop": (
        {"lr": 0.01, "centered": True, "momentum": 0.5, "eps": 0.01},
        lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5, eps=0.01, foreach=False),
    ),
    "NAdam": ({"lr": 0.01, "eps": 0.01}, lambda p: torch.optim.NAdam(p, lr=0.01, eps=0.01, foreach=False)),
    "RAdam": ({"lr": 0.05, "eps": 0.01}, lambda p: torch.optim.RAdam(p, lr=0.05, eps=0.01, foreach=False)),
    "Adamax": ({"lr": 0.01, "eps": 0.01}, lambda p: torch.optim.Adamax(p, lr=0.01, eps=0.01, foreach=False)),
    "Adadelta": ({"eps": 0.01}, lambda p: torch.optim.Adadelta(p, eps=0.01, foreach=False)),
    "ASGD": ({"lr": 0.02, "t0": 2}, lambda p: torch.optim.ASGD(p, lr=0.02, t0=2, foreach=False)),
}


def wide() -> nn.Module:
    """Model with wide, tall and square matrices, sizes that 2 doesn't divide, and vectors."""
    model = Stack(2)
    model.layers[0] = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))
    return model


def case(name: str, steps: list[int], zero: int, run: str | None, **parallel: int) -> Any:
    section = {"type": name, "params": OPTIMIZERS[name][0]}
    engine = make_engine(
        seeded(wide),
        zero=zero,
        micro=2,
        config={"optimizer": section, "parallel": {"device": "cpu"} | parallel},
    )
    if run is not None and steps[0] > 0:
        engine.load_checkpoint(run)
    losses = train(engine, [global_batches(STEPS)[step] for step in steps])
    if run is not None and steps[0] == 0:
        save_and_wait(engine, run)
    return losses, whole(engine.module)


def all_stages(name: str) -> list[Any]:
    return [case(name, list(range(STEPS)), zero, None) for zero in range(4)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_on_shards_is_the_plain_one(ranks: Ranks, name: str) -> None:
    losses, _, model = train_plainly(seeded(wide), global_batches(STEPS), OPTIMIZERS[name][1])
    for stages in ranks.run(2, all_stages, name):
        for found, tensors in stages:
            assert found == pytest.approx(losses, rel=1e-5)
            assert_same(tensors, model)


STATES = {"Lion": {"exp_avg"}, "Muon": {"momentum_buffer", "exp_avg", "exp_avg_sq"}}


def save(name: str, run: str) -> Any:
    return case(name, list(range(BEFORE)), 2, run)


def load(name: str, run: str, zero: int, pp: int) -> Any:
    return case(name, list(range(BEFORE, STEPS)), zero, run, pp=pp)


@pytest.mark.parametrize("name", STATES)
def test_it_goes_on_on_another_topology(ranks: Ranks, tmp_path: Path, name: str) -> None:
    losses, _, model = train_plainly(seeded(wide), global_batches(STEPS), OPTIMIZERS[name][1])
    ranks.run(2, save, name, str(tmp_path))
    assert {key.state for key in ckpt.open_checkpoint(tmp_path).arrays} == {"fp32", *STATES[name]}
    for world, zero, pp in ((3, 3, 1), (2, 1, 2)):
        results = ranks.run(world, load, name, str(tmp_path), zero, pp)
        for found, _ in results:
            assert found == pytest.approx(losses[BEFORE:], rel=1e-5)
        assert_same({k: v for _, tensors in results for k, v in tensors.items()}, model)


def test_every_optimizer_of_torch_is_tried_or_refused() -> None:
    ours = {cls.__name__ for cls in vars(torch.optim).values() if is_optimizer(cls)} - {"Optimizer"}
    for name in ours - OPTIMIZERS.keys():
        with pytest.raises(ValueError, match=rf"optimizer\.type '{name}' is refused: \w"):
            load_config({"optimizer": {"type": name}})


def is_optimizer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, torch.optim.Optimizer)


@pytest.mark.parametrize("name", ["Adafactor", "LBFGS", "Rprop"])
def test_one_of_torchs_that_cannot_train_shards_is_refused(alone: None, name: str) -> None:
    kind = getattr(torch.optim, name)
    with pytest.raises(ValueError, match=rf"torch\.optim\.{name} is refused: "):
        make_engine(seeded(Stack), optimizer=kind)
    model = seeded(Stack)
    with pytest.raises(ValueError, match=rf"torch\.optim\.{name} is refused: "):
        make_engine(model, optimizer=kind(model.parameters()))


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_a_fused_step_that_torch_has_for_plain_tensors_alone_is_refused(alone: None, name: str) -> None:
    reason = rf"torch\.optim\.{name} with fused=True is refused: .* leave fused out"
    with pytest.raises(ValueError, match=reason):
        make_engine(seeded(Stack), config={"optimizer": {"type": name, "params": {"lr": 0.1, "fused": True}}})
    model = seeded(Stack)
    kind = getattr(torch.optim, name)
    with pytest.raises(ValueError, match=reason):
        make_engine(model, optimizer=kind(model.parameters(), lr=0.1, fused=True))


MUON = {"type": "Muon", "params": {"muon_lr": 0.05, "adam_lr": 0.01}}


def test_who_is_muons(alone: None) -> None:
    model = nn.Sequential()
    for name in ("embed", "up", "LM_head", "asked"):
        model.add_module(name, nn.Linear(3, 4))
    model.add_module("conv", nn.Conv1d(2, 2, 2))
    model.asked.weight.use_muon = False
    engine = make_engine(model, config={"optimizer": MUON})
    engine.model.zero.reshard()  # the optimizer has the sharded parameters
    names = {id(p): name for name, p in engine.module.named_parameters()}
    matrices, rest = engine.optimizer.param_groups
    assert (matrices["use_muon"], [names[id(p)] for p in matrices["params"]]) == (True, ["up.weight"])
    assert (rest["use_muon"], len(rest["params"])) == (False, 9)
    assert (matrices["lr"], rest["lr"]) == (0.05, 0.01)
    model = seeded(Stack)
    model.out.bias.use_muon = True
    with pytest.raises(ValueError, match=r"out\.bias\.use_muon is true, but its shape is \(1,\)"):
        make_engine(model, config={"optimizer": MUON})


def test_groups_of_ones_own_are_split_for_muon_and_keep_their_values(alone: None) -> None:
    model = seeded(Stack)
    groups = [{"params": model.layers.parameters()}, {"params": model.out.parameters(), "lr": 0.5}]
    made = make_engine(model, config={"optimizer": MUON}, model_parameters=groups).optimizer
    assert [(g["use_muon"], g["lr"], len(g["params"])) for g in made.param_groups] == [
        (True, 0.05, 4),
        (False, 0.01, 4),
        (True, 0.5, 1),
        (False, 0.5, 1),
    ]


def test_a_value_that_torch_refuses_is_named(alone: None) -> None:
    with pytest.raises(ValueError, match=r"optimizer\.params of SGD: Invalid learning rate: -1"):
        make_engine(seeded(Stack), config={"optimizer": {"type": "SGD", "params": {"lr": -1.0}}})
