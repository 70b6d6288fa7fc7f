"""The arms: a library, its ranks, its settings, and the arm of uni3d that it is measured beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    saves: bool | None = None
    """Whether a long run saves every few steps; None is a short run."""
    beside: str | None = None
    """Key of the arm of uni3d that this arm is compared with."""

    @property
    def key(self) -> str:
        return f"{self.name}@{self.ranks}"


def all_arms(world: int) -> list[Arm]:
    """Return every arm on `world` ranks. On one rank, stages 1 and 2 have nothing to shard."""
    arms = []
    for zero in STAGES if world > 1 else (0, 3):
        ours = Arm(name=f"uni3d zero{zero}", library="uni3d", ranks=world, zero=zero)
        arms += [ours, Arm(name=f"deepspeed zero{zero}", library="deepspeed", ranks=world, zero=zero,
                           beside=ours.key)]  # fmt: skip
    arms.append(Arm(name="ddp", library="ddp", ranks=world, beside=f"uni3d zero0@{world}"))
    arms.append(Arm(name="fsdp2", library="fsdp2", ranks=world, zero=3, beside=f"uni3d zero3@{world}"))
    if world > 1:
        arms += pipelines(world)
    if world == 2:
        arms += tensor_parallel(world) + saves(world)
    return arms


def pipelines(pp: int) -> list[Arm]:
    """Return arms of 1F1B: DeepSpeed's with its own cut, ours with the same cut and with our own."""
    same = Arm(name=f"uni3d pp{pp} parameters", library="uni3d", ranks=pp, pp=pp, balance="parameters")
    return [
        Arm(name=f"uni3d pp{pp}", library="uni3d", ranks=pp, pp=pp),
        same,
        Arm(name=f"deepspeed pp{pp}", library="deepspeed", ranks=pp, pp=pp, beside=same.key),
    ]


def tensor_parallel(tp: int) -> list[Arm]:
    """Return arms of tensor parallelism: ours, and the model composed by hand from torch's pieces."""
    ours = Arm(name=f"uni3d tp{tp}", library="uni3d", ranks=tp, tp=tp)
    return [ours, Arm(name=f"torch tp{tp}", library="tensor_parallel", ranks=tp, tp=tp, beside=ours.key)]


def saves(world: int) -> list[Arm]:
    """Return arms of longer runs, with asynchronous saves and without."""
    saving = Arm(name="uni3d saves", library="uni3d", ranks=world, zero=1, saves=True)
    without = Arm(name="uni3d no saves", library="uni3d", ranks=world, zero=1, saves=False)
    return [saving, without]


def chosen(ranks: Sequence[int], names: Sequence[str] | None, *, deepspeed: bool) -> list[Arm]:
    """Return the arms on these numbers of ranks, of these names.

    Raises:
        ValueError: a name that no arm has.
    """
    arms = [arm for world in ranks for arm in all_arms(world)]
    known = sorted({arm.name for arm in arms})
    for name in names or []:
        if name not in known:
            raise ValueError(
                f"--arms {name!r} is none of the arms on {list(ranks)} ranks: {', '.join(known)}"
            )
    arms = [arm for arm in arms if names is None or arm.name in names]
    return [arm for arm in arms if deepspeed or arm.library != "deepspeed"]
