"""Lion: steps by the sign of a momentum (Symbolic discovery of optimization algorithms, Chen et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of the paper. Its one state, `exp_avg`, has the parameter's shape.

    Elementwise, so each rank steps its own part of a sharded parameter without communication.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        """Set the defaults; `betas` weigh the momentum in the step and in the momentum's own update."""
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the engine has computed the gradients"
        for group in self.param_groups:
            in_step, in_momentum = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)  # a DTensor too, as checkpoints need
                weight, gradient, momentum = map(local, (parameter, parameter.grad, state["exp_avg"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                direction = torch.lerp(gradient, momentum, in_step).sign_()
                weight.sub_(direction.mul_(group["lr"]))
                momentum.lerp_(gradient, 1 - in_momentum)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of the tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
