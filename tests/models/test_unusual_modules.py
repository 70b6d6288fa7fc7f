"""Models that hang on the details of autograd and of sharding train with the steps of plain PyTorch."""

from itertools import product, starmap
from typing import Any

import pytest
import torch
from marks import matrix, slow
from ranks import Ranks
from torch import Tensor, nn
from unusual_modules import KINDS, WIDTH, Batch, linear, mse

import uni3d

BATCH, STEPS, ACCUMULATION = 8, 3, 2
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}


class Scaled(torch.optim.SGD):
    """SGD that reads a factor of the learning rate off each parameter."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(getattr(parameter, "lr_scale", 1.0))
        return super().step(closure)


def make(kind: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return KINDS[kind].make()


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(BATCH, WIDTH, generator=generator), torch.randn(BATCH, WIDTH, generator=generator))
        for _ in range(STEPS)
    ]


def micro(batch: Batch, rank: int, ranks: int) -> list[Batch]:
    x, y = (t.chunk(ranks)[rank] for t in batch)
    return list(zip(x.chunk(ACCUMULATION), y.chunk(ACCUMULATION), strict=True))


def steps_case(zero: int, kinds: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for kind in kinds:
        config = {
            "train_batch_size": BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": zero},
            "parallel": {"device": "cpu"},
        }
        engine = uni3d.initialize(
            model=make(kind), optimizer=lambda groups: Scaled(groups, **SGD), config=config
        )[0]
        losses = []
        for batch in batches():
            total = torch.zeros(())
            for part in micro(batch, engine.global_rank, engine.world_size):
                total += engine.backward(KINDS[kind].loss(engine, part))
                engine.step()
            losses.append(total)
        results[kind] = (losses, engine.get_global_grad_norm(), engine.module_state_dict())
    return results


def plain(kind: str, ranks: int) -> tuple[list[list[float]], float, dict[str, Tensor]]:
    """Train in one process; return each rank's losses, the last norm and the weights."""
    model = make(kind)
    optimizer = Scaled(model.parameters(), foreach=False, **SGD)
    losses: list[list[float]] = [[] for _ in range(ranks)]
    for batch in batches():
        optimizer.zero_grad()
        for rank in range(ranks):
            total = torch.zeros(())
            for part in micro(batch, rank, ranks):
                loss = KINDS[kind].loss(model, part) / ACCUMULATION
                (loss / ranks).backward()
                total += loss.detach()
            losses[rank].append(total.item())
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        optimizer.step()
    return losses, norm, model.state_dict()


QUICK = [(3, 1)]
SOME = [(0, 2), (2, 1), (3, 2)]
ALL = [
    *QUICK,
    *starmap(slow, SOME),
    *(matrix(*p) for p in product(range(4), (1, 2)) if p not in QUICK + SOME),
]


@pytest.mark.parametrize(("zero", "size"), ALL)
def test_the_steps_are_those_of_one_process(ranks: Ranks, zero: int, size: int) -> None:
    results = ranks.run(size, steps_case, zero, list(KINDS))
    for kind in KINDS:
        losses, norm, weights = plain(kind, size)
        for rank, result in enumerate(results):
            found, found_norm, parameters = result[kind]
            assert [x.item() for x in found] == pytest.approx(losses[rank], rel=1e-5), kind
            assert found_norm == pytest.approx(norm, rel=1e-5), kind
            assert parameters.keys() == weights.keys()
            for name, weight in weights.items():
                torch.testing.assert_close(
                    parameters[name], weight, rtol=1e-5, atol=1e-6, msg=f"{kind}: {name}"
                )


# --- what can't be carried over is refused ---------------------------------------------------------------


class KeptInAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.weights = [self.weight]


class TiedByData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(), linear()
        self.second.weight.data = self.first.weight.data


class BufferOfAWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()
        self.register_buffer("kept", self.layer.weight.detach())


class KeptAsAView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.turned = self.weight.t()


class SteppedInAHook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.weight.register_post_accumulate_grad_hook(lambda p: None)


REFUSED = {
    KeptInAList: "the parameter weight is also kept in weights, a list of KeptInAList",
    KeptAsAView: "the parameter weight is also kept in turned, a Tensor of KeptAsAView",
    TiedByData: "first.weight and second.weight share memory",
    BufferOfAWeight: "kept and layer.weight share memory",
    SteppedInAHook: "weight has a hook by register_post_accumulate_grad_hook",
}


def refused_case(kind: type[nn.Module]) -> str:
    config = {"train_batch_size": 2, "parallel": {"device": "cpu"}, "optimizer": {"type": "SGD"}}
    with pytest.raises(ValueError, match=r"parameter|hook|memory") as caught:
        uni3d.initialize(model=kind(), config=config)
    return str(caught.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_parameters_that_sharding_would_lose_are_refused(ranks: Ranks, kind: type[nn.Module]) -> None:
    for error in ranks.run(2, refused_case, kind):
        assert error.startswith(REFUSED[kind])


def sharded_penalty_case() -> str:
    config = {
        "train_batch_size": BATCH,
        "optimizer": {"type": "SGD"},
        "zero_optimization": {"stage": 3},
        "parallel": {"device": "cpu"},
    }
    engine = uni3d.initialize(model=make("a gradient penalty"), config=config)[0]
    x, y = (t.chunk(2)[engine.global_rank] for t in batches()[0])
    loss = mse(engine, (x, y)) + sum(p.square().sum() for p in engine.module.parameters())
    with pytest.raises(ValueError, match="sharded parameters") as caught:
        engine.backward(loss)
    return str(caught.value)


def test_a_loss_of_sharded_parameters_is_refused(ranks: Ranks) -> None:
    for error in ranks.run(2, sharded_penalty_case):
        assert "compute such a term from parameter.full_tensor()" in error
