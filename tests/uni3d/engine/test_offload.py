"""CPU offload: the same steps at every ZeRO stage, precision and topology; on a GPU, states on the host."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from engines import CLIP, build_engine
from model import GPT, GPTConfig
from models import Stack, assert_same, global_batches, micro_batches, seeded, train_plainly, whole
from ranks import Ranks
from torch import nn
from torch.distributed.fsdp import FSDPModule

from parallel import Degrees, Precision, start_process_group
from parallel.settings import DType

pytestmark = pytest.mark.slow

STEPS = 3


def run_case(degrees: Degrees, zero: int, group: int | None, precision: DType, offload: bool) -> Any:
    engine = build_engine(
        seeded(Stack),
        degrees,
        zero=zero,
        group=group,
        config={} if precision == "fp32" else {precision: {"enabled": True}},
        precision=Precision(compute=precision),
        offload=offload,
    )
    for owner in engine.module.modules():
        if isinstance(owner, FSDPModule) and (group_of := owner._get_fsdp_state()._fsdp_param_group):
            assert all(record.offload_to_cpu == offload for record in group_of.fsdp_params)
    data, losses, norms = micro_batches(global_batches(STEPS), engine), [], []
    for _ in range(STEPS):
        losses.append(engine.train_batch(data).item())
        norms.append(engine.get_global_grad_norm())
    return losses, norms, whole(engine.module)


def on(pp: int, dp: int) -> Degrees:
    return Degrees(pp=pp, dp=dp, tp=1)


@pytest.mark.parametrize(
    ("degrees", "zero", "group"),
    [(on(1, 2), 0, None), (on(2, 2), 1, None), (on(1, 2), 2, None), (on(2, 2), 3, None), (on(1, 4), 2, 2)],
    ids=str,
)
def test_training_is_the_oracles(ranks: Ranks, degrees: Degrees, zero: int, group: int | None) -> None:
    losses, norms, model = train_plainly(seeded(Stack), global_batches(STEPS), clip=CLIP)
    together = {}
    for found, found_norms, state in ranks.run(
        degrees.pp * degrees.dp, run_case, degrees, zero, group, "fp32", True
    ):
        assert found == pytest.approx(losses, rel=1e-5)
        assert found_norms == pytest.approx(norms, rel=1e-5)
        together |= state
    assert_same(together, model)


@pytest.mark.parametrize("zero", [0, 1, 2, 3], ids="zero{}".format)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_the_same_bits_with_offload(ranks: Ranks, precision: DType, zero: int) -> None:
    places = on(1, 2), zero, None, precision
    expected = ranks.run(2, run_case, *places, False)
    found = ranks.run(2, run_case, *places, True)
    for (losses, norms, state), wanted in zip(found, expected, strict=True):
        assert (losses, norms) == wanted[:2]
        assert all(torch.equal(state[name], wanted[2][name]) for name in wanted[2])


def tensor_parallel_case(zero: int) -> Any:
    with torch.device("meta"):
        model = GPT(GPTConfig(**oracle.MODEL))
    engine = build_engine(model, Degrees(pp=1, dp=2, tp=2), zero=zero, seed=oracle.SEED, offload=True)
    inputs, targets = (x[:12].chunk(2)[engine.model.topology.dp_rank] for x in oracle.samples())
    micro = iter(zip(inputs.split(1), targets.split(1), strict=True))
    loss = engine.train_batch(micro).item()
    return loss, engine.get_global_grad_norm(), whole(engine.module)


@pytest.mark.parametrize("zero", [1, 3], ids="zero{}".format)
def test_a_model_from_the_meta_device_under_tensor_parallelism(ranks: Ranks, zero: int) -> None:
    model = oracle.initial_model(oracle.MODEL)
    inputs, targets = (x[:12] for x in oracle.samples())
    loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), CLIP))
    torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1, eps=0.01).step()
    for found, found_norm, state in ranks.run(4, tensor_parallel_case, zero):
        assert found == pytest.approx(loss.item(), rel=1e-5)
        assert found_norm == pytest.approx(norm, rel=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(state[name], parameter.detach(), rtol=1e-4, atol=1e-6, msg=name)


def gpu_case(zero: int, precision: DType) -> Any:
    config = {} if precision == "fp32" else {precision: {"enabled": True}}
    engine = build_engine(
        seeded(Stack),
        on(1, 1),
        zero=zero,
        device="cuda",
        config=config,
        precision=Precision(compute=precision),
        offload=True,
    )
    losses = []
    data = micro_batches(global_batches(STEPS), engine)
    for _ in range(STEPS):
        losses.append(engine.train_batch(data).item())
    assert engine.optimizer is not None
    tensors = [*engine.parameters(), *(t for s in engine.optimizer.state.values() for t in s.values())]
    return losses, {t.device.type for t in tensors}, whole(engine.module)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("zero", [0, 1, 2, 3], ids="zero{}".format)
def test_on_a_gpu_parameters_and_states_lie_on_the_host(alone: None, zero: int) -> None:
    start_process_group("cuda")
    losses, _, model = train_plainly(seeded(Stack), global_batches(STEPS), clip=CLIP)
    found, devices, state = gpu_case(zero, "fp32")
    assert devices == {"cpu"}
    assert found == pytest.approx(losses, rel=1e-4)
    assert_same(state, model)
    assert gpu_case(zero, "bf16")[0] == pytest.approx(losses, rel=0.05)
