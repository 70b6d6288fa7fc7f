"""Building takes the memory of a rank's share and about one layer, beside the values that the model has."""

import ctypes
import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from marks import slow
from ranks import Ranks
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import parallel

MIB = 1 << 20
WIDTH = 2048
LAYER = 4 * WIDTH**2
"""Bytes of a layer, which is one matrix in fp32."""


class Net(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))

    @property
    def pipeline_layers(self) -> list[str]:
        return [f"layers.{i}" for i in range(len(self.layers))]

    def loss_fn(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(generator=generator)


def resident(key: str) -> int:
    """Return this process's resident bytes: VmRSS for now, VmHWM for the peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(key))


def build(topology: parallel.Topology, layers: int, device: str) -> parallel.ParallelModel:
    with torch.device(device):
        model = Net(layers)
    return split(model, topology)


def split(model: nn.Module, topology: parallel.Topology) -> parallel.ParallelModel:
    return parallel.build(model, topology, parallel.Settings(seed=0, zero_stage=3))


def start_counting() -> int:
    """Return the resident bytes, from which the peak starts anew."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as counters:
        counters.write("5")
    return resident("VmRSS")


def growth_case(degrees: tuple[int, int], layers: int, device: str, rank: int | None) -> tuple[int, int, int]:
    """Return what building adds to resident memory at its peak and at its end, and the bytes of the share.

    With a `rank`, this process stands for that rank of a group that doesn't exist: building a model on the
    meta device sends nothing.
    """
    pp, dp = degrees
    if rank is not None:
        dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=pp * dp, store=FakeStore())
    topology = parallel.Topology(parallel.Degrees(pp=pp, dp=dp, tp=1), zero_stage=3)
    build(topology, pp, device)  # the first build also loads modules
    before = start_counting()
    built = build(topology, layers, device)
    peak = resident("VmHWM")
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    end = resident("VmRSS")
    share = sum(p.to_local().nbytes for p in built.module.parameters())
    return peak - before, end - before, share


@pytest.mark.parametrize(
    ("degrees", "rank"),
    [((1, 4), None), slow((1, 8), 5), slow((2, 4), 6), slow((1, 64), 9)],
    ids=["dp4", "dp8", "pp2dp4", "dp64"],
)
def test_building_peaks_at_a_share(ranks: Ranks, degrees: tuple[int, int], rank: Any) -> None:
    layers = 16
    parts = degrees[0] * degrees[1]
    started = parts if rank is None else 1
    for peak, end, share in ranks.run(started, growth_case, degrees, layers, "meta", rank):
        assert share == layers * LAYER // parts
        assert end == pytest.approx(share, abs=2 * MIB)
        assert peak < share + 3 * MIB


def test_a_model_on_the_cpu_is_built_whole(ranks: Ranks) -> None:
    """Check that the test above would notice a model that is built whole."""
    layers = 8
    for peak, _, _ in ranks.run(4, growth_case, (1, 4), layers, "cpu", None):
        assert peak > layers * LAYER // 2, "not all, as the system may take back what isn't in use"


def split_growth_case(dtype: torch.dtype, layers: int) -> tuple[int, int]:
    """Return what splitting a model that has values adds to resident memory, at its peak and at its end."""
    topology = parallel.Topology(parallel.Degrees(pp=1, dp=4, tp=1), zero_stage=3)
    split(Net(1).to(dtype), topology)
    model = Net(layers).to(dtype)
    before = start_counting()
    built = split(model, topology)
    peak = resident("VmHWM")
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    assert {p.dtype for p in built.module.parameters()} == {torch.float32}
    return peak - before, resident("VmRSS") - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_on_the_cpu_is_split_layer_by_layer(ranks: Ranks, dtype: torch.dtype) -> None:
    """Check that no copy of the whole is made, in fp32 least of all, and that values are given up."""
    layers = 8
    share, whole = layers * LAYER // 4, layers * LAYER * dtype.itemsize // 4
    for peak, end in ranks.run(4, split_growth_case, dtype, layers):
        assert peak < share + LAYER + 2 * MIB
        # Gloo's threads may release the memory of the last collective a moment later.
        assert end < share - whole + LAYER + 2 * MIB
