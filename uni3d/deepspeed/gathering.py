"""`deepspeed.zero`: models built for ZeRO-3, and parameters gathered for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.gathered import WholeParameter, as_bytes, from_bytes, gathered
from uni3d.deepspeed.devices import get_accelerator
from uni3d.deepspeed.engines import ZeroParamStatus, engine_of, name_of
from uni3d.deepspeed.training import init_distributed

_REFUSED = {
    "data_parallel_group": 'set the degrees in the config, "parallel": {"dp": ...}',
    "sequence_data_parallel_group": 'set the degrees in the config, "parallel": {"dp": ...}',
    "zero_param_parallel_group": "set zero_optimization.zero_hpz_partition_size in the config",
    "mpu": 'set the degrees in the config, "parallel": {"tp": ...}',
    "zero_quantized_weights": "weights are gathered in the type of computation, not quantized",
    "zero_quantized_nontrainable_weights": "weights are gathered in the type of computation, not quantized",
    "param_swapper": "parameters stay in memory; offload_param with device cpu is supported",
}


class Init:
    """Context in which a model is built; nothing is sharded before `initialize`.

    Parameters are drawn as outside of it, in host memory, whole on each rank; `initialize` then takes rank
    0's values and keeps this rank's part of them. A model that is too large for a host is built on the meta
    device instead, with an `init_parameter`. The process group is started, as in DeepSpeed.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        *unsupported: Any,
        remote_device: str | None = None,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mem_efficient_linear: bool = True,
        pin_memory: bool = False,
        tensor_overrides: Any = None,
        **given: Any,
    ) -> None:
        """Take DeepSpeed's arguments.

        Args:
            module: a model that is built already, which stays as it is.
            remote_device: "cpu" or "none"; `initialize` decides where parameters live.
            config_dict_or_path, config, mem_efficient_linear, pin_memory, tensor_overrides: accepted, as
                nothing is sharded, moved or replaced here; the config that counts is that of `initialize`.
            enabled: false for a context without effect.
            dtype: type of the floating-point tensors made inside; the engine makes fp32 masters of them.

        Raises:
            ValueError: an argument that would change something, with what to use instead.
        """
        if unsupported:
            raise ValueError("zero.Init takes its arguments by name, all but module")
        for key, value in given.items():
            if key not in _REFUSED:
                raise TypeError(f"zero.Init has no argument {key!r}")
            if value:
                raise ValueError(f"zero.Init: {key} isn't supported: {_REFUSED[key]}")
        if remote_device not in (None, "none", "cpu"):
            raise ValueError(
                f"zero.Init: remote_device is {remote_device!r}; expected 'cpu', 'none' or None (nothing is "
                "kept on NVMe)"
            )
        if enabled:
            init_distributed()
        self.enabled = enabled
        self._dtype = dtype if enabled else None
        self._before: list[torch.dtype] = []

    def __enter__(self) -> None:
        self._before.append(torch.get_default_dtype())
        if self._dtype is not None:
            torch.set_default_dtype(self._dtype)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_default_dtype(self._before.pop())


class MiCS_Init(Init):  # noqa: N801 (DeepSpeed's name)
    """The same as `Init`: the config's `mics_shard_size` sets the shard group."""


class GatheredParameters:
    """Context inside which parameters are whole, plain and writable, at any ZeRO stage. Collective.

    Between two steps alone. With `modifier_rank`, what that rank wrote counts, on all ranks; without it all
    ranks must write the same, and it is an error if sharded parameters differ at the end. Parameters are fp32
    where they are sharded (stage 3, offload), else of the type of computation. Contexts may be nested. Before
    `initialize`, parameters are whole anyway, and `modifier_rank`'s values are broadcast.
    """

    def __init__(
        self,
        params: Tensor | Iterable[Tensor],
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        """Take one parameter or several; what isn't a tensor is left alone, and so is `fwd_module`."""
        given = [params] if isinstance(params, Tensor) else list(params)
        self._parameters = (
            list({id(p): p for p in given if isinstance(p, Tensor)}.values()) if enabled else []
        )
        self._source = modifier_rank
        self._contexts: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            engines: dict[int, tuple[Any, list[Any]]] = {}
            before: list[Tensor] = []
            for parameter in self._parameters:
                engine = engine_of(parameter)
                engines.setdefault(id(engine), (engine, []))[1].append(parameter)
            for engine, parameters in engines.values():
                if engine is None:
                    before += parameters
                else:
                    stack.enter_context(_whole(engine, parameters, self._source))
            if before and self._source is not None:
                stack.push(_Broadcast(before, self._source))
            self._contexts.append(stack.pop_all())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._contexts.pop().__exit__(kind, error, trace)


@contextmanager
def _whole(engine: Any, parameters: list[nn.Parameter], source: int | None) -> Iterator[None]:
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    if not sharded and source is None:
        yield  # shown whole at ZeRO 0 to 2, or gathered by a context outside
        return
    if not any(isinstance(p, WholeParameter) for p in parameters):
        engine._micro.check_none("GatheredParameters")
        engine._settle()
    engine.model.zero.carry_writes()
    named = [(name_of(engine, p), p) for p in parameters]
    alike = engine.zero_optimization_stage() == 3
    with gathered(engine.module, engine.model.topology, named, source, run_alike=alike):
        _mark(sharded, ZeroParamStatus.AVAILABLE)
        try:
            yield
        finally:
            _mark(sharded, ZeroParamStatus.NOT_AVAILABLE)


def _mark(parameters: Iterable[Any], status: ZeroParamStatus) -> None:
    for parameter in parameters:
        if hasattr(parameter, "ds_status"):
            parameter.ds_status = status


class _Broadcast:
    """Gives all ranks one rank's values of parameters that no engine has sharded yet."""

    def __init__(self, parameters: list[Tensor], source: int) -> None:
        self._parameters, self._source = parameters, source

    def __call__(self, kind: Any, *_: Any) -> bool:
        if kind is None and dist.is_initialized() and dist.get_world_size() > 1:
            device = torch.device(get_accelerator().current_device_name())
            for parameter in (p for p in self._parameters if not p.is_meta):
                value = as_bytes(parameter, device)
                dist.broadcast(value, src=self._source)
                from_bytes(parameter, value)
        return False


def register_external_parameter(module: nn.Module, parameter: Any) -> None:
    """Do nothing: a layer is gathered with all its parts, so a part may use another part's parameters.

    At ZeRO-3 a layer that uses a parameter outside of it, without sharing it, meets a sharded tensor, and
    torch raises; stages 0 to 2 take any use.
    """


def unregister_external_parameter(module: nn.Module, parameter: Any) -> None:
    """Do nothing, as `register_external_parameter`."""
