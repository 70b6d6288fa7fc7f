"""Sequence parallelism: the same steps as one process, with activations that are split between the layers."""

from typing import Any

import oracle
import pytest
import torch
from dispatch_modes import ComputedShapes
from marks import matrix, slow
from models import take_steps
from ranks import Ranks
from tied_gpt import gpt_engine
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

STEPS = 3


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def engine_of(degrees: tuple[int, int, int], zero: int, options: dict[str, Any], **config: Any) -> Any:
    config = {"parallel": {"sequence_parallel": True}} | config
    return gpt_engine(*degrees, zero, sizes=oracle.MODEL | options, groups=True, masked=True, **config)


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
    losses, norms = take_steps(engine, STEPS)
    engine.model.zero.reshard()
    parameters = {engine.model.first_name(n): whole(p) for n, p in engine.module.named_parameters()}
    return losses, norms, parameters, lengths


CASES = [
    ((1, 1, 2), 0, {"norm": "layernorm", "positions": "learned", "activation": "gelu"}, {}),
    matrix((1, 1, 2), 3, {}, {"activation_checkpointing": {"mode": "full"}}),
    slow((1, 2, 2), 3, {"tied_head": True}, {}),
    slow((2, 1, 2), 0, {}, {}),
    matrix((1, 2, 2), 0, {}, {}),
    matrix((1, 2, 2), 1, {"tied_head": True}, {}),
    slow((2, 1, 2), 2, {"tied_head": True, "norm": "layernorm"}, {}),
    matrix((2, 1, 2), 3, {}, {}),
    slow((1, 1, 2), 3, {}, {"activation_checkpointing": {"mode": "selective"}}),
]


@pytest.mark.parametrize(("degrees", "zero", "options", "config"), CASES)
def test_the_steps_are_those_of_one_process(
    ranks: Ranks, degrees: tuple[int, int, int], zero: int, options: dict[str, Any], config: dict[str, Any]
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


def test_bf16_steps_stay_near_those_in_fp32(ranks: Ranks) -> None:
    trace = oracle.train(oracle.MODEL, STEPS, masked=True)
    for losses, norms, _, _ in ranks.run(2, train_case, (1, 1, 2), 3, {}, {"bf16": {"enabled": True}}):
        assert losses == pytest.approx(trace.losses, rel=5e-3)
        assert norms == pytest.approx(trace.norms, rel=5e-2)


def shapes_case(sequence_parallel: bool) -> set[tuple[int, ...]]:
    engine = engine_of((1, 1, 2), 3, {}, parallel={"sequence_parallel": sequence_parallel})
    with ComputedShapes() as shapes:
        engine.train_batch()
    return shapes.seen


@pytest.mark.parametrize("sequence_parallel", [slow(False), True])
def test_no_rank_ever_holds_all_logits(ranks: Ranks, sequence_parallel: bool) -> None:
    vocabulary = oracle.MODEL["vocab_size"]
    for part, seen in zip((31, 30), ranks.run(2, shapes_case, sequence_parallel), strict=True):
        assert any(part in shape for shape in seen), "a rank's own part of the vocabulary is seen"
        assert not [shape for shape in seen if shape and shape[-1] == vocabulary]


def refusal_case(degrees: tuple[int, int, int]) -> str:
    engine = engine_of(degrees, 0, {})
    batches = [(torch.zeros(6, 7, dtype=torch.int64), torch.zeros(6, 7, dtype=torch.int64))] * 2
    with pytest.raises(ValueError, match="sequence_parallel") as caught:
        engine.train_batch(iter(batches))
    return str(caught.value)


@pytest.mark.parametrize("degrees", [(1, 1, 2), slow((2, 1, 2))])
def test_a_sequence_that_does_not_divide_is_refused(ranks: Ranks, degrees: tuple[int, int, int]) -> None:
    for error in ranks.run(2 * degrees[0], refusal_case, degrees):
        assert error.startswith("sequence_parallel: tp(2) doesn't divide the sequence's 7 tokens; pad")
