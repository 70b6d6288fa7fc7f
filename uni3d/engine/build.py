"""`initialize`: from a model and a config to an engine, with DeepSpeed's arguments and results."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn
from torch.utils.data import Dataset

import parallel
from parallel.parameter_hooks import tensors_in
from parallel.weights import make_masters
from uni3d.checkpoint.model_spec import declared
from uni3d.config import BatchTriad, Config, load_config
from uni3d.config.data import epoch_length
from uni3d.config.deepspeed_keys import by_reason
from uni3d.engine.arguments import check_data, check_model, refuse_copies
from uni3d.engine.data_loader import TrainingLoader
from uni3d.engine.deepspeed_arguments import (
    FurtherArguments,
    Given,
    check_further,
    decoded,
    with_degrees,
)
from uni3d.engine.engine import Engine
from uni3d.engine.given_loader import GivenLoader, data_as_used
from uni3d.engine.ranks import joined
from uni3d.engine.start import Start
from uni3d.optim.loss_scale import LossScale
from uni3d.optim.optimizers import check_works_sharded, make_optimizer, split_groups
from uni3d.optim.schedule_classes import make_scheduler
from uni3d.pipe import PipelineModule
from uni3d.state import PARAMETER
from uni3d.train_state import Progress, TrainState

Scheduler = torch.optim.lr_scheduler.LRScheduler
Groups = list[dict[str, Any]]
_log = logging.getLogger(__name__)


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[[Groups], torch.optim.Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | Iterable[Any] | None = None,
    lr_scheduler: Scheduler | Callable[[torch.optim.Optimizer], Scheduler] | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    config_params: str | Path | Mapping[str, Any] | None = None,
    *,
    resume: str | Path | None = None,
    weights: str | Path | None = None,
    **further: Unpack[FurtherArguments],
) -> tuple[Engine, torch.optim.Optimizer | None, TrainingLoader | GivenLoader | None, Scheduler | None]:
    """Collective: build the engine that trains `model` by `config`, on all processes of the job.

    The process group is started if there is none; without torchrun it has one process.

    Args:
        args: an object whose `deepspeed_config` is the config's path, if `config` isn't given.
        model: the same on every rank, on the CPU, or on the meta device with an `init_parameter`, `resume` or
            `weights`. It is used up: `engine.module` is this rank's part of it. See `parallel.build`.
        optimizer, lr_scheduler: over the model's parameters, without state, and over that optimizer; or
            functions of the parameter groups and the optimizer. They take precedence over the config's.
        model_parameters: tensors of the model, or dicts of groups; by default all that require a gradient.
        training_data, collate_fn: a map-style dataset of `(inputs, targets)`; or an IterableDataset, a
            DataLoader or a loader with a state, of this rank's own samples (`uni3d.engine.given_loader`).
        config, config_params: the path of a JSON file, or its content; the second is DeepSpeed's old name.
        resume: a run's folder or URL, as for `engine.resume`; weights that it has aren't drawn first.
        weights: a safetensors file, or a folder of them, of the whole model; unread if `resume` loads.
        further: others of DeepSpeed's, see `FurtherArguments`.

    Returns the engine, its optimizer, the data loader (None without `training_data`) and the scheduler.

    Raises:
        ValueError: an argument or the config doesn't fit; the same on all ranks, before any work is done.
        ckpt.CheckpointError: `resume` or `weights` can't be loaded; the same on all ranks.
        parallel.RankFailedError: another rank failed, was lost or didn't come; names it.
    """
    model, data = check_model(model), check_data(training_data)
    settings = _settings(_one_config(args, config, config_params), model, further)
    with joined(settings, further.get("mpu")) as (topology, asked):
        data = data_as_used(data, settings, asked.triad, topology, collate_fn)
        _announce(settings, model, topology)
        _make_masters(model, settings, topology)
        groups = _named_groups(settings, model, optimizer, model_parameters)
        spec = declared(model)  # before it is used up
        start = Start(topology.host, model, resume, weights)
        built = start.build(model, topology, asked.split)
        inner = _make_optimizer(settings, optimizer, groups, built)
        scheduler = _make_scheduler(settings, lr_scheduler, inner)
        if lr_scheduler is not None:  # it takes the place of the config's
            settings = settings.model_copy(update={"scheduler": None})
        state = _train_state(settings, asked.triad, built, inner, scheduler, data)
        make = partial(Engine, config=settings, triad=asked.triad, state=state, model_spec=spec)
        engine = make(training_data=data, collate_fn=collate_fn)
        _load(engine, start.run)
        refuse_copies(engine, engine.module)
    return engine, inner, engine.training_dataloader, scheduler


def _load(engine: Engine, run: str | Path | None) -> None:
    """Load the run's newest checkpoint, if there is a run; all parameters of the engine are NaN then."""
    if run is None:
        return
    engine.load_checkpoint(run)
    assert engine.last_load is not None, "it was loaded"
    restored = {*engine.last_load.restored}
    names = [engine.model.first_name(name) for name, _ in engine.module.named_parameters()]
    assert restored.issuperset(f"{name}/{PARAMETER}" for name in names), "the load is strict"


def _settings(config: Given, model: nn.Module, further: FurtherArguments) -> Config:
    """Return the config together with what else says how the run is laid out."""
    check_further(further)
    topology = model.topology if isinstance(model, PipelineModule) else None
    return _with_pipeline_options(with_degrees(load_config(decoded(config)), further, topology), model)


def _announce(settings: Config, model: nn.Module, topology: parallel.Topology) -> None:
    """Print one line before the model is built, which takes a while; `steps_per_print` null prints none.

    Keys of the config without effect are a warning.
    """
    _warn_without_effect(settings, topology)
    if settings.steps_per_print is None or topology.rank != 0:
        return
    degrees = topology.degrees
    ranks = parallel.Ranks(pp=degrees.pp, dp=degrees.dp, tp=degrees.tp, zero=settings.zero_optimization.stage)
    size = sum(p.numel() for p in model.parameters())
    print(
        f"uni3d: building {type(model).__name__}, {size:,} parameters, on {ranks.text}, {settings.precision}",
        file=sys.stderr,
        flush=True,
    )


def _train_state(
    settings: Config,
    triad: BatchTriad,
    model: parallel.ParallelModel,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Scheduler | None,
    training_data: Any,
) -> TrainState:
    given = training_data if isinstance(training_data, GivenLoader) else None
    length = 0 if training_data is None or given is not None else len(training_data)
    used = epoch_length(length, triad.train_batch, drop_last=settings.dataloader_drop_last)
    return TrainState(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        scaler=LossScale(settings.fp16) if settings.precision == "fp16" else None,
        progress=Progress(train_batch=triad.train_batch, dataset_length=length, epoch_length=used),
        data=given,
        settings=settings.checkpoint,
        seed=settings.seed,
        schedule=settings.scheduler,
    )


def _warn_without_effect(config: Config, topology: parallel.Topology) -> None:
    """Warn once of DeepSpeed's keys that are accepted but change nothing."""
    if config.without_meaning and topology.rank == 0:
        grouped = by_reason(config.without_meaning)
        reasons = "; ".join(f"{', '.join(keys)} ({reason})" for reason, keys in grouped.items())
        warnings.warn(f"keys of the config that have no effect: {reasons}", stacklevel=4)


def _make_masters(model: nn.Module, settings: Config, topology: parallel.Topology) -> None:
    if (changed := make_masters(model)) and topology.rank == 0:
        _log.warning(
            "%d parameters (%s, ...) are in bf16 or fp16: training keeps fp32 master weights and computes in "
            "%s, the config's precision",
            len(changed),
            changed[0],
            settings.precision,
        )


def _one_config(args: Any, *given: Given | None) -> Given:
    """Return the config, from whichever argument has it."""
    from_args = getattr(args, "deepspeed_config", None)
    configs = [c for c in (*given, from_args) if c is not None]
    if len(configs) != 1:
        raise ValueError(
            "give the config once, as config, config_params or args.deepspeed_config; "
            f"got it {len(configs)} times"
        )
    config: Given = configs[0]
    return config


def _with_pipeline_options(settings: Config, model: nn.Module) -> Config:
    """Return the config with the run options of a `PipelineModule`, where DeepSpeed's scripts set them."""
    if not isinstance(model, PipelineModule):
        return settings
    p, again = settings.parallel, settings.activation_checkpointing
    if "balance" in p.model_fields_set:
        raise ValueError(
            f"parallel.balance is {p.balance!r}, but a PipelineModule is cut by its own partition_method; "
            "leave parallel.balance out"
        )
    if model.num_stages is not None:
        if "pp" in p.model_fields_set and p.pp not in (model.num_stages, "auto"):
            raise ValueError(
                f"the PipelineModule has num_stages {model.num_stages}, but the config has parallel.pp "
                f"{p.pp}; set only one of them"
            )
        p = p.model_copy(update={"pp": model.num_stages})
    if model.activation_checkpoint_interval and again.mode == "none":
        again = again.model_copy(update={"mode": "full"})
    return settings.model_copy(update={"parallel": p, "activation_checkpointing": again})


def _named_groups(
    settings: Config, model: nn.Module, optimizer: Any, model_parameters: Iterable[Any] | None
) -> Groups:
    """Return parameter groups of names instead of tensors: sharding replaces the tensors, the names stay."""
    names = {id(p): name for name, p in model.named_parameters()}
    if isinstance(optimizer, torch.optim.Optimizer):
        check_works_sharded(optimizer)
        if optimizer.state:
            raise ValueError(
                f"the {type(optimizer).__name__} optimizer has states, but its parameters are yet to be "
                "sharded; pass it before its first step or, if its constructor makes states, pass a function "
                "of parameter groups"
            )
        given: list[Any] = optimizer.param_groups
    elif model_parameters is None:
        given = [p for p in model.parameters() if p.requires_grad]
    else:
        given = list(model_parameters)
    if not given:
        raise ValueError("there are no parameters to train: model_parameters is empty, or all are frozen")
    groups: Groups = [{**g} for g in given] if isinstance(given[0], dict) else [{"params": given}]
    for group in groups:
        params = group["params"]  # one tensor, or any iterable, as torch's optimizers take them
        group["params"] = [params] if isinstance(params, torch.Tensor) else list(params)
        if unknown := sum(id(p) not in names for p in group["params"]):
            raise ValueError(f"model_parameters has {unknown} tensors that are not parameters of the model")
    groups = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in groups]
    if optimizer is None and settings.optimizer is not None:
        return split_groups(settings.optimizer, model, groups)
    return groups


def _make_optimizer(
    settings: Config, given: Any, groups: Groups, built: parallel.ParallelModel
) -> torch.optim.Optimizer | None:
    """Return the optimizer over this rank's parts of the parameters; groups without any stay, empty."""
    here: dict[str, list[nn.Parameter]] = {}  # several if two stages on this rank share a weight
    for name, parameter in built.module.named_parameters():
        here.setdefault(built.first_name(name), []).append(parameter)
    local = [{**g, "params": [p for name in g["params"] for p in here.get(name, [])]} for g in groups]
    if isinstance(given, torch.optim.Optimizer):
        before = {id(parameter) for group in given.param_groups for parameter in group["params"]}
        for group, replacement in zip(given.param_groups, local, strict=True):
            group["params"] = replacement["params"]
        _check_kept_by_optimizer(given, before - {id(p) for group in local for p in group["params"]})
        return given
    if given is not None:
        made: torch.optim.Optimizer = given(local)
        check_works_sharded(made)
        return made
    return None if settings.optimizer is None else make_optimizer(settings.optimizer, local)


def _check_kept_by_optimizer(optimizer: torch.optim.Optimizer, replaced: set[int]) -> None:
    """Refuse an optimizer that keeps parameters besides its groups, given the ids of the replaced ones.

    It would step those, which nobody trains any more.

    Raises:
        ValueError: it does; names the attribute.
    """
    for attribute, value in vars(optimizer).items():
        if attribute != "param_groups" and any(id(tensor) in replaced for tensor in tensors_in(value)):
            kind = type(optimizer).__name__
            raise ValueError(
                f"{kind} also keeps parameters in .{attribute}, where sharding can't replace them; pass a "
                f"function of the parameter groups that makes it, such as lambda groups: {kind}(groups)"
            )


def _make_scheduler(
    settings: Config, given: Any, optimizer: torch.optim.Optimizer | None
) -> Scheduler | None:
    if given is None and settings.scheduler is None:
        return None
    if optimizer is None:
        raise ValueError("there is a scheduler but no optimizer; pass one or name one in the config")
    if given is None:
        assert settings.scheduler is not None, "checked above"
        return make_scheduler(settings.scheduler, optimizer)
    scheduler: Scheduler = given if isinstance(given, Scheduler) else given(optimizer)
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError(
            "ReduceLROnPlateau takes a metric at each step, and the engine steps the schedule without one: "
            "step it in your loop, over the optimizer that initialize returns"
        )
    if scheduler.optimizer is not optimizer:
        raise ValueError("lr_scheduler is over another optimizer; pass initialize() that optimizer too")
    return scheduler
