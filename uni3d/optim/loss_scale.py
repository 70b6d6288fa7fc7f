"""The loss scale of fp16: small gradients are lifted into fp16's range, and let down again before the step.

(Mixed precision training, Micikevicius et al. 2018, section 3.2; how the scale moves is DeepSpeed's.)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uni3d.config import FP16Config

FACTOR = 2.0
"""By which the scale grows and shrinks."""


class LossScale:
    """By how much losses are multiplied before the backward pass.

    A step whose gradients overflow anywhere is skipped. The scale is halved when `hysteresis` steps have
    been skipped, and doubled after `loss_scale_window` steps without an overflow; a static one stays.

    A loss that is a sum over tokens is also divided by about the number of them in a global batch, as
    gradients of the sum would overflow at a scale that is right for the mean's. The divisor is a power of
    two, and so changes no digit; it is fixed by the first batch, and is part of a checkpoint.
    """

    def __init__(self, config: FP16Config) -> None:
        self._config = config
        self.scale = config.loss_scale or 2.0**config.initial_scale_power
        self.terms: float | None = None
        """The divisor; None before the first batch."""
        self._hysteresis = config.hysteresis
        self._good_steps = 0

    @property
    def dynamic(self) -> bool:
        return self._config.loss_scale == 0

    @property
    def factor(self) -> float:
        """What a micro batch's summed loss is multiplied by."""
        assert self.terms is not None, "found out before the first backward pass"
        return self.scale / self.terms

    def set_terms(self, terms: float) -> None:
        """Fix the divisor: the power of two next to the number of a global batch's terms."""
        self.terms = 2.0 ** round(math.log2(max(1.0, terms)))

    def update(self, *, overflow: bool) -> None:
        """Move the scale after a step was taken or skipped.

        Raises:
            FloatingPointError: a gradient overflows at the smallest scale that is allowed.
        """
        if not self.dynamic:
            return
        if overflow:
            self._good_steps = 0
            if self._hysteresis > 1:
                self._hysteresis -= 1
                return
            if self.scale <= self._config.min_loss_scale:
                raise FloatingPointError(
                    f"gradients overflow at a loss scale of {self.scale:g}, and fp16.min_loss_scale is "
                    f"{self._config.min_loss_scale:g}: training has diverged, or the model needs bf16 or fp32"
                )
            self.scale = max(self.scale / FACTOR, float(self._config.min_loss_scale))
            return
        if self._config.consecutive_hysteresis:
            self._hysteresis = self._config.hysteresis
        self._good_steps += 1
        if self._good_steps % self._config.loss_scale_window == 0:
            self._hysteresis = self._config.hysteresis
            self.scale *= FACTOR

    def state_dict(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "terms": self.terms,
            "hysteresis": self._hysteresis,
            "good_steps": self._good_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state; a static scale stays what the config says."""
        if self.dynamic:
            self.scale = state["scale"]
        self.terms = state["terms"]
        self._hysteresis, self._good_steps = state["hysteresis"], state["good_steps"]
