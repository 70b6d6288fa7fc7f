"""`initialize` and the other functions of `deepspeed` itself."""

from __future__ import annotations

import argparse
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

import parallel
from uni3d.config import load_config
from uni3d.deepspeed.engines import register
from uni3d.engine.build import initialize as build_engine
from uni3d.pipe import PipelineModule

PORT = 29500
"""DeepSpeed's default of `distributed_port`."""
_tensor_parallel: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """Collective: return `uni3d.initialize`'s engine, optimizer, data loader and scheduler.

    The functions of `uni3d.deepspeed` that take a parameter know the engine by it.

    Raises:
        ValueError: an argument doesn't fit, or one that isn't supported, with what to use instead.
    """
    if mpu is not None:
        raise ValueError('initialize: mpu isn\'t supported; set the degrees in the config: "parallel": {"tp": 2}')
    if mesh_param is not None:
        raise ValueError("initialize: mesh_param isn't supported; set the config's section parallel")
    if distributed_port != PORT:
        raise ValueError("initialize: distributed_port isn't supported; torchrun sets the port (--master-port)")
    if dist_init_required is False and not torch.distributed.is_initialized():
        raise ValueError("initialize: dist_init_required is False, but there is no process group")
    tp = None if model is None else _tensor_parallel.get(model)
    given = config if config is not None else config_params
    given = getattr(args, "deepspeed_config", None) if given is None else given
    if tp is not None and given is not None and (found := load_config(given).parallel.tp) not in (tp, "auto"):
        raise ValueError(
            f"tp_model_init was called with tp_size {tp}, but the config has parallel.tp {found}; set both alike"
        )
    results = build_engine(
        args=args,
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        collate_fn=collate_fn,
        config=config,
        config_params=config_params,
    )
    register(results[0], is_pipeline=isinstance(model, PipelineModule))
    return results


def tp_model_init(model: nn.Module, tp_size: int, dtype: Any = None, config: Any = None, **given: Any) -> nn.Module:
    """Return the model as it is; `initialize` splits it by its `tp_plan` and checks the config's degree.

    The type of computation is the config's, whatever `dtype` says.

    Raises:
        ValueError: a `tp_group`, for which the config's degrees stand.
    """
    for key, value in given.items():
        if value is not None:
            raise ValueError(f'tp_model_init: {key} isn\'t supported; set "parallel": {{"tp": {tp_size}}}')
    _tensor_parallel[model] = tp_size
    return model


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--deepspeed`, which has no effect, and `--deepspeed_config FILE.json`, read by `initialize`."""
    group = parser.add_argument_group("DeepSpeed")
    group.add_argument("--deepspeed", action="store_true", help="accepted for launchers; always on")
    group.add_argument("--deepspeed_config", help="JSON file of the config")
    return parser


def init_distributed(dist_backend: str | None = None, *, timeout: timedelta | None = None, **given: Any) -> None:
    """Start the process group unless it exists, from torchrun's environment or else with one process.

    `initialize` does so too. The backend is NCCL on GPUs and gloo on CPUs;
    `timeout` is that of collectives.

    Raises:
        ValueError: an unknown backend, or an argument that would change the group.
    """
    if dist_backend not in (None, "nccl", "gloo"):
        raise ValueError(f"dist_backend is {dist_backend!r}; expected 'nccl', 'gloo' or None")
    harmless = {"auto_mpi_discovery", "verbose", "dist_init_required"}
    defaults = {"distributed_port": PORT, "init_method": None, "config": None, "rank": -1, "world_size": -1}
    unlike = {k for k, v in given.items() if k not in harmless and (k not in defaults or v != defaults[k])}
    if unlike:
        raise ValueError(
            f"init_distributed doesn't support {', '.join(sorted(unlike))}; start the processes with torchrun"
        )
    cuda = torch.cuda.is_available() and dist_backend != "gloo"
    if dist_backend == "nccl" and not cuda:
        raise ValueError("dist_backend is 'nccl', but there is no GPU; leave it out")
    parallel.start_process_group("cuda" if cuda else "cpu", timeout)
