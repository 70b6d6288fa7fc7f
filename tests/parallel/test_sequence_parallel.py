"""Sequence parallelism: the same steps as one process, with activations that are split between the layers."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from model import GPT, GPTConfig
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

import parallel
import uni3d

STEPS = 3
TOPOLOGIES = [(1, 1, 2), (1, 2, 2), (2, 1, 2)]


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def engine_of(
    degrees: tuple[int, int, int], zero: int, options: dict[str, Any], **config: Any
) -> uni3d.Engine:
    with torch.device("meta"):
        model = GPT(GPTConfig(**(oracle.MODEL | options)))
    pp, dp, tp = degrees
    given = {
        "train_micro_batch_size_per_gpu": oracle.BATCH // dp // 2,
        "zero_optimization": {"stage": zero},
        "parallel": {"pp": pp, "dp": dp, "tp": tp, "device": "cpu", "sequence_parallel": True},
    }
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    engine: uni3d.Engine = uni3d.initialize(
        model=model,
        model_parameters=groups,
        training_data=TensorDataset(*oracle.samples(masked=True)),
        config=oracle.SETTINGS | given | config,
    )[0]
    return engine


def train_case(
    degrees: tuple[int, int, int], zero: int, options: dict[str, Any], config: dict[str, Any]
) -> tuple[list[float], list[float], dict[str, Tensor], set[int]]:
    engine = engine_of(degrees, zero, options, **config)
    lengths: set[int] = set()

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        lengths.update((args[0].shape[1], output.shape[1]))

    for name, module in engine.module.named_modules():
        if name.startswith("layers.") and name.count(".") == 1:
            module.register_forward_hook(look)
    losses, norms = [], []
    for _ in range(STEPS):
        losses.append(engine.train_batch().item())
        norms.append(engine.get_global_grad_norm() or 0.0)
    engine.model.zero.reshard()
    parameters = {engine.model.first_name(n): whole(p) for n, p in engine.module.named_parameters()}
    return losses, norms, parameters, lengths


CASES: list[tuple[tuple[int, int, int], int, dict[str, Any], dict[str, Any]]] = [
    *((degrees, zero, {}, {}) for degrees in TOPOLOGIES for zero in (0, 3)),
    ((1, 2, 2), 1, {"tied_head": True}, {}),
    ((2, 1, 2), 2, {"tied_head": True, "norm": "layernorm"}, {}),
    ((1, 1, 2), 1, {"norm": "layernorm", "positions": "learned", "activation": "gelu"}, {}),
    ((1, 1, 2), 3, {}, {"activation_checkpointing": {"mode": "full"}}),
    ((1, 1, 2), 3, {}, {"activation_checkpointing": {"mode": "selective"}}),
]


@pytest.mark.parametrize(("degrees", "zero", "options", "config"), CASES)
def test_the_steps_are_those_of_one_process(
    ranks: Ranks,
    degrees: tuple[int, int, int],
    zero: int,
    options: dict[str, Any],
    config: dict[str, Any],
) -> None:
    trace = oracle.train(oracle.MODEL | options, STEPS, masked=True)
    world = degrees[0] * degrees[1] * degrees[2]
    seen: set[str] = set()
    for losses, norms, parameters, lengths in ranks.run(world, train_case, degrees, zero, options, config):
        assert losses == pytest.approx(trace.losses, rel=1e-5)
        assert norms == pytest.approx(trace.norms, rel=1e-5)
        assert lengths == {oracle.SEQ_LEN // 2}, "layers see, give and send on half of the sequence"
        for name, parameter in parameters.items():
            expected = trace.states[-1][name]["fp32"]
            torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6, msg=name)
        seen |= parameters.keys()
    assert seen == trace.states[0].keys()
