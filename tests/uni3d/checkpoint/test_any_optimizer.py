"""Optimizer states of any name and shape across topologies, and arrays of every dtype."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
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
from torch.distributed.tensor import DTensor, Partial, Replicate

import ckpt

pytestmark = pytest.mark.slow

BEFORE, STEPS = 3, 5


class Odd(torch.optim.Optimizer):
    """Optimizer by the sign of a running sum, with parameter-shaped states, another dtype and scalars."""

    def __init__(self, params: Any, lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.5)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "mode": "plain", "nothing": None})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"sum": torch.zeros_like(p), "counts": torch.zeros_like(p, dtype=torch.int32)}
                    state |= {
                        "taken": 0,
                        "scale": torch.tensor(1.0),
                        "name": "odd",
                        "hot": False,
                        "none": None,
                    }
                state["sum"].mul_(group["betas"][0]).add_(p.grad)
                state["counts"].add_((state["sum"] > 0).int())
                state["taken"] += 1
                state["scale"] *= group["betas"][1]
                state["hot"] = state["taken"] % 2 == 1
                p.add_(state["sum"].sign() * (1 + state["counts"]), alpha=-group["lr"])


class Factored(torch.optim.Optimizer):
    """Adafactor's second moments by row and column (Shazeer and Stern 2018, algorithm 2), with torch's names.

    torch's own, in 2.13, can't take a step on DTensors at all.
    """

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            state, square = self.state[p], p.grad.square() + 1e-6
            parts = {"variance": square}
            if p.ndim == 2:
                parts = {"row_var": summed(square.mean(-1, True)), "col_var": summed(square.mean(-2, True))}
            for key, value in parts.items():
                state[key] = value if key not in state else state[key].lerp(value, 0.3)
            estimate = state.get("variance")
            if estimate is None:
                mean = summed(state["row_var"].mean(-2, True))
                estimate = state["row_var"] * state["col_var"] / mean
            step = self.param_groups[0]["lr"] * p.grad / estimate.sqrt()
            p.sub_(step.redistribute(placements=p.placements) if isinstance(p, DTensor) else step)


def summed(tensor: Tensor) -> Tensor:
    """Reduce a partial mean over a sharded dim to the whole mean."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=[Replicate() if p.is_partial() else p for p in tensor.placements])


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5, foreach=False),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01, eps=0.01, foreach=False),
    "adafactor": Factored,
    "odd": Odd,
}
STATES = {
    "sgd": {"momentum_buffer"},
    "rmsprop": {"square_avg", "grad_avg", "momentum_buffer"},
    "nadam": {"exp_avg", "exp_avg_sq"},
    "adafactor": {"row_var", "col_var", "variance"},
    "odd": {"sum", "counts"},
}


def case(name: str, run: str, zero: int, first: bool) -> Any:
    engine = make_engine(seeded(Stack), zero=zero, micro=1, optimizer=OPTIMIZERS[name])
    batches = global_batches(STEPS)
    if first:
        losses = train(engine, batches[:BEFORE])
        save_and_wait(engine, run)
    else:
        assert engine.resume(run) == {}
        losses = train(engine, batches[BEFORE:])
    states = [
        {k: v for k, v in s.items() if not isinstance(v, Tensor)} for s in engine.optimizer.state.values()
    ]
    return losses, whole(engine.module), states


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_elsewhere(ranks: Ranks, tmp_path: Path, name: str) -> None:
    losses, _, model = train_plainly(seeded(Stack), global_batches(STEPS), OPTIMIZERS[name])
    (found, *_), _ = ranks.run(2, case, name, str(tmp_path), 1, True)
    assert found == pytest.approx(losses[:BEFORE], rel=1e-5)
    checkpoint = ckpt.open_checkpoint(tmp_path)
    assert {key.state for key in checkpoint.arrays} == {"fp32", *STATES[name]}
    for world, zero in ((1, 0), (3, 3)):
        for found, tensors, states in ranks.run(world, case, name, str(tmp_path), zero, False):
            assert found == pytest.approx(losses[BEFORE:], rel=1e-5)
            assert_same(tensors, model)
            if name == "odd":
                odd = {"taken": STEPS, "name": "odd", "hot": True, "none": None}
                assert states == [odd] * len(states)


def name_of(dtype: torch.dtype) -> str:
    return "a_" + str(dtype).rpartition(".")[2]


class AllTypes(nn.Module):
    """Model with buffers of every dtype that a checkpoint stores, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1)
        self.frozen = nn.Parameter(torch.randn(300, 5), requires_grad=False)
        for dtype in TYPES:
            values = torch.randn(33, 7) * 50
            self.register_buffer(name_of(dtype), values.bool() if dtype == torch.bool else values.to(dtype))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.layer(x), y)


TYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
]


def test_every_type_comes_back_bit_for_bit(alone: None, tmp_path: Path) -> None:
    engine = make_engine(seeded(AllTypes))
    train(engine, global_batches(1))
    engine.save_checkpoint(tmp_path)
    saved = whole(engine.module)
    resumed = make_engine(AllTypes())
    assert not torch.equal(resumed.module.get_buffer("a_bfloat16"), saved["a_bfloat16"])
    resumed.resume(tmp_path)
    loaded = whole(resumed.module)
    group = zarr.open_group(tmp_path / "global_step1", mode="r")
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
        stored = np.asarray(group[f"atoms/{name}/{'value' if name in BUFFERS else 'fp32'}"][...])
        raw = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        assert (stored.dtype, stored.tobytes()) == (raw.numpy().dtype, raw.numpy().tobytes()), name


BUFFERS = {name_of(dtype) for dtype in TYPES}


def test_a_type_that_cannot_be_stored_is_refused(alone: None, tmp_path: Path) -> None:
    engine = make_engine(seeded(AllTypes))
    engine.module.register_buffer("phase", torch.zeros(3, dtype=torch.complex64))  # else `initialize` refuses
    with pytest.raises(ckpt.CheckpointError, match="phase/value has dtype complex64, which can't be stored"):
        engine.save_checkpoint(tmp_path)


class Unsummed(torch.optim.SGD):
    """Optimizer whose state is a partial mean on each rank."""

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            placements = [Partial() for _ in p.placements]
            self.state[p]["mean"] = DTensor.from_local(torch.ones(3), p.device_mesh, placements)


def test_a_sum_that_is_not_summed_is_refused(alone: None, tmp_path: Path) -> None:
    engine = make_engine(seeded(Stack), optimizer=lambda groups: Unsummed(groups, lr=0.1))
    engine.optimizer.step()
    with pytest.raises(ckpt.CheckpointError, match="mean is a partial sum"):
        engine.save_checkpoint(tmp_path)


def save_unpicklable(folder: str) -> str:
    engine = make_engine(seeded(Stack), zero=1)
    engine.optimizer.param_groups[0]["rule"] = lambda: 0  # on all ranks, of which one speaks
    engine.save_checkpoint(folder)
    with pytest.raises(ckpt.CheckpointError) as caught:
        engine.wait_for_checkpoint()
    return str(caught.value)


def test_a_hyperparameter_that_cannot_be_kept_is_named_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks.run(2, save_unpicklable, str(tmp_path), timeout=30)
    assert first == second
    assert "['optimizer']['groups'][0]['rule'] is a function" in first


def roll_back(folder: str) -> float:
    """Pipeline whose first stage has no parameters in the optimizer and no states; the last one has both."""
    model = seeded(Stack)
    last = [*model.out.parameters()]
    engine = make_engine(model, pp=2, micro=6, model_parameters=last)
    batches = global_batches(3)
    train(engine, batches[:1])
    engine.save_checkpoint(folder)
    expected = train(engine, batches[1:])
    engine.load_checkpoint(folder)
    assert train(engine, batches[1:]) == expected
    return expected[-1]


def test_states_on_one_stage_only(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks.run(2, roll_back, str(tmp_path), timeout=60)
    assert first == second
