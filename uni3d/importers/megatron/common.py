"""Megatron's `common.pt`: everything that isn't split among the ranks.

    args                 the command line: degrees, samples consumed
    iteration            number of steps
    optimizer            hyperparameters of the groups, number of steps, fp16's loss scale
    opt_param_scheduler  the LR schedule

The parameters of each group aren't stored. By default Megatron makes two groups: biases and other
one-dimensional parameters, without weight decay, and the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckpt import CheckpointError
from uni3d.importers.dcp.optimizer import kind_of
from uni3d.importers.pickles import StandIn, plain, plain_entries
from uni3d.importers.source import OptimizerState, Options, Source
from uni3d.importers.torch_files import load
from uni3d.importers.torch_tensors import item
from uni3d.resume_rules import IMPLEMENTATION_KEYS

COMMON = "common.pt"
_HYPERPARAMETERS = (
    *("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay"),
    *("momentum", "dampening", "nesterov"),
)
"""Hyperparameters of torch's optimizers; the rest of a group is Megatron's own."""
_DEGREES = (
    *("world_size", "data_parallel_size", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("context_parallel_size", "expert_model_parallel_size"),
)
_TAKEN = ("args", "iteration", "optimizer", "checkpoint_version", "content_metadata")
_RULE = (
    "optimizer.param_groups: their parameters aren't stored; by Megatron's default, biases and other "
    "one-dimensional parameters are assigned to the group without weight decay"
)


@dataclass(frozen=True, kw_only=True)
class Common:
    """Content of the file."""

    where: str
    source: Source
    """The checkpoint without its tensors and its optimizer."""
    groups: list[dict[str, Any]]
    """Parameter groups, in Megatron's form."""
    optimizer_steps: set[float]
    """Numbers of steps found in the optimizer; more than one is a contradiction."""
    arguments: Mapping[str, Any]
    sharding: str | None
    """Name of the distributed optimizer's format."""
    no_groups: str | None = None
    """Reason why the groups' parameters can't be derived; None if they can."""
    of_groups: list[str] = field(default_factory=list)
    """Lines about the groups, for the user."""

    def optimizer(self, trained: Mapping[str, tuple[int, ...]], states: set[str]) -> OptimizerState:
        """Return the optimizer's state except its arrays.

        `trained` has the shapes of the trained parameters by name; `states` are the names of their states.

        Raises:
            CheckpointError: the number of steps is missing or contradictory.
        """
        adam = "exp_avg" in states
        if adam and len(self.optimizer_steps) != 1:
            found = ", ".join(map(str, sorted(self.optimizer_steps))) or "none"
            raise CheckpointError(f"{self.where} should have one number of optimizer steps; found {found}")
        step = {"step": next(iter(self.optimizer_steps))} if adam else {}
        groups = [
            {
                "params": [n for n, shape in trained.items() if self._index(n, shape) == i],
                **{key: plain(item(group[key])) for key in _HYPERPARAMETERS if key in group},
            }
            for i, group in enumerate(self.groups)
        ]
        kind = kind_of(groups)
        if kind is None and adam and self.arguments.get("optimizer") == "adam":
            kind = "AdamW" if self.arguments.get("decoupled_weight_decay", True) else "Adam"
        return OptimizerState(type=kind, groups=groups, scalars={name: dict(step) for name in trained})

    def _index(self, name: str, shape: tuple[int, ...]) -> int:
        """Return the index of the parameter's group."""
        if len(self.groups) == 1:
            return 0
        spared = len(shape) == 1 or name.endswith(".bias")
        if self.arguments.get("apply_wd_to_qk_layernorm"):
            spared = spared and not any(f"{each}_layernorm." in name for each in "qk")
        return next(i for i, group in enumerate(self.groups) if (_decay(group) == 0) == spared)


def read_common(path: Path, options: Options, ranks_own: Mapping[str, Any] | None = None) -> Common:
    """Read the file; `ranks_own` is the optimizer's part of it where each rank has its own."""
    file = path / COMMON
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; Megatron always writes it")
    content = load(file, options)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, expected a dict")
    args = content.get("args")
    arguments = args.state if isinstance(args, StandIn) and isinstance(args.state, Mapping) else {}
    optimizer = content.get("optimizer")
    optimizer = {**(optimizer if isinstance(optimizer, Mapping) else {}), **(ranks_own or {})}
    inner = optimizer.get("optimizer", optimizer)
    groups = list(inner.get("param_groups", ())) if isinstance(inner, Mapping) else []
    no_groups, of_groups = _check_groups(optimizer, groups)
    client_state, left_out = _rest(content)
    content_metadata = content.get("content_metadata")
    sharding = optimizer.get("param_state_sharding_type")
    if sharding is None and isinstance(content_metadata, Mapping):
        sharding = content_metadata.get("distrib_optim_sharding_type")
    return Common(
        where=str(file),
        source=Source(
            kind="megatron",
            where=str(path),
            arrays=[],
            step=int(item(content.get("iteration", 0))),
            samples=int(arguments.get("consumed_train_samples") or 0),
            batch=arguments.get("global_batch_size"),
            loss_scale=_loss_scale(optimizer.get("grad_scaler")),
            writer={key: arguments[key] for key in _DEGREES if isinstance(arguments.get(key), int)},
            client_state=client_state,
            left_out=left_out,
        ),
        groups=groups,
        optimizer_steps=_optimizer_steps(inner, groups),
        arguments=arguments,
        sharding=sharding,
        no_groups=no_groups,
        of_groups=of_groups,
    )


def _check_groups(optimizer: Mapping[Any, Any], groups: list[dict[str, Any]]) -> tuple[str | None, list[str]]:
    """Return why the groups' parameters can't be derived, or None; and lines on them."""
    if not groups:
        several = any(isinstance(key, int) for key in optimizer)
        what = "chained optimizers" if several else "no parameter groups"
        return f"common.pt has {what}, so the parameters' hyperparameters are unknown", []
    if any(group.get("is_expert_parallel") for group in groups):
        return "the optimizer has parameter groups of experts, which aren't supported", []
    if any(group.get("bias_correction") is False for group in groups):
        return "the optimizer is Adam without bias correction, which torch doesn't have", []
    own = sorted({k for group in groups for k in group} - {*_HYPERPARAMETERS, *IMPLEMENTATION_KEYS, "step"})
    notes = [f"optimizer.param_groups: {', '.join(own)}: Megatron's own"] if own else []
    if len(groups) == 1:
        return None, notes
    rates = [[group.get(k) for k in ("lr_mult", "is_decoupled_lr", "max_lr", "min_lr")] for group in groups]
    decays = [_decay(group) for group in groups]
    if len(groups) > 2 or rates[0] != rates[1] or None in decays or (decays[0] == 0) == (decays[1] == 0):
        return (
            f"the optimizer has {len(groups)} parameter groups that aren't Megatron's default ones (with and "
            "without weight decay), and their parameters aren't stored"
        ), []
    return None, [*notes, _RULE]


def _decay(group: Mapping[str, Any]) -> Any:
    """Return the factor on a group's weight decay."""
    return group.get("wd_mult", group.get("pre_wd_mult"))


def _optimizer_steps(inner: Any, groups: list[dict[str, Any]]) -> set[float]:
    """Return the numbers of steps, stored once for all groups or in each group."""
    state = inner.get("state") if isinstance(inner, Mapping) else None
    found = [group.get("step") for group in groups]
    if isinstance(state, Mapping):
        found.append(state.get("common_step"))
    return {float(item(step)) for step in found if step is not None}


def _loss_scale(scaler: Any) -> dict[str, Any] | None:
    if not isinstance(scaler, Mapping) or "growth_tracker" not in scaler:
        return None
    return {
        "scale": float(item(scaler["scale"])),
        "terms": None,
        # Megatron at 0 lowers the scale at each overflow, like uni3d at 1.
        "hysteresis": max(1, int(scaler["hysteresis_tracker"])),
        "good_steps": int(scaler["growth_tracker"]),
    }


def _rest(content: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the client state, and a line for everything left out of it."""
    left_out: list[str] = []
    rest = {key: value for key, value in content.items() if key not in _TAKEN}
    client_state = plain_entries(rest, "", left_out)
    if "args" in content:
        left_out.append("args: Megatron's command line, except its degrees and counters")
    if "opt_param_scheduler" in client_state:
        left_out.append(
            "opt_param_scheduler: Megatron's LR schedule, stored only in the client state; the next step "
            "uses the learning rate of the optimizer's groups"
        )
    return client_state, left_out
