"""Compiled layers and losses take the steps of one process that compiles nothing."""

import math
import warnings
from typing import Any

import oracle
import pytest
import torch
from marks import matrix, slow
from models import take_steps
from ranks import Ranks
from tied_gpt import gpt_engine
from torch import Tensor, nn

from parallel.activation_checkpointing import change_forward
from parallel.settings import Compile

STEPS = 3


def train_case(
    degrees: tuple[int, int, int], zero: int, config: dict[str, Any], backend: str
) -> tuple[list[float], list[float]]:
    torch._dynamo.reset()
    config = config | {"compile": {"enabled": True, "backend": backend}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own, of functions that it traces through
        engine = gpt_engine(*degrees, zero, sizes=oracle.MODEL, groups=True, masked=True, **config)
        return take_steps(engine, STEPS)


SEQUENCE: dict[str, Any] = {"parallel": {"sequence_parallel": True}}
CASES: list[Any] = [
    ((1, 1, 2), 0, {}, "aot_eager"),
    slow((1, 1, 2), 0, SEQUENCE, "aot_eager"),
    ((1, 2, 1), 0, {}, "aot_eager"),
    slow((1, 1, 2), 0, {}, "inductor"),
    matrix((1, 1, 2), 0, SEQUENCE, "inductor"),
    matrix((2, 1, 1), 1, {}, "inductor"),
    matrix((1, 2, 1), 3, {"activation_checkpointing": {"mode": "selective"}}, "inductor"),
    matrix((1, 2, 2), 3, SEQUENCE, "inductor"),
]


@pytest.mark.parametrize(("degrees", "zero", "config", "backend"), CASES)
def test_the_steps_are_those_without_compilation(
    ranks: Ranks, degrees: tuple[int, int, int], zero: int, config: dict[str, Any], backend: str
) -> None:
    expected = oracle.train(oracle.MODEL, STEPS, masked=True)
    for losses, norms in ranks.run(math.prod(degrees), train_case, degrees, zero, config, backend):
        assert losses == pytest.approx(expected.losses, rel=1e-5)
        assert norms == pytest.approx(expected.norms, rel=1e-5)


def saved_case(compiles: bool) -> set[tuple[torch.dtype, int]]:
    torch._dynamo.reset()
    seen: set[tuple[torch.dtype, int]] = set()

    def note(tensor: Tensor) -> Tensor:
        seen.add((tensor.dtype, tensor.shape[-1] if tensor.ndim else 0))
        return tensor

    config: dict[str, Any] = {"bf16": {"enabled": True}, "compile": {"enabled": compiles}}
    with warnings.catch_warnings(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        warnings.simplefilter("ignore")
        engine = gpt_engine(1, 1, 1, 0, sizes=oracle.MODEL, groups=True, masked=True, **config)
        take_steps(engine, 1)
    return seen


@pytest.mark.slow
def test_a_compiled_loss_keeps_no_logits_in_fp32(ranks: Ranks) -> None:
    vocabulary = oracle.MODEL["vocab_size"]
    assert (torch.float32, vocabulary) in ranks.run(1, saved_case, False)[0]
    [compiled] = ranks.run(1, saved_case, True)
    assert (torch.bfloat16, vocabulary) in compiled
    assert (torch.float32, vocabulary) not in compiled


def graphs_case(dp: int, zero: int) -> list[int]:
    """Return the number of compiled graphs that run in each step; the loss is one."""
    torch._dynamo.reset()
    runs: list[int] = []

    def counting(module: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        def run(*args: Any) -> Any:
            runs[-1] += 1
            return module.forward(*args)

        return run

    name = f"counting at zero {zero}"  # a name can be registered once in a process
    torch._dynamo.register_backend(counting, name=name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config: dict[str, Any] = {
            "bf16": {"enabled": True},
            "compile": {"enabled": True, "backend": name},
        }
        engine = gpt_engine(1, dp, 1, zero, sizes=oracle.MODEL, groups=True, masked=True, **config)
        for _ in range(STEPS):
            runs.append(0)
            engine.train_batch()
    return [count // engine.triad.accumulation for count in runs]


@pytest.mark.parametrize(("dp", "zero"), [(1, 0), slow(2, 3)])
def test_a_compiled_layer_is_one_graph(ranks: Ranks, dp: int, zero: int) -> None:
    """Hooks of ZeRO on a layer's parts leave the layer in one piece."""
    for runs in ranks.run(dp, graphs_case, dp, zero):
        assert runs == [oracle.MODEL["num_layers"] + 1] * STEPS


class Noting(nn.Module):
    """Layer that writes into an argument."""

    def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        seen.append(x)
        return 2 * x


def test_a_compiled_layer_writes_into_the_list_that_it_is_given() -> None:
    layer, seen = Noting(), list[Tensor]()
    change_forward([layer], None, Compile(backend="eager"))
    layer(torch.ones(2), seen)
    assert len(seen) == 1
    torch._dynamo.reset()
