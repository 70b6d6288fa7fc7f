"""`initialize` and the other functions of `deepspeed` itself."""

from __future__ import annotations

import argparse
import sys
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

    The functions of `uni3d.deepspeed` that take a parameter know the engine by it. Its `save_checkpoint`
    returns when the checkpoint is complete, unless the config sets `checkpoint.async_save`.

    Raises:
        ValueError: an argument doesn't fit, or one that isn't supported, with what to use instead.
    """
    if config_params is not None:  # accelerate's way to give the config
        _check_accelerate()
    tp = None if model is None else _tensor_parallel.get(model)
    given = config if config is not None else config_params
    given = getattr(args, "deepspeed_config", None) if given is None else given
    if tp is not None and given is not None and (found := load_config(given).parallel.tp) not in (tp, "auto"):
        raise ValueError(
            f"tp_model_init was called with tp_size {tp}, but the config has parallel.tp {found}; make "
            "them equal"
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
        mpu=mpu,
        mesh_param=mesh_param,
        dist_init_required=dist_init_required,
        distributed_port=distributed_port,
    )
    engine = results[0]
    if "async_save" not in engine.config.checkpoint.model_fields_set:
        engine._saver.asynchronous = False  # such programs look into the folder as soon as it is saved
    register(engine, is_pipeline=isinstance(model, PipelineModule))
    return results


def _check_accelerate() -> None:
    """Check that an Accelerator with DeepSpeed, if there is one, counts all processes: it looks for GPUs.

    Raises:
        ValueError: it doesn't, so that all processes would get the same data.
    """
    accelerator: Any = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    shared = {} if accelerator is None else accelerator._shared_state
    if not shared.get("deepspeed_plugins") or not torch.distributed.is_initialized():
        return
    world_size = torch.distributed.get_world_size()
    if (counted := shared.get("num_processes", world_size)) != world_size:
        raise ValueError(
            f"accelerate counts {counted} of {world_size} processes; on CPUs, set TrainingArguments(use_cpu="
            "True), or call accelerate.PartialState(cpu=True) before the Accelerator is made"
        )


def tp_model_init(
    model: nn.Module, tp_size: int, dtype: Any = None, config: Any = None, **given: Any
) -> nn.Module:
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


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = PORT,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Start the process group unless it exists: by `init_method`, or else by torchrun's environment.

    `initialize` does the latter too. The backend is NCCL on GPUs and gloo on CPUs; `timeout` is that of
    collectives. MPI isn't asked, and the port is the launcher's.

    Raises:
        ValueError: an unknown backend, a `config` of the communication, a rank without an `init_method`, or
            `dist_init_required` is False, but there is no process group.
    """
    if dist_backend not in (None, "nccl", "gloo"):
        raise ValueError(f"dist_backend is {dist_backend!r}; expected 'nccl', 'gloo' or None")
    if dist_init_required is False and not torch.distributed.is_initialized():
        raise ValueError("init_distributed: dist_init_required is False, but there is no process group")
    if config is not None:
        raise ValueError(
            "init_distributed: config isn't supported; use torch.profiler, which records collectives"
        )
    if init_method is None and (rank, world_size) != (-1, -1):
        raise ValueError(
            f"init_distributed: rank {rank} and world_size {world_size} need an init_method, such as "
            "'tcp://localhost:29500'; without one the launcher sets them"
        )
    cuda = torch.cuda.is_available() and dist_backend != "gloo"
    if dist_backend == "nccl" and not cuda:
        raise ValueError("dist_backend is 'nccl', but there is no GPU; leave it out")
    if init_method is None or torch.distributed.is_initialized():
        parallel.start_process_group("cuda" if cuda else "cpu", timeout)
        return
    torch.distributed.init_process_group(
        "nccl" if cuda else "gloo", init_method=init_method, timeout=timeout, rank=rank, world_size=world_size
    )
