"""Names that DeepSpeed scripts use on the optimizer, besides torch's.

The optimizer stays the object that it was, so schedulers and scripts that hold it aren't misled. It gets a
class of the same name between itself and its own, and a hook on `step`.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, NoReturn

from torch.optim import Optimizer

from uni3d.engine.micro_batches import MicroBatches
from uni3d.engine.step import Stepper
from uni3d.optim.loss_scale import FACTOR, LossScale


class _Parts(NamedTuple):
    """Parts of an engine that its optimizer asks."""

    micro: MicroBatches
    stepper: Stepper
    scaler: LossScale | None


class LossScalerFace:
    """The loss scale as DeepSpeed's `optimizer.loss_scaler`; 1 without fp16. Read-only."""

    scale_factor = FACTOR

    def __init__(self, parts: _Parts) -> None:
        self._parts = parts

    @property
    def cur_scale(self) -> float:
        scaler = self._parts.scaler
        return 1.0 if scaler is None else scaler.scale

    loss_scale = cur_scale

    @property
    def cur_iter(self) -> int:
        """Number of optimizer steps, those that were skipped too."""
        return self._parts.stepper.steps

    @property
    def scale_window(self) -> int | None:
        """Steps without an overflow before one that doubles the scale; None of a scale that stays."""
        scaler = self._parts.scaler
        return scaler.window if scaler is not None and scaler.dynamic else None


class _Face:
    """Members of an engine's optimizer, in front of those of its own class."""

    _engine_parts: _Parts

    @property
    def optimizer(self) -> Any:
        """The optimizer inside, which is this one."""
        return self

    @property
    def loss_scale(self) -> float:
        """Loss scale of fp16; 1 in other types."""
        scaler = self._engine_parts.scaler
        return 1.0 if scaler is None else scaler.scale

    cur_scale = loss_scale

    @property
    def dynamic_loss_scale(self) -> bool:
        """True if overflows and their absence move the loss scale."""
        scaler = self._engine_parts.scaler
        return scaler is not None and scaler.dynamic

    @property
    def loss_scaler(self) -> LossScalerFace:
        return LossScalerFace(self._engine_parts)

    @property
    def overflow(self) -> bool:
        """True if the last optimizer step was skipped for an overflow."""
        return self._engine_parts.stepper.overflowed

    def backward(self, loss: Any, retain_graph: bool = False) -> NoReturn:
        raise RuntimeError("optimizer.backward() would leave out the engine; call engine.backward(loss)")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients between two steps. Those of a step's micro batches stay: see `Engine.zero_grad`."""
        micro = self._engine_parts.micro
        if micro.losses:
            warnings.warn(
                "optimizer.zero_grad() keeps the gradients of the step's micro batches, as step() zeroes "
                "them itself; engine.zero_grad() drops them",
                stacklevel=2,
            )
            return
        micro.drop()


def put_face(optimizer: Optimizer, micro: MicroBatches, stepper: Stepper, scaler: LossScale | None) -> None:
    """Give an engine's optimizer the members of `_Face`, and refuse steps that the engine doesn't take."""
    kind: Any = type(optimizer)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    optimizer.__class__ = type(kind.__name__, (_Face, kind), names)
    vars(optimizer)["_engine_parts"] = _Parts(micro, stepper, scaler)

    def before_step(*_: Any) -> None:
        micro.check_engine_steps()

    optimizer.register_step_pre_hook(before_step)
