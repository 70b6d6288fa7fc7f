"""Compare the formulas of ZeRO with live tensors, within 5%, and with counted collectives and their bytes."""

from typing import Any, NamedTuple

import pytest
import torch
from dispatch_modes import SentBytes
from marks import matrix
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import parallel
from parallel.degrees import shard_count
from parallel.settings import ITEMSIZE, DType
from uni3d.estimate.zero import MASTER_BYTES, beside_shards, sent

pytestmark = pytest.mark.slow

WIDTH = 256
LAYERS = 8
ACCUMULATION = 3
KEPT = WIDTH**2
"""Elements of the last layer, which stage 3 keeps for the backward pass."""


def held(
    parameters: int,
    *,
    stage: int,
    dp: int,
    shard_group: int | None = None,
    compute_bytes: int = 4,
    reduce_bytes: int = 4,
    accumulation: int = 1,
) -> dict[str, int]:
    """Return the bytes that a rank holds, each at the fullest moment of a step, with Adam's two moments."""
    shards = shard_count(dp, stage, shard_group)
    shard = MASTER_BYTES * parameters // shards
    copies, sums = beside_shards(
        parameters,
        parameters,
        stage=stage,
        shards=shards,
        compute_bytes=compute_bytes,
        reduce_bytes=reduce_bytes,
        accumulation=accumulation,
    )
    copies += compute_bytes * KEPT if stage == 3 and shards > 1 else 0
    return {"parameters": shard + copies, "gradients": max(sums, shard), "optimizer": 2 * shard}


class Net(nn.Module):
    """Model with half a million parameters, divisible by every degree here."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.float().square().sum()


class Case(NamedTuple):
    stage: int
    dp: int
    group: int | None = None
    compute: DType = "fp32"
    reduce: DType = "fp32"
    accumulation: int = ACCUMULATION

    def __str__(self) -> str:
        return f"z{self.stage}dp{self.dp}g{self.group}-{self.compute}-{self.reduce}-{self.accumulation}"

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "dp": self.dp,
            "shard_group": self.group,
            "compute_bytes": ITEMSIZE[self.compute],
            "reduce_bytes": ITEMSIZE[self.reduce],
            "accumulation": self.accumulation,
        }


def calls(case: Case) -> dict[str, int]:
    """Return the number of collectives in a step: one for each layer, where one is needed."""
    every, once = LAYERS * case.accumulation, LAYERS  # in each micro batch, and in a step
    shards = shard_count(case.dp, case.stage, case.group)
    gathers = {0: 0, 1: once, 2: once, 3: 2 * every - case.accumulation}  # the last layer stays gathered
    reductions = {0: 0, 1: once, 2: every, 3: every}
    return {
        "all_reduce": once if case.dp > shards else 0,
        "all_gather": gathers[case.stage] if shards > 1 else 0,
        "reduce_scatter": reductions[case.stage] if shards > 1 else 0,
    }


CASES = [
    *(Case(stage, 2) for stage in range(4)),
    matrix(Case(0, 4, None, "bf16")),
    *(matrix(Case(stage, 4, None, "bf16")) for stage in (1, 2)),
    Case(3, 4, None, "bf16"),
    matrix(Case(1, 4, 2, "bf16", "bf16")),
    matrix(Case(2, 4, 2, "bf16", "bf16")),
    Case(3, 4, 2, "bf16", "bf16"),
    *(matrix(Case(stage, 2, None, "bf16", "fp32", 1)) for stage in (0, 1)),
    *(Case(stage, 2, None, "bf16", "fp32", 1) for stage in (2, 3)),
    Case(3, 1),
    Case(2, 1, None, "bf16"),
]


def memory(*tensors: Tensor | None) -> dict[int, int]:
    """Return the bytes of the tensors' storages, by address."""
    found = {}
    for tensor in tensors:
        if tensor is not None:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            storage = local.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return {pointer: size for pointer, size in found.items() if size}


def live(module: nn.Module) -> tuple[dict[int, int], dict[int, int]]:
    """Return the storages of parameters and of gradients, in every form that torch's fully_shard keeps."""
    parameters: dict[int, int] = {}
    gradients: dict[int, int] = {}
    for owner in module.modules():
        group = owner._get_fsdp_state()._fsdp_param_group if hasattr(owner, "_get_fsdp_state") else None
        if group is None:
            continue
        gradients |= memory(group._partial_reduce_output)
        for record in group.fsdp_params:
            whole = getattr(record, "_unsharded_param", None)
            parameters |= memory(record.sharded_param.detach(), *record.all_gather_outputs)
            gradients |= memory(record.sharded_param.grad, record.unsharded_accumulated_grad)
            gradients |= memory(None if whole is None else whole.grad)
    return parameters, gradients


def case(case: Case) -> Any:
    topology = parallel.Topology(
        parallel.Degrees(pp=1, dp=case.dp, tp=1), zero_stage=case.stage, shard_group=case.group
    )
    settings = parallel.Settings(
        seed=0, zero_stage=case.stage, precision=parallel.Precision(compute=case.compute, reduce=case.reduce)
    )
    torch.manual_seed(0)
    built = parallel.build(Net(), topology, settings)
    optimizer = torch.optim.Adam(built.module.parameters(), foreach=False)
    largest = [0, 0]

    def look(*_: Any) -> None:
        sizes = [sum(storages.values()) for storages in live(built.module)]
        largest[:] = map(max, largest, sizes)

    for _ in range(2):  # the second step is like all later ones
        largest[:] = 0, 0
        with SentBytes() as counted:
            for i in range(case.accumulation):
                loss = built.module(torch.randn(2, WIDTH))
                look()
                with built.zero.backward(last=i + 1 == case.accumulation):
                    loss.backward()
                look()
        built.zero.reshard()
        built.zero.begin_step()
        optimizer.step()
        look()
        optimizer.zero_grad()
    states = [v for s in optimizer.state.values() for v in s.values() if v.ndim > 0]
    total = sum(memory(*states).values())
    return (
        dict(zip(("parameters", "gradients", "optimizer"), (*largest, total), strict=True)),
        counted.bytes,
        counted.calls,
    )


@pytest.mark.parametrize("which", CASES, ids=str)
def test_bytes_and_calls(ranks: Ranks, which: Case) -> None:
    parameters = LAYERS * WIDTH**2
    for found_held, found_sent, found_calls in ranks.run(which.dp, case, which):
        assert found_held == pytest.approx(held(parameters, **which.arguments), rel=0.05)
        expected = sent(parameters, kept=KEPT, **which.arguments)._asdict()
        assert dict(found_sent) == pytest.approx(expected, rel=0.02)
        assert dict(found_calls) == calls(which)
