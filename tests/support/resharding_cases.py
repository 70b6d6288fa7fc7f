"""Models of several kinds on any topology: their ranks' parts of a checkpoint, and their resumes."""

from typing import Any, NamedTuple

import oracle
import torch
from model import GPT, GPTConfig
from models import OwnLoss, Stack, global_batches, make_engine, micro_batches, save_and_wait, seeded
from test_pipe import tied_layers, token_loss
from tied_gpt import gpt_engine
from torch import Tensor, nn

import uni3d
from parallel import Ranks, Settings
from uni3d.pipe import PipelineModule
from uni3d.state import Inventory

UNTIED = oracle.MODEL | {"norm": "layernorm", "positions": "learned", "activation": "gelu"}


class Biased(nn.Module):
    """Chain of linear layers with biases, of sizes that 2 divides and 3 and 4 don't."""

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
        return self.last(self.inner(x))

    def loss_fn(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return (outputs - targets).square().sum(), torch.tensor(outputs.numel())


def untied() -> nn.Module:
    with torch.device("meta"):
        return GPT(GPTConfig(**UNTIED))


def mixtral() -> nn.Module:
    import hf_models

    return hf_models.make("mixtral")


MODELS: dict[str, Any] = {
    "own": OwnLoss,  # with neither plan nor layers; the example's tied GPT has both, see `build`
    "stack": Stack,  # with layers
    "list": lambda: PipelineModule(tied_layers(), loss_fn=token_loss),
    "untied": untied,
    "biased": Biased,
    "mixtral": mixtral,  # with a plan that splits experts
}


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
    def ranks(self) -> Ranks:
        return Ranks(pp=self.pp, dp=self.dp, tp=self.tp, zero=self.zero)

    @property
    def settings(self) -> Settings:
        schedule: Any = self.schedule
        balance: Any = self.balance
        return Settings(schedule=schedule, virtual_stages=self.virtual, balance=balance)

    def __str__(self) -> str:
        name = f"{self.model}-pp{self.pp}dp{self.dp}tp{self.tp}z{self.zero}"
        more = [self.schedule] * (self.schedule != "1f1b") + [self.balance] * (self.balance != "flops")
        return "-".join([name, *more, *([f"group{self.group}"] if self.group else [])])


def build(place: Place) -> uni3d.Engine:
    """Return this rank's engine."""
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
    config = {"parallel": parallel, "zero_optimization": zero}
    return make_engine(seeded(MODELS[place.model]), micro=1, config=config)


def save_case(model: str, run: str) -> None:
    engine = build(Place(model, 1, 1, 1, 0))
    if model == "gpt":
        engine.train_batch()
    elif model != "mixtral":
        tokens = torch.arange(48).reshape(12, 4) % 11
        data = {
            "list": [(tokens, tokens)],
            "untied": [(tokens, tokens)],
            "biased": [(torch.ones(12, 5), torch.ones(12, 1))],
        }
        engine.train_batch(micro_batches(data.get(model) or global_batches(1), engine))
    save_and_wait(engine, run)


def held_case(place: Place, run: str, saved: str) -> dict[str, Any]:
    """Load; return this rank's tensors, the bytes that it read, and the memory of its tensors.

    It takes part in a save of the same.
    """
    engine = build(place)
    engine.load_checkpoint(run)
    save_and_wait(engine, saved)
    arrays = Inventory(engine.model).arrays(engine.optimizer)
    sizes = {"fp32": 0, "value": 0, "states": 0}
    for spec, tensor, _ in arrays:
        kind = spec.key.state if spec.key.state in sizes else "states"
        sizes[kind] += tensor.numel() * tensor.element_size()
    engine.model.zero.reshard()
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
