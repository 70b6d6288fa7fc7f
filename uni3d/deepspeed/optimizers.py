"""`deepspeed.ops`: optimizers with DeepSpeed's arguments, computed by torch's on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from uni3d.optim.adam import FusedAdam
from uni3d.optim.lion import Lion


class DeepSpeedCPUAdam(FusedAdam):
    """The same as `FusedAdam`; it steps where the parameters are, in host memory with offloading."""

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        _check_fp32(self, fp32_optimizer_states)
        super().__init__(model_params, lr, bias_correction, betas, eps, adamw_mode, weight_decay, amsgrad)


class FusedLion(Lion):
    """Lion."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        """Take DeepSpeed's arguments; gradients are always set to None."""
        if not set_grad_none:
            raise ValueError("FusedLion: gradients are always set to None, not to zeros")
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)


class DeepSpeedCPULion(Lion):
    """Lion; it steps where the parameters are, in host memory with offloading."""

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,
    ) -> None:
        _check_fp32(self, fp32_optimizer_states)
        super().__init__(model_params, lr=lr, betas=betas, weight_decay=weight_decay)


class DeepSpeedCPUAdagrad(torch.optim.Adagrad):
    """Adagrad; it steps where the parameters are. The first step makes its states, sharded ones."""

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> None:
        """Take DeepSpeed's arguments.

        Raises:
            ValueError: `amsgrad`, which Adagrad doesn't have, or states that aren't fp32.
        """
        _check_fp32(self, fp32_optimizer_states)
        if amsgrad:
            raise ValueError("DeepSpeedCPUAdagrad: Adagrad has no amsgrad")
        super().__init__(model_params, lr=lr, eps=eps, weight_decay=weight_decay)
        self.state.clear()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter not in self.state:
                    self.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        "sum": torch.full_like(parameter, group["initial_accumulator_value"]).detach(),
                    }
        return super().step(closure)


def _check_fp32(optimizer: torch.optim.Optimizer, fp32_optimizer_states: bool) -> None:
    if not fp32_optimizer_states:
        raise ValueError(f"{type(optimizer).__name__}: parameters and their states are always fp32")
