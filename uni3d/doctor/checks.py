"""What a config, and the manifest itself, say of a resume: what it would refuse, what it would warn of.

The checks are those of `uni3d.checkpoint.restore` and `uni3d.checkpoint.optimizer_groups`, as far as they can
be made without the script, which may give an optimizer, groups or a schedule of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckpt.read import WEIGHT_STATES
from parallel.combinations import combination_refusal
from parallel.degrees import resolve_degrees
from uni3d.config import Config, batch_triad
from uni3d.config.optimizer import OptimizerConfig
from uni3d.config.settings import parallel_settings

_STATES = {"amsgrad": "another moment", "momentum": "a momentum", "centered": "a mean gradient"}
"""Hyperparameters without which an optimizer lacks a state, and what that is."""

_PEAKS = ("warmup_max_lr", "cycle_max_lr", "lr_range_test_min_lr")
"""Parameters of a schedule that set the rate which its factors are of."""


def unfit(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Why no run could resume from a checkpoint, whatever its config."""
    engine, model = manifest.get("engine") or {}, manifest.get("model") or {}
    if missing := [key for key in ("global_steps", "global_samples") if key not in engine]:
        yield (
            f"the manifest has no {' and no '.join(missing)}: it holds weights, not a run; load them with "
            "load_module_only=True"
        )
    if "optimizer" not in manifest or manifest["optimizer"] is None:
        yield "it has no optimizer; load its weights with load_optimizer_states=False"
    if "scheduler" not in manifest and not missing:
        yield "the manifest doesn't say whether there was a scheduler"
    if left := model.get("left_out"):
        yield (
            f"{len(left)} frozen parameters were left out of it ({left[0]}, ...); load it with "
            "load_module_strict=False, into a model that has them"
        )


def refusals(config: Config, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Why an engine with this config would refuse the checkpoint."""
    if (why := combination_refusal(parallel_settings(config))) is not None:
        yield why
    saved = manifest.get("optimizer")
    if config.optimizer is not None and saved:
        mine = _class(config.optimizer)
        if saved["type"] != mine:
            yield f"the checkpoint's optimizer is {saved['type']}, but the config's is {mine}"
        else:
            yield from _other_states(config.optimizer, saved) if _has_states(manifest) else ()
    if config.scheduler is not None and "scheduler" in manifest:
        schedule = manifest["scheduler"]
        if schedule is None:
            yield f"the checkpoint has no scheduler, but the config has {config.scheduler.type}"
        elif "lr_lambdas" not in schedule:
            yield f"the checkpoint has another scheduler than the config's {config.scheduler.type}"
    declared = (manifest.get("model") or {}).get("declared") or {}
    if "num_stages" in declared and "balance" in config.parallel.model_fields_set:
        yield "parallel.balance is in the config, but a PipelineModule is cut by its partition_method"


def _other_states(config: OptimizerConfig, saved: Mapping[str, Any]) -> Iterator[str]:
    """Hyperparameters that change which states an optimizer has."""
    if saved["type"] == "MuonWithAdam":
        return
    for key, what in _STATES.items():
        values = [bool(group[key]) for group in saved["groups"] if key in group]
        given = config.hyperparameters.get(key)
        if values and given is not None and bool(given) not in values:
            has, lacks = ("config", "checkpoint") if given else ("checkpoint", "config")
            yield f"with its {key} the {has}'s optimizer has {what} that the {lacks}'s hasn't"


def _has_states(manifest: Mapping[str, Any]) -> bool:
    """Whether the optimizer had any; without, a load leaves it as it is made."""
    states = {path.rpartition("/")[2] for path in manifest["chunks"]}
    return bool(states - {*WEIGHT_STATES}) or any(manifest["optimizer"]["scalars"].values())


def warnings(config: Config, manifest: Mapping[str, Any]) -> Iterator[str]:
    """What an engine with this config would warn of, and go on with the checkpoint's value."""
    engine = manifest.get("engine") or {}
    if "seed" in engine and config.seed != engine["seed"]:
        yield (
            f"seed is {config.seed} in the config, {engine['seed']} in the checkpoint: samples change order, "
            "unless the script sets it"
        )
    total = engine.get("train_batch_size")
    if config.train_batch_size is not None and total is not None and config.train_batch_size != total:
        yield (
            f"train_batch_size is {config.train_batch_size} in the config, {total} in the checkpoint: "
            f"samples change order, unless you set it to {total}"
        )
    scale, fp16 = engine.get("loss_scale"), config.precision == "fp16"
    if scale is not None and not fp16:
        yield f"the loss scale ({scale['scale']:g}) isn't taken up: the config is of {config.precision}"
    if scale is None and fp16:
        yield "the checkpoint has no loss scale, as it isn't of fp16: it begins anew"
    yield from _schedule(config, manifest)
    yield from _hyperparameters(config, manifest.get("optimizer"))


def _schedule(config: Config, manifest: Mapping[str, Any]) -> Iterator[str]:
    saved = manifest.get("scheduler")
    if config.scheduler is None:
        if saved is not None:
            groups = (manifest.get("optimizer") or {}).get("groups", [])
            rates = ", ".join(f"{group['lr']:g}" for group in groups if "lr" in group)
            yield (
                "the config has no scheduler: unless the script makes the schedule, the learning rate stays "
                f"at {rates or 'what it is'}"
            )
        return
    rates = (saved or {}).get("base_lrs", [])
    peak = next(
        (getattr(config.scheduler.params, k) for k in _PEAKS if hasattr(config.scheduler.params, k)), None
    )
    if peak is None and config.optimizer is not None:
        peak = config.optimizer.hyperparameters.get("lr")
    if rates and peak is not None and peak not in rates:
        yield f"the schedule's base rate is {peak:g} in the config, {rates[0]:g} in the checkpoint: it stays"


def _hyperparameters(config: Config, saved: Mapping[str, Any] | None) -> Iterator[str]:
    """Those that no group has as the config gives them; groups may have their own."""
    if config.optimizer is None or not saved or saved["type"] != _class(config.optimizer):
        return
    if saved["type"] == "MuonWithAdam":  # its groups have each their own
        return
    for key, given in config.optimizer.hyperparameters.items():
        value = list(given) if isinstance(given, tuple) else given
        groups = [group for group in saved["groups"] if key in group]
        moves = any(f"initial_{key}" in group for group in groups)
        if groups and not moves and all(group[key] != value for group in groups):
            yield f"{key} is {value} in the config, {groups[0][key]} in the checkpoint, which stays"


def notes(config: Config | None, manifest: Mapping[str, Any]) -> Iterator[str]:
    """What can't be told from here, and the script must have as it was."""
    saved = manifest.get("optimizer") or {}
    groups = len(saved.get("groups", []))
    muon = config is not None and config.optimizer is not None and config.optimizer.type == "Muon"
    if config is not None and config.optimizer is None and saved:
        yield f"the config names no optimizer: the script's must be {saved['type']}"
    if groups > 1 and not muon:
        yield f"the optimizer has {groups} parameter groups: the script must make the same"
    if (manifest.get("writer") or {}).get("imported") and saved:
        yield (
            "it was imported: parameter groups and tied weights are those that the import found, which said "
            "where it had to guess"
        )
    stages = ((manifest.get("model") or {}).get("declared") or {}).get("num_stages")
    if stages is not None:
        yield f"the script's PipelineModule says num_stages={stages}: it must say the pp that you choose"


def as_it_is(config: Config, world: int) -> tuple[dict[str, int] | None, str | None]:
    """The degrees and batches that a config, unchanged, makes of so many ranks; or why it refuses them."""
    p = config.parallel
    try:
        degrees = resolve_degrees(world, pp=p.pp, dp=p.dp, tp=p.tp)
        triad = batch_triad(config, degrees.dp)
    except ValueError as error:
        return None, str(error)
    return {**vars(degrees), **triad.model_dump()}, None


def _class(config: OptimizerConfig) -> str:
    return config.implementation.rpartition(".")[2]
