"""The loss scale of fp16: losses are scaled up so that small gradients don't underflow.

(Mixed precision training, Micikevicius et al. 2018, section 3.2; how the scale moves is DeepSpeed's.)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uni3d.config import FP16Config

FACTOR = 2.0
"""Factor by which the scale grows and shrinks."""


class LossScale:
    """Factor by which losses are multiplied before the backward pass.

    A step whose gradients overflow on any rank is skipped. The scale is halved after `hysteresis` skipped
    steps. It is doubled by a step without overflow if a positive multiple of `loss_scale_window` such steps
    lie between the last overflow, or the beginning, and that step. A static scale doesn't change.

    A loss that is a sum over tokens is also divided by about their number in a global batch, as gradients of
    the sum would overflow at a scale that suits the mean. The divisor is a power of two, so it rounds
    nothing; the first batch sets it, and checkpoints keep it.
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
        """True if the config doesn't fix the scale."""
        return self._config.loss_scale == 0

    @property
    def window(self) -> int:
        """Steps without an overflow before one that doubles the scale."""
        return self._config.loss_scale_window

    @property
    def factor(self) -> float:
        """Factor of a micro batch's summed loss."""
        assert self.terms is not None, "set before the first backward pass"
        return self.scale / self.terms

    def set_terms(self, terms: float) -> None:
        """Set the divisor: the power of two nearest to the number of terms in a global batch."""
        self.terms = 2.0 ** round(math.log2(max(1.0, terms)))

    def update(self, *, overflow: bool) -> None:
        """Adjust the scale after a step was taken or skipped.

        Raises:
            FloatingPointError: a gradient overflows at the smallest allowed scale.
        """
        if not self.dynamic:
            return
        if overflow:
            self._good_steps = 0
            if self._config.hysteresis > 1 and self._hysteresis > 1:  # a resumed run's config may say 1
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
        if self._good_steps > 0 and self._good_steps % self._config.loss_scale_window == 0:
            self._hysteresis = self._config.hysteresis
            self.scale *= FACTOR
        self._good_steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "terms": self.terms,
            "hysteresis": self._hysteresis,
            "good_steps": self._good_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state; a static scale keeps the config's value."""
        if self.dynamic:
            self.scale = state["scale"]
        self.terms = state["terms"]
        self._hysteresis, self._good_steps = state["hysteresis"], state["good_steps"]
