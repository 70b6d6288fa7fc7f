"""Models that hang on the details of autograd and of sharding train with the steps of plain PyTorch."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import uni3d

WIDTH, BATCH, STEPS, ACCUMULATION = 6, 8, 3, 2
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}

Batch = tuple[Tensor, Tensor]


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


class Stack(nn.Module):
    """Two listed layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([linear(), linear()])
        self.out = linear()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        out: Tensor = self.out(x)
        return out


class TiedOutside(nn.Module):
    """nanoGPT's tie: an embedding in a ModuleDict and a head outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"embed": linear(), "layers": nn.ModuleList([linear(), linear()])})
        self.head = linear()
        self.body["embed"].weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.body["embed"](x)
        for layer in self.body["layers"]:  # type: ignore[attr-defined]
            x = x + torch.tanh(layer(x))
        out: Tensor = self.head(x)
        return out


class CalledByParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(linear(), linear()) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for first, second in self.layers:  # type: ignore[misc]
            x = torch.tanh(second(torch.tanh(first(x))))
        return x


class OtherMethod(Stack):
    """Its loss calls `encode`, not `forward`."""

    def encode(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.layers[0](x)))
        return out


class ParametersInALayerList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ParameterList([torch.randn(WIDTH, WIDTH) / 2 for _ in range(2)])])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.layers[0]:  # type: ignore[attr-defined]
            x = torch.tanh(x @ weight)
        return x


class InPlaceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = linear()
        self.layers = nn.ModuleList([nn.Sequential(nn.ReLU(inplace=True), linear()) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Empty(Stack):
    """Has a parameter without elements, one of no dim, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Objects(Stack):
    """Returns an object that torch's pytree doesn't know, and its layers do too."""

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(value=super().forward(x))


class ObjectLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(value=torch.tanh(self.inner(x)))


class ObjectLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ObjectLayer(), ObjectLayer()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).value
        return x


class Recomputed(nn.Module):
    """A layer used twice under reentrant checkpointing: its weight gets two gradients in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = linear(), nn.ModuleList([linear(), linear()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i in (0, 1, 0):
            x = checkpoint(lambda v, i=i: torch.tanh(self.layers[i](v)), x, use_reentrant=True)
        return x


class Forces(Stack):
    """Returns the gradient of an energy by its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_(True)
            return torch.autograd.grad(super().forward(x).square().sum(), x, create_graph=True)[0]


class Hooked(Stack):
    """Half of a weight is masked by a gradient hook; its optimizer scales a bias's rate by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        mask = (torch.arange(WIDTH) < 3).float()
        self.layers[0].weight.register_hook(lambda gradient: gradient * mask)  # type: ignore
        self.out.bias.lr_scale = 0.5  # type: ignore[assignment]


def mse(model: Any, batch: Batch) -> Tensor:
    output = model(batch[0])
    return F.mse_loss(getattr(output, "value", output), batch[1])


def by_method(model: Any, batch: Batch) -> Tensor:
    return F.mse_loss(getattr(model, "module", model).encode(batch[0]), batch[1])


def gradient_penalty(model: Any, batch: Batch) -> Tensor:
    x = batch[0].clone().requires_grad_(True)
    out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return F.mse_loss(out, batch[1]) + (slope.norm(dim=-1) - 1).square().mean()


def weight_penalty(model: Any, batch: Batch) -> Tensor:
    loss = mse(model, batch)
    for parameter in getattr(model, "module", model).parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        loss = loss + 0.01 * whole.square().sum()
    return loss


def twice(model: Any, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1]) + F.mse_loss(model(batch[0] * 2), model(batch[1]))


class Collecting(nn.Module):
    """Its layers hand on what they compute in a dict, and note it in a list."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear()

        def forward(self, state: dict[str, Tensor], seen: list[Tensor]) -> None:
            state["x"] = torch.tanh(self.inner(state["x"]))
            seen.append(state["x"])

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Layer(), self.Layer()])

    def forward(self, x: Tensor) -> Tensor:
        state, seen = {"x": x}, list[Tensor]()
        for layer in self.layers:
            layer(state, seen)
        return sum(seen[1:], seen[0])


class Nested(nn.Module):
    """Its layers return objects of objects."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear()

        def forward(self, value: Any) -> Any:
            x = torch.tanh(self.inner(value.inside.x))
            return SimpleNamespace(inside=SimpleNamespace(x=x))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Layer(), self.Layer()])

    def forward(self, x: Tensor) -> Tensor:
        value = SimpleNamespace(inside=SimpleNamespace(x=x))
        for layer in self.layers:
            value = layer(value)
        out: Tensor = value.inside.x
        return out


class Kind(NamedTuple):
    make: Callable[[], nn.Module]
    loss: Callable[[Any, Batch], Tensor] = mse


KINDS = {
    "tied outside of the list": Kind(TiedOutside),
    "called by parts": Kind(CalledByParts),
    "a method that isn't forward": Kind(OtherMethod, by_method),
    "a ParameterList in a ModuleList": Kind(ParametersInALayerList),
    "in place first": Kind(InPlaceFirst),
    "empty, scalar and unused": Kind(Empty),
    "an object as output": Kind(Objects),
    "objects between layers": Kind(ObjectLayers),
    "reentrant checkpoints of a shared layer": Kind(Recomputed),
    "a gradient inside forward": Kind(Forces),
    "a gradient penalty": Kind(Stack, gradient_penalty),
    "a weight penalty outside of forward": Kind(Stack, weight_penalty),
    "three forward passes for one loss": Kind(Stack, twice),
    "hooks and attributes on parameters": Kind(Hooked),
    "layers that write into their arguments": Kind(Collecting),
    "objects of objects between layers": Kind(Nested),
}


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


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
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
        assert "inside the model's forward()" in error
