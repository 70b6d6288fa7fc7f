"""A planned training job: the model, the ranks, and the settings that decide on memory and traffic."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from parallel.degrees import Ranks, check_shard_group
from parallel.placement import Placement, balanced_cuts, check_layers
from parallel.settings import ITEMSIZE, Balance, DType, Schedule
from uni3d.config import Config, batch_triad
from uni3d.estimate.gpt import GPTShape, Link, Weight
from uni3d.estimate.zero import computes_in_place, largest_part

Weights = tuple[Weight, ...]
MOMENTS = {"SGD": 0, "Lion": 1, "Adagrad": 1, "Muon": 1}
"""Number of optimizer states with the parameter's shape. Adam, AdamW and unknown optimizers have 2."""

RecomputeMode = Literal["none", "full", "selective"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A planned training run, in the words of the config."""

    shape: GPTShape
    ranks: Ranks
    seq_len: int
    micro_batch: int
    accumulation: int
    precision: DType = "bf16"
    reduce: DType = "fp32"
    """Type in which gradients are accumulated and reduced."""
    recompute: RecomputeMode = "none"
    every: int = 1
    """One of this many layers is recomputed."""
    schedule: Schedule = "1f1b"
    virtual_stages: int = 1
    balance: Balance = "flops"
    sequence_parallel: bool = False
    shard_group: int | None = None
    """Number of ranks over which ZeRO shards, a divisor of dp; None for all of dp."""
    offload: bool = False
    moments: int = 2
    """Number of fp32 optimizer states with the parameter's shape."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Kind of device. CPU and CUDA kernels keep different tensors for the backward pass."""

    def __post_init__(self) -> None:
        """Raises ValueError for an impossible setting, and names its option."""
        self.shape.check_tensor_parallel(self.ranks.tp)
        for name in ("precision", "reduce", "recompute", "schedule", "balance", "device"):
            known = get_args(_HINTS[name])
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)} is unknown; give one of {', '.join(known)}")
        for name in ("seq_len", "micro_batch", "accumulation", "every", "virtual_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        check_shard_group(self.ranks.dp, self.ranks.zero, self.shard_group)
        check_layers(len(self.shape.links), self.ranks.pp * self.virtual_stages)
        rows = self.shape.max_seq_len
        if self.shape.positions == "learned" and self.seq_len > rows:
            raise ValueError(f"seq_len {self.seq_len} is more than the {rows} learned positions")
        if self.sequence_parallel and self.seq_len % self.ranks.tp:
            raise ValueError(f"sequence parallelism needs a seq_len that tp({self.ranks.tp}) divides")

    @property
    def tokens(self) -> int:
        """Tokens in a micro batch."""
        return self.micro_batch * self.seq_len

    @property
    def tokens_between(self) -> int:
        """Tokens of a micro batch on a rank outside of what tensor parallelism splits, and between stages."""
        return -(-self.tokens // self.ranks.tp) if self.sequence_parallel else self.tokens

    @property
    def batch(self) -> int:
        """Samples in a global batch."""
        return self.micro_batch * self.accumulation * self.ranks.dp

    @property
    def compute_bytes(self) -> int:
        return ITEMSIZE[self.precision]

    @property
    def reduce_bytes(self) -> int:
        return ITEMSIZE[self.reduce]

    @property
    def shards(self) -> int:
        """Number of ranks over which ZeRO shards."""
        return self.ranks.shards(self.shard_group)

    @property
    def in_place(self) -> bool:
        """True if passes compute with the parameters themselves, without whole copies."""
        return computes_in_place(shards=self.shards, compute_bytes=self.compute_bytes, offload=self.offload)

    @property
    def order(self) -> Schedule:
        """Schedule that runs. With fewer micro batches than stages, 1F1B is GPipe."""
        return "gpipe" if self.schedule == "1f1b" and self.accumulation < self.ranks.pp else self.schedule

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Part of the model on each rank of the pipeline."""
        return cut_stages(self.shape, self.ranks.pp, self.virtual_stages, self.balance, self.schedule)

    @property
    def kinds(self) -> tuple[Stage, ...]:
        """One stage of each kind. Stages with the same weights are of one kind."""
        return _kinds(self.shape, self.ranks.pp, self.virtual_stages, self.balance, self.schedule)

    def whole(self, weights: Weights) -> int:
        """Return the number of elements of these weights on a tensor-parallel rank."""
        return _elements(weights, self.ranks.tp, 1)

    def shard(self, weights: Weights) -> int:
        """Return the number of elements of these weights that a rank keeps under ZeRO."""
        return _elements(weights, self.ranks.tp, self.shards)


_HINTS = get_type_hints(Job)


@dataclass(frozen=True)
class Stage:
    """Part of the model on a pipeline rank."""

    chunks: tuple[tuple[Link, ...], ...]
    """Stretches of the chain, one for each virtual stage."""
    units: tuple[Weights, ...]
    """Weights that ZeRO gathers with each link; empty if the root has them."""
    root: Weights
    """Weights gathered for the whole stage: those of links without a matrix, or with a shared one
    (`parallel.layers.units`)."""
    turns: bool = False
    """True if the second stretch follows the first directly, as on the last rank of a V schedule."""

    @property
    def links(self) -> list[Link]:
        return [link for chunk in self.chunks for link in chunk]

    @property
    def layers(self) -> int:
        return sum(link.name.startswith("layers.") for link in self.links)

    @property
    def ends(self) -> set[str]:
        """Ends of the model on this stage: `embed`, `head`."""
        return {"embed", "head"} & {link.name for link in self.links}

    @property
    def neighbours(self) -> int:
        """Number of other stretches that send activations or gradients to this rank's stretches."""
        return 2 * len(self.chunks) - len(self.ends)


@lru_cache
def cut_stages(
    shape: GPTShape, pp: int, v: int = 1, balance: Balance = "flops", schedule: Schedule = "1f1b"
) -> tuple[Stage, ...]:
    """Return the part of the model on each of `pp` pipeline ranks, with `v` stages on each.

    Raises:
        ValueError: there are fewer links than stages.
    """
    links = shape.links
    check_layers(len(links), pp * v)
    costs = {
        "flops": [link.cost for link in links],
        "parameters": [1 + sum(prod(w.shape) for w in link.weights if not w.same_as) for link in links],
        "uniform": [1] * len(links),
    }[balance]
    parts = [tuple(links[a:b]) for a, b in balanced_cuts(costs, pp * v)]
    placement = Placement.of(pp, schedule=schedule, virtual_stages=v)
    turning = pp - 1 if schedule == "zero_bubble_v" and v > 1 else None
    chunks = [tuple(parts[stage] for stage in placement.on(rank)) for rank in range(pp)]
    return tuple(_stage(own, turns=rank == turning) for rank, own in enumerate(chunks))


@lru_cache
def _kinds(*job: Any) -> tuple[Stage, ...]:
    stages = cut_stages(*job)
    return tuple({(s.turns, *(link.weights for link in s.links)): s for s in stages}.values())


def _stage(chunks: tuple[tuple[Link, ...], ...], *, turns: bool) -> Stage:
    links = [link for chunk in chunks for link in chunk]
    here = {f"{link.name}.{weight.name}" for link in links for weight in link.weights}
    shared = {weight.same_as for link in links for weight in link.weights} & here
    units: list[Weights] = []
    root: list[Weight] = []
    for link in links:
        own = tuple(weight for weight in link.weights if weight.same_as not in here)
        shares = len(own) < len(link.weights) or any(f"{link.name}.{w.name}" in shared for w in own)
        alone = not shares and any(len(weight.shape) >= 2 for weight in own)
        units.append(own if alone else ())
        root += () if alone else own
    return Stage(chunks, tuple(units), tuple(root), turns)


@lru_cache
def _elements(weights: Weights, tp: int, shards: int) -> int:
    """Return the number of elements of these weights on a rank, padding included."""
    return sum(largest_part(weight.shape, weight.tp_dim, tp=tp, shards=shards) for weight in weights)


def read_document(path: Path) -> dict[str, Any]:
    """Read an example's config: JSON with `model`, `seq_len` and `uni3d`.

    Raises:
        ValueError: the file can't be read, isn't JSON, or lacks a section.
    """
    document = read_json(path, str(path))
    kinds = {"model": dict, "seq_len": int, "uni3d": dict}
    for key, kind in kinds.items():
        if not isinstance(document, dict) or not isinstance(document.get(key), kind):
            raise ValueError(
                f"{path} must have model (fields of the example's GPTConfig), seq_len and uni3d (a config); "
                f"{key} is missing or isn't {'a number' if kind is int else 'a section'}"
            )
    return dict(document)


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file; `what` names it in errors.

    Raises:
        ValueError: it can't be read, or isn't JSON.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{what} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {error}") from None


def settings_of(config: Config, dp: int) -> dict[str, Any]:
    """Return the fields of `Job`, other than model and ranks, for a config on `dp` data-parallel ranks."""
    triad = batch_triad(config, dp)
    kind = None if config.optimizer is None else config.optimizer.type
    moments = MOMENTS.get(kind or "", 2)
    if kind == "SGD" and config.optimizer is not None and config.optimizer.hyperparameters.get("momentum"):
        moments = 1
    return {
        "micro_batch": triad.micro_batch,
        "accumulation": triad.accumulation,
        "precision": config.precision,
        "reduce": config.communication_data_type or "fp32",
        "recompute": config.activation_checkpointing.mode,
        "every": config.activation_checkpointing.every,
        "schedule": config.parallel.schedule,
        "virtual_stages": config.parallel.virtual_stages,
        "balance": config.parallel.balance,
        "sequence_parallel": config.parallel.sequence_parallel,
        "shard_group": config.shard_group,
        "offload": config.offload,
        "moments": moments,
    }
