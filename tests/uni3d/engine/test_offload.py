"""CPU offload: the same steps at every ZeRO stage, precision and topology; on a GPU, states on the host."""

from typing import Any

import oracle
import pytest
import torch
from marks import matrix
from model import GPT, GPTConfig
from models import (
    Stack,
    assert_same,
    global_batches,
    make_engine,
    micro_batches,
    seeded,
    take_steps,
    train_plainly,
    whole,
)
from ranks import Ranks
from torch import nn
from torch.distributed.fsdp import FSDPModule

pytestmark = pytest.mark.slow

STEPS, CLIP = 3, 0.5


def run_case(pp: int, zero: int, group: int, precision: str, offload: bool) -> Any:
    config = {} if precision == "fp32" else {precision: {"enabled": True}}
    how = {"pp": pp, "zero": zero, "group": group, "offload": offload}
    engine = make_engine(seeded(Stack), micro=1, clip=CLIP, config=config, **how)
    for owner in engine.module.modules():
        if isinstance(owner, FSDPModule) and (group_of := owner._get_fsdp_state()._fsdp_param_group):
            assert all(record.offload_to_cpu == offload for record in group_of.fsdp_params)
    losses, norms = take_steps(engine, STEPS, micro_batches(global_batches(STEPS), engine))
    return losses, norms, engine.module_state_dict()


@pytest.mark.parametrize(
    ("world", "pp", "zero", "group"), [(4, 2, 1, -1), (2, 1, 2, -1), (4, 2, 3, -1), (4, 1, 2, 2)]
)
def test_training_is_the_oracles(ranks: Ranks, world: int, pp: int, zero: int, group: int) -> None:
    losses, norms, model = train_plainly(seeded(Stack), global_batches(STEPS), clip=CLIP)
    together = {}
    for found, found_norms, state in ranks.run(world, run_case, pp, zero, group, "fp32", True):
        assert found == pytest.approx(losses, rel=1e-5)
        assert found_norms == pytest.approx(norms, rel=1e-5)
        together |= state
    assert_same(together, model)


@pytest.mark.parametrize("zero", [matrix(1), matrix(2), 3], ids="zero{}".format)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_the_same_bits_with_offload(ranks: Ranks, precision: str, zero: int) -> None:
    expected = ranks.run(2, run_case, 1, zero, -1, precision, False)
    found = ranks.run(2, run_case, 1, zero, -1, precision, True)
    for (losses, norms, state), wanted in zip(found, expected, strict=True):
        assert (losses, norms) == wanted[:2]
        assert all(torch.equal(state[name], wanted[2][name]) for name in wanted[2])


def tensor_parallel_case(zero: int) -> Any:
    with torch.device("meta"):
        model = GPT(GPTConfig(**oracle.MODEL))
    split = {"parallel": {"dp": 2, "tp": 2, "device": "cpu"}, "seed": oracle.SEED}
    engine = make_engine(model, zero=zero, micro=1, clip=CLIP, offload=True, config=split)
    inputs, targets = (x[:12].chunk(2)[engine.model.topology.dp_rank] for x in oracle.samples())
    micro = iter(zip(inputs.split(1), targets.split(1), strict=True))
    return *take_steps(engine, 1, micro), whole(engine.module)


@pytest.mark.parametrize("zero", [matrix(1), 3], ids="zero{}".format)
def test_a_model_from_the_meta_device_under_tensor_parallelism(ranks: Ranks, zero: int) -> None:
    model = oracle.initial_model(oracle.MODEL)
    inputs, targets = (x[:12] for x in oracle.samples())
    loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), CLIP))
    torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1, eps=0.01).step()
    for losses, norms, state in ranks.run(4, tensor_parallel_case, zero):
        assert losses == pytest.approx([loss.item()], rel=1e-5)
        assert norms == pytest.approx([norm], rel=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(state[name], parameter.detach(), rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("zero", [1, 2, 3], ids="zero{}".format)
def test_on_a_gpu_parameters_and_states_lie_on_the_host(alone: None, zero: int) -> None:
    expected, _, model = train_plainly(seeded(Stack), global_batches(STEPS), clip=CLIP)
    for config in ({}, {"bf16": {"enabled": True}}):
        config = config | {"parallel": {"device": "cuda"}}
        engine = make_engine(seeded(Stack), zero=zero, clip=CLIP, offload=True, config=config)
        losses, _ = take_steps(engine, STEPS, micro_batches(global_batches(STEPS), engine))
        assert losses == pytest.approx(expected, rel=0.05 if "bf16" in config else 1e-4)
        states = [tensor for state in engine.optimizer.state.values() for tensor in state.values()]
        assert {tensor.device.type for tensor in (*engine.parameters(), *states)} == {"cpu"}
        if "bf16" not in config:
            assert_same(whole(engine.module), model)
