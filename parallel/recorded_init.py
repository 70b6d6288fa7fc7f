"""Record what a model's `init_parameter` does to a tensor, so that it can be done to tiles of it.

`init_parameter(name, tensor, generator)` fills whole tensors. It is called with a tensor that has the whole
shape but no memory. If all that it does is draws, fills and arithmetic with numbers, in place, then no place
in the tensor is special, and the same operations do for any tile of it. Anything else (a view, a second
tensor, a decision that depends on values) can't be cut, and is left to a whole draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

InitParameter = Callable[[str, Tensor, torch.Generator], None]

_aten = torch.ops.aten
_FIRST = {
    _aten.normal_.default,
    _aten.uniform_.default,
    _aten.log_normal_.default,
    _aten.exponential_.default,
    _aten.cauchy_.default,
    _aten.geometric_.default,
    _aten.bernoulli_.float,
    _aten.random_.default,
    _aten.random_.to,
    getattr(_aten.random_, "from"),
    _aten.fill_.Scalar,
    _aten.zero_.default,
}
"""Operations that need no earlier content."""
_LATER = {
    _aten.add_.Tensor,
    _aten.sub_.Tensor,
    _aten.mul_.Tensor,
    _aten.div_.Tensor,
    _aten.pow_.Scalar,
    _aten.clamp_.default,
    _aten.clamp_min_.default,
    _aten.clamp_max_.default,
    _aten.abs_.default,
    _aten.neg_.default,
    _aten.sign_.default,
    _aten.exp_.default,
    _aten.log_.default,
    _aten.sqrt_.default,
    _aten.rsqrt_.default,
    _aten.reciprocal_.default,
    _aten.sin_.default,
    _aten.cos_.default,
    _aten.tanh_.default,
    _aten.sigmoid_.default,
    _aten.erf_.default,
    _aten.erfinv_.default,
}
"""Operations on each element by itself, if their other arguments are numbers."""


class Operation(NamedTuple):
    """An operation that fills or changes a tensor in place."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    """Includes `generator`, as None, if the operation draws."""

    def do(self, tensor: Tensor, generator: torch.Generator) -> None:
        keywords = self.keywords
        if "generator" in keywords:
            keywords = {**keywords, "generator": generator}
        self.function(tensor, *self.arguments, **keywords)


def record(
    init_parameter: InitParameter,
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> list[Operation] | None:
    """Return what `init_parameter` does to a tensor of this shape; None if that can't be done to tiles.

    Nothing is drawn. A draw from torch's own generator counts as one from `generator`.
    """
    tensor = _Shape(tuple(shape), dtype)
    recorder = _Recorder(tensor, generator)
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state(), generator.get_state()
        try:
            with recorder, recorder.trunc_normal_noted():
                init_parameter(name, tensor, generator)
        except Exception:  # the whole draw that follows raises it again, if it is the model's own
            return None
        reseeded = not all(map(torch.equal, before, (torch.get_rng_state(), generator.get_state())))
    if recorder.refused or reseeded or not recorder.operations:
        return None
    begins_with_content = recorder.operations[0].function not in _FIRST | {nn.init.trunc_normal_}
    return None if begins_with_content else recorder.operations


class _Shape(Tensor):
    """A CPU tensor without memory. Unlike one on the meta device, `nn.init` doesn't pass over it."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype) -> _Shape:
        cpu = torch.device("cpu")
        made: _Shape = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=cpu)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise _CannotBeCutError(func)  # an operation outside of the recorder, such as repr()


class _CannotBeCutError(Exception):
    """Ends a recording."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what is done to a tensor in place instead of doing it, and refuses anything else."""

    def __init__(self, tensor: _Shape, generator: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.refused = False
        """True if something was refused: the model's code may have caught the error."""
        self._same = [tensor]  # and what `.data` and `detach()` gave of it
        self._generator = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = args[0] if args else None
        if func is _aten.detach.default and isinstance(target, _Shape):
            self._same.append(_Shape(tuple(target.shape), target.dtype))
            return self._same[-1]
        if func not in _FIRST | _LATER:
            raise self._refusal(func)
        draws = any(argument.name == "generator" for argument in func._schema.arguments)
        return self._note(func, target, args[1:], kwargs or {}, draws=draws)

    def trunc_normal_noted(self) -> Any:
        """Return a context in which `nn.init.trunc_normal_` is one operation.

        It draws what doesn't fit again, until all elements of a tensor do. So it may for those of a tile.
        """

        def note(tensor: Tensor, *others: Any, generator: torch.Generator | None = None) -> Tensor:
            return self._note(nn.init.trunc_normal_, tensor, others, {"generator": generator}, draws=True)

        return mock.patch.object(nn.init, "_no_grad_trunc_normal_", note, create=True)

    def _note(
        self, function: Any, target: Any, others: Sequence[Any], keywords: dict[str, Any], *, draws: bool
    ) -> Tensor:
        keywords = dict(keywords)
        generator = keywords.pop("generator", None)
        numbers = all(isinstance(x, int | float | None) for x in (*others, *keywords.values()))
        if not self._knows(target) or not numbers or not self._is_given(generator):
            raise self._refusal(function)
        self.operations.append(
            Operation(function, tuple(others), {**keywords, "generator": None} if draws else keywords)
        )
        tensor: Tensor = target
        return tensor

    def _knows(self, target: Any) -> bool:
        return any(target is tensor for tensor in self._same)

    def _is_given(self, generator: torch.Generator | None) -> bool:
        """Return whether a draw is from the given generator or torch's own."""
        if generator is None or generator is self._generator:
            return True
        # Inside an operation it is another Python object. Nothing is drawn, so its state tells.
        known = (self._generator, torch.default_generator)
        return any(torch.equal(generator.get_state(), g.get_state()) for g in known)

    def _refusal(self, function: Any) -> _CannotBeCutError:
        self.refused = True
        return _CannotBeCutError(f"{function} can't be done to tiles")
