"""Which rank holds what, by the manifest alone, is what real ranks hold."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from model import GPT, GPTConfig
from ranks import Ranks
from small_models import ADAM
from torch import Tensor, nn

import ckpt
import uni3d
from uni3d import paper
from uni3d.holders import Holders, Part, Split

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))  # on the ranks too

MODELS: dict[str, dict[str, Any]] = {
    "tied": {"tied_head": True},
    "untied": {"norm": "layernorm", "positions": "learned", "activation": "gelu"},
}


class Biased(nn.Module):
    """A chain of linear layers with biases, of sizes that 2 divides and 3 and 4 don't."""

    def __init__(self) -> None:
        super().__init__()
        self.pipeline_layers = ["inner", "last"]
        self.tp_plan = {"inner.up": "colwise", "inner.down": "rowwise"}
        self.inner = nn.Sequential()
        self.inner.add_module("up", nn.Linear(5, 14))
        self.inner.add_module("down", nn.Linear(14, 7))
        self.inner.register_buffer("seen", torch.zeros(3))
        self.last = nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.inner(x))
        return out

    def loss_fn(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return (outputs - targets).square().sum(), torch.tensor(outputs.numel())


def make_model(kind: str) -> nn.Module:
    if kind == "biased":
        return Biased()
    if kind == "mixtral":
        import hf_models

        return hf_models.make(kind)
    with torch.device("meta"):
        return GPT(GPTConfig(**(oracle.MODEL | MODELS[kind])))


def held_case(
    kind: str, place: tuple[int, int, int, int], config: dict[str, Any], run: str
) -> dict[str, Part]:
    """Save; what this rank holds of each atom, as the engine's own inventory has it."""
    pp, dp, tp, zero = place
    settings = {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": ADAM,
        "parallel": {"pp": pp, "dp": dp, "tp": tp, "device": "cpu", **config.pop("parallel", {})},
        "zero_optimization": {"stage": zero, **config.pop("zero_optimization", {})},
        "checkpoint": {"async_save": False, "durable": False},
    }
    engine = uni3d.initialize(model=make_model(kind), config=settings)[0]
    engine.save_checkpoint(run)
    held = engine.checkpointer._inventory.arrays(engine.optimizer)
    return {spec.key.atom: tuple(spec.box) for spec, *_ in held if spec.key.state in ("fp32", "value")}


def by_rank(holders: Holders, split: Split) -> list[dict[str, Part]]:
    found: list[dict[str, Part]] = [{} for _ in range(split.ranks.total)]
    for atom in holders.shapes:
        for rank, part in holders.parts(atom, split).items():
            found[rank][atom] = part
    return found


PLACES = [(1, 1, 1, 0), (1, 2, 1, 0), (1, 3, 1, 2), (1, 2, 2, 1), (2, 2, 1, 3), (2, 1, 2, 0), (4, 1, 1, 1)]


@pytest.mark.parametrize("kind", ["tied", "untied", "biased"])
def test_a_manifest_tells_what_real_ranks_hold(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    """Of those that wrote it, and of those that didn't."""
    places = [p for p in PLACES if kind != "biased" or p[0] <= 2]
    real = {}
    for place in places:
        world = place[0] * place[1] * place[2]
        real[place] = ranks.run(world, held_case, kind, place, {}, str(tmp_path / str(place)))
    if kind == "biased":
        assert any(0 in length for held in real[1, 3, 1, 2] for _, length in held.values()), (
            "or no case has it"
        )
    for place in places:
        holders = Holders(ckpt.open_checkpoint(tmp_path / str(place)))
        assert by_rank(holders, holders.writers()) == real[place], place
        for other in places:
            pp, dp, tp, zero = other
            asked = holders.on(paper.Ranks(pp=pp, dp=dp, tp=tp, zero=zero))
            assert by_rank(holders, asked) == real[other], f"{place} -> {other}"


ODD = [
    ((1, 4, 1, 3), {"zero_optimization": {"mics_shard_size": 2}}),
    ((2, 2, 1, 1), {"parallel": {"schedule": "interleaved", "virtual_stages": 2}}),
    ((2, 1, 2, 1), {"parallel": {"schedule": "zero_bubble_v", "virtual_stages": 2, "balance": "parameters"}}),
]


@pytest.mark.parametrize(("place", "config"), ODD, ids=["groups", "interleaved", "V"])
def test_it_tells_shard_groups_and_several_stages_on_a_rank(
    ranks: Ranks, tmp_path: Path, place: tuple[int, int, int, int], config: dict[str, Any]
) -> None:
    real = ranks.run(4, held_case, "tied", place, config, str(tmp_path))
    holders = Holders(ckpt.open_checkpoint(tmp_path))
    assert by_rank(holders, holders.writers()) == real
    plain = holders.on(paper.Ranks(pp=place[0], dp=place[1], tp=place[2], zero=place[3]))
    assert by_rank(holders, plain) != real, "or the case is none"


def test_it_tells_stacked_experts(ranks: Ranks, tmp_path: Path) -> None:
    place = (1, 2, 2, 1)
    real = ranks.run(place[1] * place[2], held_case, "mixtral", place, {}, str(tmp_path), timeout=300)
    holders = Holders(ckpt.open_checkpoint(tmp_path))
    assert by_rank(holders, holders.writers()) == real
    assert any(len(shape) == 3 for shape in holders.shapes.values())
