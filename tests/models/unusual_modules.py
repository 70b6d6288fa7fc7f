"""Models and losses that hang on the details of autograd and of sharding, by what is unusual about them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 6

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
