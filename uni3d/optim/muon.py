"""Muon for matrices, AdamW for the rest, both right on sharded parameters.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces a matrix's momentum by the
nearest orthogonal matrix. This needs the whole matrix: orthogonalizing each part would give another result.
So every rank gathers one matrix at a time, orthogonalizes it and keeps its own part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from uni3d.optim.lion import local

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration; singular values end between about 0.7 and 1.2."""
ITERATIONS = 5
_NOT_HIDDEN = ("embed", "lm_head")


class MuonWithAdam(torch.optim.Optimizer):
    """Muon for groups with `use_muon` true, AdamW for the others.

    Muon's state is `momentum_buffer`; AdamW's are `exp_avg`, `exp_avg_sq` and a count `step`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take a step. Collective over the ranks that share parameters."""
        assert closure is None, "the engine has computed the gradients"
        for group in self.param_groups:
            update = self._muon if group["use_muon"] else self._adam
            for parameter in group["params"]:
                if parameter.grad is not None:
                    direction = update(parameter, group)
                    weight = local(parameter)
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.sub_(direction.mul_(group["lr"]))

    def _muon(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum, gradient = state["momentum_buffer"], parameter.grad
        assert gradient is not None
        local(momentum).lerp_(local(gradient), 1 - group["momentum"])
        ahead = torch.zeros_like(parameter)  # Nesterov's
        torch.lerp(local(gradient), local(momentum), group["momentum"], out=local(ahead))
        rows, columns = parameter.shape
        whole = orthogonal(gathered(ahead))
        scale: float = max(1.0, rows / columns) ** 0.5
        return own_part(whole.mul_(scale), parameter)

    def _adam(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            state["step"] = 0
        state["step"] += 1
        first, second = group["betas"]
        assert parameter.grad is not None
        gradient, mean, square = map(local, (parameter.grad, state["exp_avg"], state["exp_avg_sq"]))
        mean.lerp_(gradient, 1 - first)
        square.lerp_(gradient.square(), 1 - second)
        root = (square / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        step: Tensor = mean / (1 - first ** state["step"]) / root
        return step


def orthogonal(matrix: Tensor) -> Tensor:
    """Return about U V^T of the matrix's singular value decomposition U S V^T, by Newton-Schulz iteration.

    Computed in bfloat16 on a GPU, as is usual, and in the matrix's own type on the CPU.
    """
    a, b, c = COEFFICIENTS
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide.bfloat16() if matrix.is_cuda else wide
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.T if matrix.shape[0] > matrix.shape[1] else x
    return result.to(matrix.dtype)


def gathered(tensor: Tensor) -> Tensor:
    """Collective: return the whole of a sharded tensor, on the compute device even if it is offloaded."""
    if not isinstance(tensor, DTensor):
        return tensor
    here = tensor.to(tensor.device_mesh.device_type)
    assert isinstance(here, DTensor), "only its device has changed"
    return here.full_tensor()


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a tensor that all ranks have, sharded like `like` and on its device."""
    if not isinstance(like, DTensor):
        return whole
    everywhere = [Replicate()] * like.device_mesh.ndim
    # All ranks have the same values, so no check is needed, and taking a part needs no communication.
    copies = DTensor.from_local(whole, like.device_mesh, everywhere, run_check=False)
    part = copies.redistribute(placements=like.placements).to_local()
    return torch.empty_like(local(like)).copy_(part)


def muon_groups(
    model: nn.Module, groups: list[dict[str, Any]], matrices: dict[str, Any], rest: dict[str, Any]
) -> list[dict[str, Any]]:
    """Split each group of parameter names in two, for Muon and for AdamW; either may be empty.

    As in DeepSpeed, a parameter's attribute `use_muon` decides. Without it, Muon takes matrices unless their
    names contain "embed" or "lm_head". `matrices` and `rest` are the hyperparameters of the two; a group's
    own take precedence.

    Raises:
        ValueError: `use_muon` is true for a parameter that isn't a matrix.
    """
    parameters = dict(model.named_parameters())
    chosen = {name: _use_muon(name, parameter) for name, parameter in parameters.items()}
    split = []
    for group in groups:
        own = {key: value for key, value in group.items() if key != "params"}
        for use_muon, defaults in ((True, matrices), (False, rest)):
            names = [name for name in group["params"] if chosen[name] == use_muon]
            split.append({**defaults, **own, "use_muon": use_muon, "params": names})
    return split


def _use_muon(name: str, parameter: nn.Parameter) -> bool:
    asked = getattr(parameter, "use_muon", None)
    if asked is None:
        return parameter.ndim == 2 and not any(word in name.lower() for word in _NOT_HIDDEN)
    if asked and parameter.ndim != 2:
        raise ValueError(
            f"{name}.use_muon is true, but its shape is {tuple(parameter.shape)}; Muon takes matrices"
        )
    return bool(asked)
