"""`safe_get_*` and `safe_set_*`: values, gradients and states of a plain PyTorch run, by parameter."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from marks import STAGES, slow
from models import Stack, adamw, global_batches, micro_batches, seeded
from ranks import Ranks
from test_gathering import Wide, make, whole_now
from torch import Tensor, nn

from uni3d.deepspeed import utils


def one_step(model: nn.Module, clip: float = 0.0) -> tuple[nn.Module, Any]:
    """Return a copy of the model after one plain step, and its optimizer; the gradients are still there."""
    model = deepcopy(model)
    optimizer = adamw(model.parameters())
    ((x, y),) = global_batches(1)
    (model(x) - y).square().mean().backward()
    optimizer.step()
    return model, optimizer


def backward(engine: Any, *, as_sum: bool) -> None:
    """Run a step's forward and backward passes, all but `step()` of the last."""
    data = list(micro_batches(global_batches(1), engine))[: engine.gradient_accumulation_steps()]
    for number, (x, y) in enumerate(data):
        squares = (engine(x) - y).square()
        engine.backward((squares.sum(), squares.numel()) if as_sum else squares.mean())
        if number + 1 < len(data):
            engine.step()


def close(found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None
    assert expected is not None
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def values_case(stage: int, tp: int, as_sum: bool, offload: bool = False, **more: Any) -> None:
    """Gradients before a step, then values and states after it; what is set takes part in training."""
    model = seeded(Wide)
    expected, plain = one_step(model)
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu" if offload else "none"}}
    engine = make(model, stage, tp, zero_optimization=zero, **more)
    weight = engine.module.layers[0].up.weight
    assert utils.safe_get_full_optimizer_state(weight, "exp_avg") is None
    backward(engine, as_sum=as_sum)
    for name, parameter in engine.module.named_parameters():
        close(utils.safe_get_full_grad(parameter), expected.get_parameter(name).grad)
    close(utils.safe_get_full_grad(weight), expected.layers[0].up.weight.grad)  # held from before
    engine.step()
    for name, parameter in engine.module.named_parameters():
        other = expected.get_parameter(name)
        close(utils.safe_get_full_fp32_param(parameter), other.detach())
        for key in ("exp_avg", "exp_avg_sq"):
            close(utils.safe_get_full_optimizer_state(parameter, key), plain.state[other][key])
    with pytest.raises(KeyError, match=r"has no optimizer state 'momentum'; it has .*exp_avg"):
        utils.safe_get_full_optimizer_state(weight, "momentum")


@pytest.mark.parametrize("stage", STAGES)
def test_values(ranks: Ranks, stage: int) -> None:
    ranks.run(2, values_case, stage, 1, False)


@pytest.mark.parametrize(
    ("stage", "tp", "as_sum", "offload"),
    [(3, 2, True, False), slow(1, 2, False, False), slow(0, 2, True, False), slow(2, 1, True, True)],
)
def test_values_otherwise(ranks: Ranks, stage: int, tp: int, as_sum: bool, offload: bool) -> None:
    ranks.run(2, values_case, stage, tp, as_sum, offload)


def set_case(stage: int, tp: int, bf16: bool, local: bool) -> None:
    """Set everything by parameter, before a step and between two; the oracle is set alike."""
    model = seeded(Wide)
    engine = make(model, stage, tp, bf16={"enabled": bf16})
    backward(engine, as_sum=False)
    engine.step()
    generator = torch.Generator().manual_seed(1)
    wanted = {n: torch.randn(p.shape, generator=generator) for n, p in engine.module.named_parameters()}
    for name, parameter in engine.module.named_parameters():
        if local:  # each rank sets its part, here to 7 plus its rank
            part = utils.safe_get_local_fp32_param(parameter)
            utils.safe_set_local_fp32_param(parameter, torch.full_like(part, 7.0 + engine.global_rank))
            state = utils.safe_get_local_optimizer_state(parameter, "exp_avg_sq")
            utils.safe_set_local_optimizer_state(
                parameter, torch.full_like(state, 0.5).flatten(), "exp_avg_sq"
            )
        else:
            utils.safe_set_full_fp32_param(parameter, wanted[name])
            utils.safe_set_full_optimizer_state(parameter, wanted[name].square(), "exp_avg_sq")
    for name, parameter in engine.module.named_parameters():
        value = utils.safe_get_full_fp32_param(parameter)
        state = utils.safe_get_full_optimizer_state(parameter, "exp_avg_sq")
        if local:
            assert set(value.flatten().tolist()) <= ({7.0, 8.0} if stage else {7.0 + engine.global_rank})
            assert bool((state == 0.5).all())
        else:
            assert torch.equal(value, wanted[name]), "bit by bit, in fp32"
            assert torch.equal(state, wanted[name].square())
    before = whole_now(engine)
    backward(engine, as_sum=False)
    for _, parameter in engine.module.named_parameters():
        if local:
            part = utils.safe_get_local_grad(parameter)
            utils.safe_set_local_grad(parameter, torch.zeros_like(part))
        else:
            utils.safe_set_full_grad(parameter, torch.zeros_like(utils.safe_get_full_grad(parameter)))
    utils.safe_update_full_grad_vectorized(engine.module.parameters(), lambda gradient, _: gradient + 0.0)
    engine.optimizer.param_groups[0]["lr"] = 0.0
    engine.step()
    assert engine.get_global_grad_norm() == 0.0
    assert all(torch.equal(value, before[name]) for name, value in whole_now(engine).items())


@pytest.mark.parametrize(
    ("stage", "tp", "bf16", "local"),
    [
        (3, 1, False, False),
        (1, 2, True, False),
        slow(0, 1, False, False),
        slow(2, 1, True, False),
        slow(3, 2, True, False),
        slow(0, 2, False, False),
        (1, 1, False, True),
        slow(3, 1, True, True),
    ],
)
def test_set(ranks: Ranks, stage: int, tp: int, bf16: bool, local: bool) -> None:
    ranks.run(2, set_case, stage, tp, bf16, local)


def moments_case(stage: int) -> list[str]:
    """Return the errors at the wrong moments, and with wrong tensors."""
    engine = make(seeded(Stack), stage)
    data = micro_batches(global_batches(2), engine)
    weight, errors = engine.module.out.weight, []

    def refused(kind: type[Exception], call: Any, *given: Any) -> None:
        with pytest.raises(kind) as caught:
            call(*given)
        errors.append(str(caught.value))

    refused(RuntimeError, utils.safe_set_full_optimizer_state, weight, torch.zeros(1, 6), "exp_avg")
    refused(ValueError, utils.safe_set_full_fp32_param, weight, torch.zeros(6, 1))
    refused(TypeError, utils.safe_get_full_grad, "out.weight")
    engine.backward((engine(next(data)[0])).square().mean())
    engine.step()
    refused(RuntimeError, utils.safe_get_full_grad, weight)
    refused(RuntimeError, utils.safe_set_full_fp32_param, weight, torch.zeros(1, 6))
    assert utils.safe_get_full_fp32_param(weight) is not None
    with_none = nn.Linear(2, 2)
    assert utils.safe_get_full_fp32_param(with_none.weight) is None
    assert utils.safe_get_full_grad(with_none.weight) is None
    return errors


@pytest.mark.parametrize("stage", [slow(1), 3])
def test_wrong_moments(ranks: Ranks, stage: int) -> None:
    errors = ranks.run(2, moments_case, stage)
    assert errors[0] == errors[1]
    for found, expected in zip(
        errors[0],
        (
            "the parameter has no exp_avg to set",
            "safe_set_full_fp32_param got the shape (6, 1); expected (1, 6)",
            "safe_get_full_grad got a str; pass a parameter of engine.module",
            "1 of 2 micro batches are done",
            "can't be called between the micro batches of a step",
        ),
        strict=True,
    ):
        assert expected in found


def fp16_case(as_sum: bool) -> None:
    """Gradients in fp16 are given without the loss scale."""
    model = seeded(Wide)
    expected, _ = one_step(model)
    engine = make(model, 1, fp16={"enabled": True, "initial_scale_power": 8})
    backward(engine, as_sum=as_sum)
    for name, parameter in engine.module.named_parameters():
        found = utils.safe_get_full_grad(parameter)
        torch.testing.assert_close(found, expected.get_parameter(name).grad, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("as_sum", [slow(True), False])
def test_gradients_in_fp16(ranks: Ranks, as_sum: bool) -> None:
    ranks.run(2, fp16_case, as_sum)
