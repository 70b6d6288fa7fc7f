"""Compare a checkpoint with the run that a config describes, and with the config's own rules.

`uni3d.resume_rules` compares. The script is unknown here, and may have an optimizer, parameter groups or a
scheduler of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckpt import Checkpoint
from ckpt.format import Json
from ckpt.read import WEIGHT_STATES
from parallel.combinations import combination_refusal
from parallel.degrees import resolve_degrees
from uni3d.config import Config, batch_triad
from uni3d.config.data import epoch_length
from uni3d.config.scheduler import describe_schedule
from uni3d.config.settings import parallel_settings
from uni3d.manifest import SAMPLE_ORDER, RunManifest, is_extra
from uni3d.resume_rules import Comparison, Given, GivenOptimizer, GivenScheduler, compare, missing_arrays

_PEAKS = ("warmup_max_lr", "cycle_max_lr", "lr_range_test_min_lr")
"""Parameters of a schedule that set the base learning rate."""


def judged(manifest: RunManifest, config: Config | None, checkpoint: Checkpoint) -> Comparison:
    """Return the reasons why a run would refuse a checkpoint, and the changes that it would report.

    Without a config, only the refusals of every run are known.
    """
    given = given_by(config, manifest)
    refusals, changes = compare(manifest, given)
    states = {key.state for key in checkpoint.arrays if not is_extra(key.state)} - {*WEIGHT_STATES}
    scalars = manifest.optimizer is not None and any(manifest.optimizer.scalars.values())
    refusals += missing_arrays(manifest, given, any_states=bool(states) or scalars)
    if config is None:
        return Comparison(refusals, [])
    return Comparison([*_refused_configs(config, manifest), *refusals], changes)


def given_by(config: Config | None, saved: RunManifest) -> Given:
    """Return the run that a config describes, completed from the checkpoint."""
    if config is None:
        return Given(whose="the config", optimizer=GivenOptimizer(), scheduler=None)
    optimizer = GivenOptimizer()
    if config.optimizer is not None:
        mine = config.optimizer.implementation.rpartition(".")[2]  # name of its class
        # Each of Muon's groups has its own hyperparameters.
        shared = {} if mine == "MuonWithAdam" else config.optimizer.hyperparameters
        optimizer = GivenOptimizer(type=mine, hyperparameters=shared)
    fp16 = config.fp16 if config.precision == "fp16" else None
    return Given(
        whose="the config",
        optimizer=optimizer,
        scheduler=_scheduler(config, saved.scheduler or {}),
        order={
            "seed": config.seed,
            "train_batch_size": config.train_batch_size,
            "sample_order": SAMPLE_ORDER,
        },
        epoch_length=_epoch_length(config, saved),
        accepted=config.checkpoint.accept_changes,
        loss_scale=None if fp16 is None else fp16.loss_scale or 2.0**fp16.initial_scale_power,
    )


def _epoch_length(config: Config, saved: RunManifest) -> int | None:
    """Return the samples of an epoch of the checkpoint's data by this config; None if not known."""
    samples, batch, drops = saved.engine.dataset_length, config.train_batch_size, config.dataloader_drop_last
    if not samples or (batch is None and drops):
        return None
    return epoch_length(samples, batch or samples, drop_last=drops and samples >= (batch or samples))


def _scheduler(config: Config, saved: Json) -> GivenScheduler | None:
    """Return the config's scheduler, a `LambdaLR`. Other keys of its state are the checkpoint's."""
    if config.scheduler is None:
        return None
    params = config.scheduler.params
    peak = next((getattr(params, name) for name in _PEAKS if hasattr(params, name)), None)
    if peak is None and config.optimizer is not None:
        peak = config.optimizer.hyperparameters.get("lr")
    rates = saved.get("base_lrs", [])
    given = list(peak) if isinstance(peak, tuple) else [peak] * len(rates)
    changed = peak is not None and peak not in rates  # groups may have rates of their own
    return GivenScheduler(
        type=config.scheduler.type,
        keys={*saved, "lr_lambdas"},
        state={"base_lrs": given if changed else rates} if rates else {},
        schedule=describe_schedule(config.scheduler),
    )


def _refused_configs(config: Config, manifest: RunManifest) -> Iterator[str]:
    """Yield the reasons why the config is refused, by itself or with this model."""
    if (why := combination_refusal(parallel_settings(config))) is not None:
        yield why
    if "num_stages" in manifest.model.declared and "balance" in config.parallel.model_fields_set:
        yield "parallel.balance is in the config, but a PipelineModule is cut by its partition_method"


def notes(config: Config | None, manifest: RunManifest, *, in_place: bool) -> Iterator[str]:
    """Yield notes about settings that can't be checked here and that the script must repeat."""
    saved = manifest.optimizer
    groups = 0 if saved is None else len(saved.groups)
    muon = config is not None and config.optimizer is not None and config.optimizer.type == "Muon"
    if config is not None and config.optimizer is None and saved is not None:
        yield f"the config names no optimizer: the script must pass {saved.type or 'one of its class'}"
    if groups > 1 and not muon:
        yield f"the optimizer has {groups} parameter groups: the script must create the same"
    if manifest.writer.imported and saved is not None and not in_place:
        yield (
            "the checkpoint was imported: its parameter groups and tied weights are those that the import "
            "found; the import's own output says which of them were guesses"
        )
    stages = manifest.model.declared.get("num_stages")
    if stages is not None:
        yield f"the script's PipelineModule has num_stages={stages}: set it to the pp that you choose"


def as_it_is(config: Config, world: int) -> tuple[dict[str, int] | None, str | None]:
    """Return the degrees and batch sizes of an unchanged config on `world` ranks, or why it refuses them."""
    p = config.parallel
    try:
        degrees = resolve_degrees(world, pp=p.pp, dp=p.dp, tp=p.tp)
        triad = batch_triad(config, degrees.dp)
    except ValueError as error:
        return None, str(error)
    return {**vars(degrees), **triad.model_dump()}, None
