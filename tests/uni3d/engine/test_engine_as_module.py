"""The engine as a `torch.nn.Module`: its methods do what they do for DeepSpeed's engine, or say why not."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from marks import STAGES, slow
from models import OwnLoss, assert_same, global_batches, make_engine, seeded, train, train_plainly, whole
from ranks import RankError, Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import uni3d


@pytest.mark.parametrize("zero", range(4))
def test_names_are_those_of_the_module_with_a_prefix(alone: None, zero: int) -> None:
    engine, plain = make_engine(seeded(OwnLoss), zero=zero), seeded(OwnLoss)
    assert isinstance(engine, nn.Module)
    assert list(engine.children()) == [engine.module]
    for names in ("named_parameters", "named_buffers"):
        ours = [name for name, _ in getattr(engine, names)()]
        assert ours == [f"module.{name}" for name, _ in getattr(plain, names)()]
    modules = [name for name, _ in engine.named_modules()]
    assert modules == ["", *(f"module.{name}" if name else "module" for name, _ in plain.named_modules())]
    assert [id(p) for p in engine.parameters()] == [id(p) for p in engine.module.parameters()]
    assert len(list(engine.buffers())) == 2


def state_case(zero: int, tp: int) -> None:
    engine = make_engine(seeded(OwnLoss), zero=zero, micro=3)
    train(engine, global_batches(2))
    state = engine.state_dict()
    assert list(state) == [f"module.{name}" for name in seeded(OwnLoss).state_dict()]
    assert {type(value) for value in state.values()} == {Tensor}
    other = make_engine(seeded(OwnLoss), zero=(zero + 1) % 4, micro=3)
    before = whole(other.module)
    assert not torch.equal(before["out.weight"], whole(engine.module)["out.weight"])
    assert other.load_state_dict(state) == ([], [])
    for name, tensor in whole(engine.module).items():
        if name != "scratch":
            torch.testing.assert_close(whole(other.module)[name], tensor)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(engine.module.state_dict())


@pytest.mark.parametrize("zero", STAGES)
def test_state_dict(ranks: Ranks, zero: int) -> None:
    ranks.run(2, state_case, zero, 1)


def test_modes(alone: None) -> None:
    engine = make_engine(seeded(OwnLoss), zero=1, micro=12)
    assert engine.eval() is engine
    assert not engine.training
    assert not engine.module.out.training
    engine.train_batch(iter(global_batches(1)))
    assert engine.training
    assert engine.module.out.training
    engine.module.out.eval()
    engine.eval_batch(iter(global_batches(1)))
    assert engine.training
    assert not engine.module.out.training
    assert engine.train() is engine
    assert engine.module.out.training


def test_a_look_in_eval_mode_of_an_engine_that_is_in_it(alone: None) -> None:
    engine = make_engine(seeded(OwnLoss), micro=12)
    engine.eval()
    engine.eval_batch(iter(global_batches(1)))
    assert not engine.training


@pytest.mark.parametrize(
    "move", ["to(device)", "to(float32)", "to(device, float32)", "float()", "cpu()", "to(tensor)"]
)
@pytest.mark.parametrize("zero", [0, 3])
def test_moves_to_where_it_is(alone: None, zero: int, move: str) -> None:
    engine = make_engine(seeded(OwnLoss), zero=zero, micro=12)
    ask = {
        "to(device)": lambda: engine.to(engine.device),
        "to(float32)": lambda: engine.to(torch.float32),
        "to(device, float32)": lambda: engine.to("cpu", torch.float32),
        "float()": engine.float,
        "cpu()": engine.cpu,
        "to(tensor)": lambda: engine.to(torch.zeros(1)),
    }
    assert ask[move]() is engine
    losses, _, model = train_plainly(seeded(OwnLoss), global_batches(2))
    assert train(engine, global_batches(2)) == pytest.approx(losses, rel=1e-5)
    assert_same(whole(engine.module), model, ignore=("calls", "scratch"))


@pytest.mark.parametrize("zero", [0, 3])
def test_moves_elsewhere_are_refused(alone: None, zero: int) -> None:
    engine = make_engine(seeded(OwnLoss), zero=zero)
    for move in (
        lambda: engine.to("meta"),
        lambda: engine.to(torch.float64),
        lambda: engine.to(memory_format=torch.channels_last),
        engine.half,
        engine.bfloat16,
        engine.double,
        engine.share_memory,
        lambda: engine.to_empty(device="cpu"),
        lambda: nn.Sequential(engine).half(),
    ):
        with pytest.raises(RuntimeError, match=r"computes in torch.float32 on cpu; set parallel.device, and"):
            move()
    assert {p.dtype for p in engine.parameters()} == {torch.float32}
    train(engine, global_batches(1))


@pytest.mark.parametrize("zero", [0, 3])
def test_bf16_is_where_a_bf16_engine_is(alone: None, zero: int) -> None:
    engine = make_engine(seeded(OwnLoss), zero=zero, config={"bf16": {"enabled": True}})
    assert engine.bfloat16() is engine
    with pytest.raises(RuntimeError, match=r"computes in torch.bfloat16"):
        engine.float()


def hooks_case(zero: int) -> tuple[list[str], int]:
    engine, seen = make_engine(seeded(OwnLoss), zero=zero, micro=3), []
    engine.register_forward_pre_hook(lambda module, args: seen.append("before"))
    engine.register_forward_hook(lambda module, args, output: output * 2)
    for each in (engine, engine.module):
        each.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    x, y = global_batches(1)[0]
    x.requires_grad_()  # torch warns otherwise
    one = engine(x[:3], y[:3])
    with torch.no_grad():
        assert torch.allclose(one, 2 * engine.module(x[:3], y[:3]))
    engine.backward(one)
    engine.step()
    return seen, engine.micro_steps


@pytest.mark.parametrize("zero", STAGES)
def test_hooks(ranks: Ranks, zero: int) -> None:
    for seen, micro_steps in ranks.run(2, hooks_case, zero):
        assert seen == ["before", "backward", "backward"]
        assert micro_steps == 1


def apply_case(zero: int) -> list[str]:
    engine, kinds = make_engine(seeded(OwnLoss), zero=zero, micro=6), []

    def halve(module: nn.Module) -> None:
        kinds.append(type(module).__name__)
        if isinstance(module, nn.Linear) and module.out_features == 1:
            with torch.no_grad():
                module.weight.mul_(0.5)

    assert engine.apply(halve) is engine
    model = seeded(OwnLoss)
    with torch.no_grad():
        model.out.weight.mul_(0.5)
    losses, _, model = train_plainly(model, global_batches(2))
    assert train(engine, global_batches(2)) == pytest.approx(losses, rel=1e-5)
    return kinds


@pytest.mark.parametrize("zero", STAGES)
def test_apply(ranks: Ranks, zero: int) -> None:
    for kinds in ranks.run(2, apply_case, zero):
        assert kinds[-1] == "Engine"
        assert len(kinds) == len(list(seeded(OwnLoss).modules())) + 1


@pytest.mark.parametrize("zero", range(4))
def test_requires_grad(alone: None, zero: int) -> None:
    engine = make_engine(seeded(OwnLoss), zero=zero, micro=12)
    engine.requires_grad_(False)
    assert not any(p.requires_grad for p in engine.parameters())
    engine.module.out.requires_grad_(True)
    before = whole(engine.module)
    x, y = global_batches(1)[0]
    engine.backward(engine(x, y))
    engine.step()
    after = whole(engine.module)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {"out.weight", "out.bias", "calls"}


def test_gradients_are_dropped_not_zeroed(alone: None) -> None:
    engine = make_engine(seeded(OwnLoss))
    engine.zero_grad(set_to_none=True)
    with pytest.raises(ValueError, match="are dropped, not filled with zeros"):
        engine.zero_grad(set_to_none=False)


def test_copies_and_pickles_are_refused(alone: None) -> None:
    engine = make_engine(seeded(OwnLoss))
    for call in (lambda: copy.deepcopy(engine), lambda: copy.copy(engine), lambda: pickle.dumps(engine)):
        with pytest.raises(
            RuntimeError, match=r"an engine and its module can't be copied: .*module_state_dict"
        ):
            call()


class Outer(nn.Module):
    def __init__(self, engine: uni3d.Engine) -> None:
        super().__init__()
        self.engine = engine
        self.own = nn.Linear(6, 6)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.engine(x, y)


def outer_case(zero: int) -> tuple[list[float], list[str]]:
    engine = make_engine(seeded(OwnLoss), zero=zero, micro=6)
    outer = Outer(engine).train().to("cpu")
    losses = []
    for x, y in global_batches(2):
        mine = slice(6 * engine.global_rank, 6 * engine.global_rank + 6)
        losses.append(engine.backward(outer(x[mine], y[mine])).item())
        engine.step()
    with pytest.raises(RuntimeError, match="use it without DistributedDataParallel"):
        DistributedDataParallel(engine)
    return losses, list(outer.state_dict())


@pytest.mark.parametrize("zero", [slow(0), slow(1), 3])
def test_inside_another_module(ranks: Ranks, zero: int) -> None:
    losses, _, _ = train_plainly(seeded(OwnLoss), global_batches(2))
    found = ranks.run(2, outer_case, zero)
    assert [sum(both) / 2 for both in zip(*(f for f, _ in found), strict=True)] == pytest.approx(
        losses, rel=1e-5
    )
    for _, names in found:
        assert names[0] == "engine.module.calls"
        assert names[-1] == "own.bias"


def test_attributes_of_the_module(alone: None) -> None:
    engine = make_engine(seeded(OwnLoss))
    assert engine.returns_loss is True
    assert engine.decode is engine.module.decode
    assert not hasattr(engine, "generate")
    with pytest.raises(AttributeError, match=re.escape("neither the Engine nor its")):
        _ = engine.generate


def handed_on_case() -> None:
    make_engine(make_engine(seeded(OwnLoss)))


def test_an_engine_is_no_model(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="initialize was already called with its module"):
        ranks.run(1, handed_on_case)
