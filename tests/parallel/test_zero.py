"""ZeRO: elements that each rank holds at each moment, and gradients as sums over ranks."""

from typing import Any
from unittest import mock

import pytest
import torch
from marks import STAGES, slow
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import parallel
from parallel import sums
from parallel.settings import DType

DP = 3


class Net(nn.Module):
    """A model with two units and a root, of sizes that 3 doesn't divide, one of them smaller than 3."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 5)])
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(x).square().sum()


def net() -> Net:
    torch.manual_seed(2)
    return Net()


def data() -> Tensor:
    """Return two micro batches for each rank, `(2, DP, samples, features)`."""
    return torch.randn(2, DP, 4, 5, generator=torch.Generator().manual_seed(3))


def shard_size(shape: torch.Size, rank: int) -> int:
    """Return the elements of a rank's shard: `ceil(n / DP)` rows, the rest on the last ranks."""
    rows = -(-shape[0] // DP)
    mine = max(0, min(rows, shape[0] - rank * rows))
    return mine * shape[1:].numel()


def local(tensor: Tensor) -> int:
    """Return the elements in this rank's memory, without padding."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()


def sizes(built: parallel.ParallelModel) -> dict[str, tuple[int, int]]:
    """Return the elements of parameters and of gradients that this rank holds now."""
    return {
        name: (local(p), 0 if p.grad is None else local(p.grad))
        for name, p in built.module.named_parameters()
    }


def memory_case(stage: int) -> dict[str, Any]:
    topology = parallel.Topology(parallel.Degrees(pp=1, dp=DP, tp=1), zero_stage=stage)
    built = parallel.build(net(), topology, parallel.Settings(zero_stage=stage, seed=0))
    optimizer = torch.optim.Adam(built.module.parameters())
    seen: dict[str, Any] = {"start": sizes(built)}
    for i, micro in enumerate(data()):
        loss = built.module(micro[topology.dp_rank])
        seen[f"forward {i}"] = sizes(built)
        with built.zero.backward(last=i == 1):
            loss.backward()
        seen[f"backward {i}"] = sizes(built)
        if i == 0 and stage == 2:
            built.zero.reshard()  # the whole parameters are in front of the sharded ones
            seen["resharded"] = sizes(built)
    gradients = {n: p.grad.full_tensor() for n, p in built.module.named_parameters()}
    optimizer.step()
    parameters = dict(built.module.named_parameters())
    seen["moments"] = {n: local(optimizer.state[p]["exp_avg"]) for n, p in parameters.items()}
    return {"seen": seen, "gradients": gradients}


def both(parameters: dict[str, int], gradients: dict[str, int]) -> dict[str, tuple[int, int]]:
    return {name: (parameters[name], gradients[name]) for name in parameters}


@pytest.mark.parametrize("stage", STAGES)
def test_each_rank_holds_what_its_stage_says(ranks: Ranks, stage: int) -> None:
    model = net()
    model(data().flatten(0, 2)).backward()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for rank, result in enumerate(ranks.run(DP, memory_case, stage)):
        whole = {name: shape.numel() for name, shape in shapes.items()}
        shard = {name: shard_size(shape, rank) for name, shape in shapes.items()}
        kept = whole if stage == 0 else shard
        # At stage 3 the last layer and what is in none stay for the backward pass, which begins with them.
        freed = {name: size for name, size in shard.items() if name.startswith("layers.0.")}
        during = whole | freed if stage == 3 else whole
        nothing = dict.fromkeys(shapes, 0)
        seen = result["seen"]
        assert seen["start"] == both(kept, nothing)
        assert seen["forward 0"] == both(during, nothing)
        if stage <= 1:
            assert seen["backward 0"] == both(whole, whole), "gradients are whole while they accumulate"
        elif stage == 2:
            assert seen["backward 0"] == both(whole, nothing), "reduced at once, behind whole parameters"
            assert seen["resharded"] == both(shard, shard)
        else:
            assert seen["backward 0"] == both(shard, shard)
        assert seen["backward 1"] == both(kept, kept), "at the boundary"
        assert seen["moments"] == kept
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(result["gradients"][name], parameter.grad, msg=f"sum of {name}")


class Added(nn.Module):
    """Model in which gradients of two parameters are one tensor, which the backward pass still reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 40_000)
        self.a = nn.Parameter(torch.ones(200, 200))
        self.b = nn.Parameter(torch.ones(200, 200))

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x) + self.a.view(1, -1) + self.b.view(1, -1)).square().sum()


def added() -> Added:
    torch.manual_seed(2)
    return Added()


def added_case() -> dict[str, Tensor]:
    topology = parallel.Topology(parallel.Degrees(pp=1, dp=DP, tp=1), zero_stage=0)
    built = parallel.build(added(), topology, parallel.Settings(zero_stage=0, seed=0))
    loss = built.module(torch.full((1, 5), 1.0 + topology.dp_rank))
    with built.zero.backward(last=True):
        loss.backward()
    return {name: p.grad.full_tensor() for name, p in built.module.named_parameters()}


def test_gradients_that_share_their_memory(ranks: Ranks) -> None:
    model = added()
    parameters = dict(model.named_parameters())
    # Not by backward(), which adds to the shared memory once for each of the two parameters.
    losses = [model(torch.full((1, 5), 1.0 + rank)) for rank in range(DP)]
    sums = torch.autograd.grad(torch.stack(losses).sum(), list(parameters.values()))
    for gradients in ranks.run(DP, added_case):
        for name, expected in zip(parameters, sums, strict=True):
            torch.testing.assert_close(gradients[name], expected, msg=f"sum of {name}")


class Heads(nn.Module):
    """Model with an embedding before its layers, and after them a norm and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)
        self.other = nn.Linear(4, 2)

    def forward(self, tokens: Tensor, both: bool) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return self.head(x).sum() + (self.other(x).sum() if both else 0)


class Late(Heads):
    """The same, with its embedding registered after the layers."""

    def __init__(self) -> None:
        super().__init__()
        embed = self.embed
        del self.embed
        self.embed = embed


def order_case(both: list[bool], model: type[Heads] = Heads) -> list[list[list[str]]]:
    """Return, for each of two steps, the gradients that were summed together, and the backward pass's end."""
    topology = parallel.Topology(parallel.Degrees(pp=1, dp=2, tp=1), zero_stage=0)
    built = parallel.build(model(), topology, parallel.Settings(zero_stage=0, seed=0))
    names = {id(p): name for name, p in built.module.named_parameters()}
    steps: list[list[list[str]]] = []
    start = sums.WholeSums.start

    def spied(self: Any, layer: Any) -> None:
        steps[-1].append([names[id(record.sharded_param)] for record in layer.fsdp_params])
        start(self, layer)

    with mock.patch.object(sums.WholeSums, "start", spied):
        for _ in range(2):
            steps.append([])
            loss = built.module(torch.arange(9), both[topology.dp_rank])
            with built.zero.backward(last=True):
                loss.backward()
                steps[-1].append(["the end"])
            built.zero.drop_gradients()
    return steps


AFTER = [f"{part}.{kind}" for part in ("norm", "head", "other") for kind in ("weight", "bias")]
LAYERS = [[f"layers.{i}.weight", f"layers.{i}.bias"] for i in (1, 0)]


def test_sums_follow_the_backward_pass(ranks: Ranks) -> None:
    """The head is summed before the layers, and the embedding after them."""
    whole = [AFTER, *LAYERS, ["embed.weight"], ["the end"]]
    assert ranks.run(2, order_case, [True, True]) == [[whole, whole]] * 2


def test_a_head_that_a_rank_never_uses_holds_up_the_first_step_alone(ranks: Ranks) -> None:
    first, then = zip(*ranks.run(2, order_case, [True, False]), strict=True)
    summed, end, root = [AFTER, *LAYERS, ["embed.weight"]], ["the end"], ["embed.weight", *AFTER]
    assert first == ([*summed, end], [end, *summed])
    assert then == ([*LAYERS, root, end], [*LAYERS, end, root])


def test_an_embedding_registered_last_holds_up_the_first_step_alone(ranks: Ranks) -> None:
    root = [*AFTER, "embed.weight"]
    steps = [[root, *LAYERS, ["the end"]], [*LAYERS, root, ["the end"]]]
    assert ranks.run(2, order_case, [True, True], Late) == [steps] * 2


def unknown_case() -> str:
    topology = parallel.Topology(parallel.Degrees(pp=1, dp=1, tp=1), zero_stage=1)
    with pytest.raises(ValueError, match="ZeRO stage") as caught:
        parallel.build(net(), topology, parallel.Settings(zero_stage=4, seed=0))
    return str(caught.value)


def test_an_unknown_stage(ranks: Ranks) -> None:
    assert ranks.run(1, unknown_case) == ["ZeRO stage 4 doesn't exist; expected 0, 1, 2 or 3"]


def records_case() -> str:
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    topology = parallel.Topology(parallel.Degrees(pp=1, dp=1, tp=1), zero_stage=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(FSDPParam, "free_unsharded_param")  # as if a later torch had renamed it
        with pytest.raises(RuntimeError, match="fully_shard of torch") as caught:
            parallel.build(net(), topology, parallel.Settings(zero_stage=1, seed=0))
    return str(caught.value)


def test_a_torch_with_other_records_is_refused(ranks: Ranks) -> None:
    assert ranks.run(1, records_case) == [
        f"fully_shard of torch {torch.__version__} has no free_unsharded_param, which ZeRO needs; "
        "use a torch from 2.11 to 2.13"
    ]


def persistent_case(threshold: int) -> dict[str, tuple[int, int]]:
    topology = parallel.Topology(parallel.Degrees(pp=1, dp=DP, tp=1), zero_stage=3)
    settings = parallel.Settings(zero_stage=3, seed=0, persistence_threshold=threshold)
    built = parallel.build(net(), topology, settings)
    loss = built.module(data()[0, topology.dp_rank])
    seen = sizes(built)
    with built.zero.backward(last=True):
        loss.backward()
    assert all(local(p) <= shard_size(p.shape, topology.dp_rank) for p in built.module.parameters())
    return seen


def test_small_layers_stay_whole_from_forward_to_backward(ranks: Ranks) -> None:
    """Use layers of 42 and 40 elements, and 12 elements in the root."""
    shapes = {name: p.shape for name, p in net().named_parameters()}
    for rank, seen in enumerate(ranks.run(DP, persistent_case, 42)):
        for name, (held, _) in seen.items():
            small = name.startswith(("layers.1", "out"))
            assert held == (shapes[name].numel() if small else shard_size(shapes[name], rank)), name


def reduced_case(reduce: DType, scale: float = 1.0, sample: int | None = None) -> dict[str, Tensor]:
    """Return the summed gradients of each rank's own data, or of one sample on all ranks."""
    topology = parallel.Topology(parallel.Degrees(pp=1, dp=DP, tp=1), zero_stage=2)
    settings = parallel.Settings(zero_stage=2, seed=0, precision=parallel.Precision(reduce=reduce))
    built = parallel.build(net(), topology, settings)
    with built.zero.backward(last=True):
        (built.module(data()[0, topology.dp_rank if sample is None else sample]) * scale).backward()
    return {n: p.grad.full_tensor() for n, p in built.module.named_parameters()}


@pytest.mark.parametrize("reduce", ["bf16", slow("fp16")])
def test_gradients_are_reduced_in_the_type_that_was_chosen(ranks: Ranks, reduce: DType) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[reduce]
    model, parts = net(), []
    for rank in range(DP):
        model.zero_grad()
        model(data()[0, rank]).backward()
        parts.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    found = ranks.run(DP, reduced_case, reduce)[0]
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, gradient.to(dtype).float()), "it was summed in that type"
        terms = torch.stack([part[name] for part in parts])
        # Each term is rounded once, and each partial sum once.
        bound = torch.finfo(dtype).eps * terms.abs().sum(0) * DP / 2 + torch.finfo(dtype).tiny
        assert torch.all((gradient - terms.sum(0)).abs() <= bound), name


def test_a_sum_that_overflows_in_fp16_is_not_finite(ranks: Ranks) -> None:
    model = net()
    model(data()[0, 0]).backward()
    largest = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    scale = 60_000 / largest  # a single rank's gradients are finite in fp16
    for gradients in ranks.run(DP, reduced_case, "fp16", scale, 0):
        assert not all(g.isfinite().all() for g in gradients.values())
    for gradients in ranks.run(DP, reduced_case, "fp16", scale / (DP + 0.1), 0):
        assert all(g.isfinite().all() for g in gradients.values())
