"""Reader of DeepSpeed's checkpoints: ZeRO 0 to 3, pipeline stages, tensor-parallel ranks.

Modules:
    folders           the files of a checkpoint, and the ranks that wrote them
    model_files       buffers, frozen parameters and names, from the model files
    zero              fp32 masters and moments, out of ZeRO's flat partitions
    tensor_parallel   parts of tensor-parallel ranks joined into whole tensors
    optimizer_state   hyperparameters, schedule, counters and loss scale
    universal         DeepSpeed's universal format
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt import CheckpointError
from uni3d.config.forms import as_integer
from uni3d.importers.deepspeed import optimizer_state as deepspeed_state
from uni3d.importers.deepspeed.folders import RankFolder, checkpoint_folder
from uni3d.importers.deepspeed.model_files import buffer_names, buffers, numbered_parts, untrained
from uni3d.importers.deepspeed.tensor_parallel import Rule, Rules, join
from uni3d.importers.deepspeed.zero import ParameterPart, Parts, RankFiles, groups_of, parts
from uni3d.importers.source import BUFFER, ForeignArray, Options, Source
from uni3d.importers.torch_tensors import StoredTensor


def read_deepspeed(path: Path, options: Options) -> Source:
    """Read a checkpoint; `path` is its folder or that of its run."""
    folder = checkpoint_folder(path, options.tag)
    if folder is None:
        raise CheckpointError(f"{path} has no DeepSpeed checkpoint")
    ranks, left_out = RankFolder(folder, options), list[str]()
    rules = Rules(joining(ranks), options, str(folder))
    if options.in_model_order and ranks.of_stage[0][0].optimizers:
        raise CheckpointError(f"{folder} names its optimizer states; leave --in-model-order out")
    by_tp = [_trained(stages, options, left_out) for stages in ranks.by_tp]
    first = ranks.of_stage[0][0]
    return assemble(
        "deepspeed",
        folder,
        ranks,
        trained=_joined(by_tp, rules, trained=True),
        trained_by_tp=by_tp,
        rules=rules,
        groups=_groups(first) if by_tp[0] else [],
        optimizer=_optimizer_file(first) if by_tp[0] else {},
        left_out=left_out,
    )


def assemble(
    kind: str,
    folder: Path,
    ranks: RankFolder,
    *,
    trained: Parts,
    trained_by_tp: Sequence[Parts],
    rules: Rules,
    groups: list[dict[str, Any]],
    optimizer: Mapping[str, Any],
    left_out: list[str],
) -> Source:
    """Return the source made of the trained parameters and the rest of the model files.

    `groups` are the optimizer's parameter groups; `optimizer` is a file that has the loss scale.
    """
    first = ranks.first
    aliases = {str(k): str(v) for k, v in (first.get("shared_params") or {}).items()}
    frozen = _joined(
        [untrained(s, t, aliases, left_out) for s, t in zip(ranks.by_tp, trained_by_tp, strict=True)],
        rules,
        trained=False,
    )
    rules.check_used()
    found_buffers = buffers(ranks.by_tp[0])
    if lost := sorted(buffer_names(ranks.by_tp[0]) - found_buffers.keys()):
        left_out.append(f"buffers {', '.join(lost)}: the files of their layers are missing")
    given = first.get("ds_config")
    config: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    state = schedule = None
    if trained:
        state = deepspeed_state.optimizer_state(config, groups, trained, left_out)
        schedule = deepspeed_state.scheduler_state(config, first.get("lr_scheduler"), state.groups, left_out)
    return Source(
        kind=kind,
        where=str(folder),
        arrays=[
            *_arrays(trained),
            *_arrays(frozen),
            *(_buffer(name, tensor, folder) for name, tensor in found_buffers.items()),
        ],
        frozen=frozenset(frozen if trained else ()),
        aliases=aliases,
        optimizer=state,
        scheduler=schedule,
        step=int(first.get("global_steps") or 0),
        samples=int(first.get("global_samples") or 0),
        skipped=int(first.get("skipped_steps") or 0),
        batch=deepspeed_state.batch_size(config, first),
        loss_scale=deepspeed_state.loss_scale(config, optimizer) if trained else None,
        writer=_writer(ranks, config),
        client_state=deepspeed_state.client_state(first, left_out),
        left_out=list(dict.fromkeys(left_out)),
        files=frozenset(ranks.files),
    )


def _trained(stages: Sequence[RankFiles], options: Options, left_out: list[str]) -> dict[str, ParameterPart]:
    """Return the trained parameters of a tensor-parallel rank; stages that share one must agree on it."""
    found: dict[str, ParameterPart] = {}
    for rank in stages:
        held = parts(rank) if rank.optimizers else numbered_parts(rank, left_out, options)
        for name, part in held.items():
            alike = Rule(kind="replicated")
            found[name] = join([found[name], part], alike, name) if name in found else part
    return found


def _joined(by_tp: Sequence[Parts], rules: Rules, *, trained: bool) -> dict[str, ParameterPart]:
    """Join the tensor-parallel ranks' shards to whole parameters."""
    tp = len(by_tp)
    for other in by_tp[1:]:
        if other.keys() != by_tp[0].keys():
            missing = sorted(other.keys() ^ by_tp[0].keys())[:4]
            raise CheckpointError(f"only some tensor-parallel ranks have {', '.join(missing)}")
    return {
        name: join([held[name] for held in by_tp], rules.of(name, tp, trained=trained), name)
        for name in by_tp[0]
    }


def _arrays(found: Parts) -> list[ForeignArray]:
    return [
        ForeignArray(
            name=name,
            state=key,
            dtype="float32",
            shape=part.shape,
            read=read,
            origin=f"{part.origin}: {name}",
        )
        for name, part in found.items()
        for key, read in part.states.items()
    ]


def _buffer(name: str, tensor: StoredTensor, folder: Path) -> ForeignArray:
    origin = f"{folder.name}: {name}"
    return ForeignArray(
        name=name, state=BUFFER, dtype=tensor.dtype, shape=tensor.shape, read=tensor.read, origin=origin
    )


def joining(ranks: RankFolder) -> Mapping[str, Any] | None:
    """Return the checkpoint's own description of tensor-parallel shards; None if it has none."""
    rank = ranks.of_stage[0][0]
    for file in (*rank.models, *rank.optimizers):
        found = file.get("universal_checkpoint_info")
        if isinstance(found, Mapping):
            return found
    return None


def _groups(rank: RankFiles) -> list[dict[str, Any]]:
    if rank.optimizers:
        return groups_of(rank)
    inner = _optimizer_file(rank)
    return [dict(group) for group in inner.get("optimizer_state_dict", inner)["param_groups"]]


def _optimizer_file(rank: RankFiles) -> Mapping[str, Any]:
    found: Mapping[str, Any] = rank.optimizers[0] if rank.optimizers else rank.models[0]["optimizer"]
    return found


def _writer(ranks: RankFolder, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return version and topology of the writer, for information."""
    dp, zero = ranks.first.get("dp_world_size"), config.get("zero_optimization")
    stage = as_integer(zero.get("stage")) if isinstance(zero, Mapping) else zero
    return {
        "deepspeed": str(ranks.first.get("ds_version", "unknown")),
        "topology": {"pp": len(ranks.of_stage), "dp": dp if isinstance(dp, int) else 1, "tp": ranks.tp},
        "zero_stage": int(stage) if isinstance(stage, int) else 0,  # true is stage 1
    }
