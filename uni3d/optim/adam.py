"""Adam and AdamW with DeepSpeed's arguments, computed by torch's in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch


class FusedAdam(torch.optim.Adam):
    """AdamW, or Adam with L2 decay if `adam_w_mode` is false; fused, one pass over memory."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        """Take DeepSpeed's arguments.

        Raises:
            ValueError: `bias_correction` is false; gradients are always set to None.
        """
        if not bias_correction:
            raise ValueError(f"{type(self).__name__}: torch's Adam always corrects the bias of its averages")
        if not set_grad_none:
            raise ValueError(f"{type(self).__name__}: gradients are always set to None, not to zeros")
        torch.optim.Adam.__init__(  # torch's AdamW, if it comes between, would only set the last argument
            self,
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            decoupled_weight_decay=adam_w_mode,
        )
        for group in self.param_groups:
            group["fused"] = True  # parameters may still be on the meta device, so not by the argument
        self._step_supports_amp_scaling = True


class AdamW(FusedAdam, torch.optim.AdamW):
    """Config's AdamW: DeepSpeed's class and torch's, under the name that checkpoints are compared by."""


class Adam(FusedAdam):
    """Config's Adam with L2 decay."""
