"""The arms: a library, its ranks, its settings, and the arms of uni3d that it is measured beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Library = Literal["uni3d", "deepspeed", "ddp", "fsdp2", "tensor_parallel"]
RANKS = (1, 2, 4)
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train the model."""

    name: str
    library: Library
    ranks: int
    zero: int = 0
    pp: int = 1
    tp: int = 1
    balance: Literal["flops", "parameters"] = "flops"
    """Quantity that uni3d balances between pipeline stages."""
    schedule: Literal["1f1b", "zero_bubble"] = "1f1b"
    """uni3d's pipeline schedule; DeepSpeed has 1F1B alone."""
    saves: bool | None = None
    """True for a long run that saves every few steps, False for one that doesn't; None is a short run."""
    beside: tuple[str, ...] = ()
    """Keys of the arms of uni3d that this arm is compared with."""

    @property
    def key(self) -> str:
        return f"{self.name}@{self.ranks}"


def all_arms(world: int) -> list[Arm]:
    """Return every arm on `world` ranks."""
    arms = data_parallel(world)
    if world > 1:
        arms += pipelines(world)
    if world == 2:
        arms += tensor_parallel(world) + saves(world)
    return arms


def data_parallel(dp: int) -> list[Arm]:
    """Return arms of ZeRO, DDP and FSDP2. On one rank, stages 1 and 2 have nothing to shard."""
    arms = []
    for zero in STAGES if dp > 1 else (0, 3):
        beside = ("uni3d tp2@2",) if dp == 1 and zero == 0 else ()
        ours = Arm(name=f"uni3d zero{zero}", library="uni3d", ranks=dp, zero=zero, beside=beside)
        name = f"deepspeed zero{zero}"
        arms += [ours, Arm(name=name, library="deepspeed", ranks=dp, zero=zero, beside=(ours.key,))]
    return [
        *arms,
        Arm(name="ddp", library="ddp", ranks=dp, beside=(f"uni3d zero0@{dp}",)),
        Arm(name="fsdp2", library="fsdp2", ranks=dp, zero=3, beside=(f"uni3d zero3@{dp}",)),
    ]


def pipelines(pp: int) -> list[Arm]:
    """Return arms of 1F1B, DeepSpeed's, which balances parameters between stages, and ours in both ways; and
    of our zero-bubble schedule.
    """
    ours = Arm(name=f"uni3d pp{pp}", library="uni3d", ranks=pp, pp=pp)
    same = replace(ours, name=f"uni3d pp{pp} parameters", balance="parameters")
    full = replace(ours, name=f"uni3d pp{pp} zero bubble", schedule="zero_bubble")
    beside = (same.key, full.key, ours.key)
    return [
        ours,
        same,
        full,
        Arm(name=f"deepspeed pp{pp}", library="deepspeed", ranks=pp, pp=pp, beside=beside),
    ]


def tensor_parallel(tp: int) -> list[Arm]:
    """Return arms of tensor parallelism: ours, and the model composed by hand from torch's pieces."""
    ours = Arm(name=f"uni3d tp{tp}", library="uni3d", ranks=tp, tp=tp)
    by_hand = Arm(name=f"torch tp{tp}", library="tensor_parallel", ranks=tp, tp=tp, beside=(ours.key,))
    return [ours, by_hand]


def saves(dp: int) -> list[Arm]:
    """Return arms of longer runs, with asynchronous saves and without."""
    saving = Arm(name="uni3d saves", library="uni3d", ranks=dp, zero=1, saves=True)
    return [saving, replace(saving, name="uni3d no saves", saves=False)]


def chosen(
    ranks: Sequence[int],
    names: Sequence[str] | None,
    *,
    deepspeed: bool,
    precision: str = "fp32",
    compiled: bool = False,
) -> list[Arm]:
    """Return the arms on these numbers of ranks, of these names.

    DeepSpeed's arms are left out where it isn't installed. In bf16 two others are: DeepSpeed's stage 0, which
    keeps no fp32 weights then, and tensor parallelism by hand, which is written for fp32. With compiled
    layers the latter fails in its backward pass: torch 2.13 gives its embedding no gradient.

    Raises:
        ValueError: a name that none of the arms has.
    """
    arms = [arm for world in ranks for arm in all_arms(world)]
    if not deepspeed:
        arms = [arm for arm in arms if arm.library != "deepspeed"]
    if precision != "fp32":
        arms = [arm for arm in arms if arm.name != "deepspeed zero0"]
    if precision != "fp32" or compiled:
        arms = [arm for arm in arms if arm.library != "tensor_parallel"]
    known = sorted({arm.name for arm in arms})
    for name in names or []:
        if name not in known:
            raise ValueError(f"--arms {name!r} is unknown here; give some of {', '.join(map(repr, known))}")
    return [arm for arm in arms if names is None or arm.name in names]
