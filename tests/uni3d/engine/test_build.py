"""`initialize`: user-made optimizers, parameter groups, and refused arguments."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from marks import slow
from models import (
    ADAM,
    OwnLoss,
    Stack,
    assert_same,
    global_batches,
    make_engine,
    micro_batches,
    seeded,
    train,
    train_plainly,
    whole,
)
from ranks import Ranks
from torch import nn

import uni3d

STEPS = 3


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


def adagrad(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(parameters, lr=0.05)


def own_optimizer_case(make: Callable[..., Any], as_object: bool, zero: int, pp: int) -> Any:
    model = seeded(Stack)
    optimizer = make(model.parameters()) if as_object else make
    engine = make_engine(model, zero=zero, pp=pp, optimizer=optimizer, config={"optimizer": None})
    assert engine.optimizer is optimizer or not as_object
    return train(engine, global_batches(STEPS)), whole(engine.module)


@pytest.mark.parametrize(
    ("make", "as_object", "zero", "pp"),
    [
        slow(sgd, True, 0, 1),
        (sgd, True, 2, 2),
        (sgd, False, 3, 1),
        slow(sgd, False, 1, 2),
        (adagrad, False, 1, 1),  # it makes its states at once, so an object comes too early
    ],
)
def test_an_optimizer_of_ones_own(ranks: Ranks, make: Any, as_object: bool, zero: int, pp: int) -> None:
    losses, _, model = train_plainly(seeded(Stack), global_batches(STEPS), make)
    results = ranks.run(2, own_optimizer_case, make, as_object, zero, pp)
    for found, _ in results:
        assert found == pytest.approx(losses, rel=1e-5)
    assert_same({k: v for _, state in results for k, v in state.items()}, model)


def test_it_comes_before_the_config_s(alone: None) -> None:
    engine = make_engine(seeded(Stack), optimizer=sgd, config={"optimizer": ADAM})
    assert isinstance(engine.optimizer, torch.optim.SGD)


GROUPS: dict[str, Callable[[nn.Module], Any]] = {
    "tensors": lambda m: list(m.parameters()),
    "generator": lambda m: m.parameters(),
    "groups": lambda m: [{"params": list(m.parameters())}],
    "groups_of_generators": lambda m: [{"params": m.layers.parameters()}, {"params": m.out.parameters()}],
    "groups_of_one": lambda m: ({"params": p} for p in m.parameters()),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_parameters_are_given_as_to_torch_s_optimizers(alone: None, kind: str) -> None:
    batches = global_batches(STEPS)
    model = train_plainly(seeded(Stack), batches)[2]
    fresh = seeded(Stack)
    engine = make_engine(fresh, model_parameters=GROUPS[kind](fresh))
    train(engine, batches)
    assert_same(whole(engine.module), model)


def test_groups_keep_their_own_hyperparameters(alone: None) -> None:
    def groups(model: nn.Module) -> Any:
        return [{"params": model.layers.parameters(), "lr": 0.1}, {"params": model.out.parameters()}]

    def oracle(_: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups(copy), lr=0.02, weight_decay=0.1, eps=0.01)

    batches, copy = global_batches(STEPS), seeded(Stack)
    inner = oracle(None)
    for x, y in batches:
        nn.functional.mse_loss(copy(x), y).backward()
        inner.step()
        inner.zero_grad()
    fresh = seeded(Stack)
    engine = make_engine(fresh, model_parameters=groups(fresh))
    train(engine, batches)
    assert engine.get_lr() == [0.1, 0.02]
    assert_same(whole(engine.module), copy)


def test_parameters_that_are_not_given_stay_and_count_in_no_norm(alone: None) -> None:
    """Parameters outside the optimizer: their gradients neither accumulate nor count in the clipping norm."""
    oracle, batches = seeded(Stack), global_batches(STEPS)
    oracle.layers.requires_grad_(False)
    _, norms, model = train_plainly(oracle, batches, clip=0.1)
    fresh = seeded(Stack)
    engine = make_engine(fresh, model_parameters=fresh.out.parameters(), config={"gradient_clipping": 0.1})
    data = micro_batches(batches, engine)
    for norm in norms:
        engine.train_batch(data)
        assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-5)
        assert all(p.grad is None for p in engine.module.parameters())
    assert_same(whole(engine.module), model)


class TiedEnds(Stack):
    """Model whose first and last layer share a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 6)
        self.out.weight = self.layers[0][0].weight
        self.out.weight.requires_grad_(False)


def frozen_tie_case() -> Any:
    engine = make_engine(seeded(TiedEnds), zero=1, pp=2)
    return train(engine, [(x, x.flip(1)) for x, _ in global_batches(STEPS)])


def test_a_frozen_weight_that_two_stages_share(ranks: Ranks) -> None:
    losses = train_plainly(seeded(TiedEnds), [(x, x.flip(1)) for x, _ in global_batches(STEPS)])[0]
    for found in ranks.run(2, frozen_tie_case):
        assert found == pytest.approx(losses, rel=1e-5)


def test_micro_batches_of_the_wrong_size(alone: None) -> None:
    engine = make_engine(seeded(Stack), micro=3)
    x, y = global_batches(1)[0]
    with pytest.raises(ValueError, match=r"of \[2, 2, 2, 2\] samples; .*per_gpu\(3\) in each"):
        engine.train_batch(iter([(x[:2], y[:2])] * 4))
    assert engine.global_steps == 0


def refused(model: nn.Module, **given: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is what the callers look at
        make_engine(model, **given)
    return str(caught.value)


def test_what_is_refused(alone: None) -> None:
    model, other = seeded(Stack), seeded(Stack)
    text = refused(model, model_parameters=[*model.parameters(), *other.out.parameters()])
    assert text == "model_parameters has 2 tensors that are not parameters of the model"
    assert "no parameters to train" in refused(seeded(Stack), model_parameters=[])
    assert "no parameters to train" in refused(seeded(Stack).requires_grad_(False))
    assert "layers.0.0.weight is torch.float64" in refused(seeded(Stack).double())
    used = sgd(model.parameters())
    model(torch.ones(1, 6)).sum().backward()
    used.step()
    assert refused(model, optimizer=used).startswith(
        "the SGD optimizer has states, but its parameters are yet to be sharded"
    )
    text = refused(model, optimizer=adagrad(model.parameters()))
    assert text.endswith("if its constructor makes states, pass a function of parameter groups")
    text = refused(seeded(Stack), config={"optimizer": None, "scheduler": {"type": "WarmupLR"}})
    assert "a scheduler but no optimizer" in text
    text = refused(seeded(Stack), config={"parallel": {"pp": 3, "tp": 2, "dp": 1}})
    assert text == "pp(3) * dp(1) * tp(2) = 6, but the world size is 1; change one of them"
    assert "got it 0 times" in refused_config()
    assert "got it 2 times" in refused_config(config={}, config_params={})


def refused_config(**given: Any) -> str:
    with pytest.raises(ValueError, match="give the config once") as caught:
        uni3d.initialize(model=seeded(Stack), **given)
    return str(caught.value)


def test_without_an_optimizer_there_is_evaluation_only(alone: None) -> None:
    engine = make_engine(seeded(OwnLoss), config={"optimizer": None})
    assert engine.eval_batch(micro_batches(global_batches(1), engine)).isfinite()
    with pytest.raises(ValueError, match="train_batch needs an optimizer"):
        engine.train_batch(micro_batches(global_batches(1), engine))


def test_it_says_what_it_builds(alone: None, capsys: pytest.CaptureFixture[str]) -> None:
    make_engine(seeded(Stack))
    size = sum(p.numel() for p in Stack().parameters())
    line = f"uni3d: building Stack, {size:,} parameters, on 1 rank (pp 1 x dp 1 x tp 1, ZeRO 0), fp32\n"
    assert capsys.readouterr().err == line
    make_engine(seeded(Stack), config={"steps_per_print": None})
    assert capsys.readouterr().err == ""
