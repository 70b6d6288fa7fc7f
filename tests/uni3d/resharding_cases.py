"""Models of several kinds on any topology: what their ranks hold of a checkpoint, and whether they resume."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from small_models import OwnLoss, Stack, global_batches, make_engine, micro_batches, seeded
from test_pipeline_module import tied_layers, token_loss
from tied_gpt import gpt_engine

import uni3d
from uni3d import paper
from uni3d.pipe import PipelineModule
from uni3d.resharding import Cut

MODELS = ("gpt", "own", "stack", "list")
"""With a plan and layers; with neither; with layers; a pipeline written as a list."""


class Place(NamedTuple):
    model: str
    pp: int
    dp: int
    tp: int
    zero: int
    schedule: str = "1f1b"
    virtual: int = 1
    balance: str = "flops"
    group: int | None = None

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.tp

    @property
    def ranks(self) -> paper.Ranks:
        return paper.Ranks(pp=self.pp, dp=self.dp, tp=self.tp, zero=self.zero)

    @property
    def cut(self) -> Cut:
        balance: Any = self.balance
        return Cut(
            schedule=self.schedule, virtual_stages=self.virtual, balance=balance, shard_group=self.group
        )

    def __str__(self) -> str:
        name = f"{self.model}-pp{self.pp}dp{self.dp}tp{self.tp}z{self.zero}"
        more = [self.schedule] * (self.schedule != "1f1b") + [self.balance] * (self.balance != "flops")
        return "-".join([name, *more, *([f"group{self.group}"] if self.group else [])])


def build(place: Place) -> uni3d.Engine:
    """An engine on this rank."""
    parallel = {
        "pp": place.pp,
        "tp": place.tp,
        "device": "cpu",
        "schedule": place.schedule,
        "virtual_stages": place.virtual,
    }
    if place.model != "list":
        parallel["balance"] = place.balance
    zero: dict[str, Any] = {"stage": place.zero, "zero_hpz_partition_size": place.group or 1}
    if place.model == "gpt":
        parallel["dp"] = place.dp
        size = 12 // place.dp
        batch = {"gradient_accumulation_steps": 3 if size % 2 else 2}
        return gpt_engine(
            place.pp, place.dp, place.tp, place.zero, parallel=parallel, zero_optimization=zero, **batch
        )
    model: Any = {
        "own": lambda: seeded(OwnLoss),
        "stack": lambda: seeded(Stack),
        "list": lambda: seeded(lambda: PipelineModule(tied_layers(), loss_fn=token_loss)),
    }[place.model]()
    return make_engine(model, micro=1, config={"parallel": parallel, "zero_optimization": zero})


def save_case(model: str, run: str) -> None:
    engine = build(Place(model, 1, 1, 1, 0))
    if model == "gpt":
        engine.train_batch()
    elif model == "list":
        tokens = torch.arange(48).reshape(12, 4) % 11
        engine.train_batch(micro_batches([(tokens, tokens)], engine))
    else:
        engine.train_batch(micro_batches(global_batches(1), engine))
    engine.save_checkpoint(run)
    engine.wait_for_checkpoint()


def held_case(place: Place, run: str) -> dict[str, Any]:
    """What this rank has after a load, the bytes that it read, and how much memory its tensors take."""
    engine = build(place)
    engine.load_checkpoint(run)
    arrays = engine.checkpointer._inventory.arrays(engine.optimizer)
    sizes = {"fp32": 0, "value": 0, "states": 0}
    for spec, tensor, _ in arrays:
        kind = spec.key.state if spec.key.state in sizes else "states"
        sizes[kind] += tensor.numel() * tensor.element_size()
    assert engine.last_load is not None
    found = {
        "held": sorted((tuple(spec.key), tuple(spec.box)) for spec, _, _ in arrays),
        "read": engine.last_load.bytes_read,
        "trained": 4 * sum(p.to_local().numel() for p in engine.module.parameters() if p.requires_grad),
        **sizes,
    }
    if place.model == "gpt":
        engine.train_batch()  # then the parameters that it computed with are known
        zeros = engine.model.zero._stages
        parts = (p for zero in zeros for p in zero.whole_parameters() if p.ndim)
        found["whole"] = sum(getattr(p, "_local_tensor", p).numel() for p in parts)
    return found
