"""Compare the parts of a planned job with the real model, and its pipeline with a simulation.

`test_plan_measured.py` compares the whole with real ranks.
"""

import itertools
import json
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model import GPT, GPTConfig, next_token_loss
from torch import Tensor, nn
from torch.distributed.pipelining import schedules

import parallel
from parallel import layers as blocks
from parallel.stages import Chain, split_layers
from uni3d.estimate.activations import of_link, of_loss
from uni3d.estimate.gpt import GPTShape, from_model_config
from uni3d.estimate.job import Job
from uni3d.estimate.memory import in_flight, memory, worst
from uni3d.estimate.save import on_paper
from uni3d.estimate.search import judge, propose
from uni3d.estimate.step import Machine
from uni3d.estimate.traffic import bubble

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "megatron_gpt" / "configs"
SMALL: dict[str, Any] = {"vocab_size": 500, "hidden_size": 64, "num_layers": 3, "num_heads": 4}
KINDS: list[dict[str, Any]] = [
    {"norm": norm, "positions": positions, "activation": activation, "tied_head": tied, "num_kv_heads": kv}
    for norm, positions, activation, (tied, kv) in itertools.product(
        ["rmsnorm", "layernorm"], ["rotary", "learned"], ["swiglu", "gelu"], [(True, 2), (False, None)]
    )
]


def real_model(model: dict[str, Any]) -> GPT:
    with torch.device("meta"):
        return GPT(GPTConfig(**model))


def make_job(shape: GPTShape, pp: int = 1, dp: int = 1, tp: int = 1, zero: int = 1, **settings: Any) -> Job:
    defaults: dict[str, Any] = {"seq_len": 64, "micro_batch": 2, "accumulation": 4}
    defaults |= {"precision": "fp32", "device": "cpu"}
    return Job(shape=shape, ranks=parallel.Ranks(pp=pp, dp=dp, tp=tp, zero=zero), **(defaults | settings))


# --- the shape -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))
def test_a_shape_has_the_real_models_parameters(kind: dict[str, Any]) -> None:
    model, shape = real_model(SMALL | kind), from_model_config(SMALL | kind)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    named = {f"{link.name}.{w.name}": w for link in shape.links for w in link.weights}
    assert {name: w.shape for name, w in named.items()} == {
        name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)
    }
    assert {name for name, w in named.items() if not w.same_as} == {
        name for name, _ in model.named_parameters()
    }


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda p: p.stem)
def test_the_examples_configs_are_counted(path: Path) -> None:
    model = json.loads(path.read_text())["model"]
    assert from_model_config(model).parameters == sum(p.numel() for p in real_model(model).parameters())


@pytest.mark.parametrize("pp", [1, 2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_stages_and_units_are_those_of_training(pp: int, tied: bool) -> None:
    job = make_job(from_model_config(SMALL | {"tied_head": tied}), pp=pp)
    whole = real_model(SMALL | {"tied_head": tied})
    for kept, stage in zip(split_layers(whole, whole.pipeline_layers, pp), job.stages, strict=True):
        assert [link.name for link in stage.links] == kept
        chain = Chain(real_model(SMALL | {"tied_head": tied}), [kept])
        (stretch,) = chain.stretches()
        gathered = blocks.units(stretch, list(stretch))
        units = [{id(p) for p in unit.parameters()} for unit in gathered]
        sizes = [sum(p.numel() for p in unit.parameters()) for unit in gathered]
        assert [job.whole(unit) for unit in stage.units if unit] == sizes
        rest = {id(p): p.numel() for p in chain.parameters() if not any(id(p) in unit for unit in units)}
        assert job.whole(stage.root) == sum(rest.values())


def test_the_size_of_a_part_is_the_largest_ranks() -> None:
    """Rows are cut by `ceil`, and a rank with fewer pads."""
    shape = from_model_config(SMALL)
    job = make_job(shape, dp=3)
    weights = [w for link in shape.links for w in link.weights]
    expected = sum(-(-w.shape[0] // 3) * prod(w.shape[1:]) for w in weights)
    stage = job.stages[0]
    assert sum(job.shard(unit) for unit in [*stage.units, stage.root]) == expected


def test_a_tied_head_is_saved_once() -> None:
    figures = on_paper(
        from_model_config(SMALL | {"tied_head": True}), parallel.Ranks(pp=2, dp=2, tp=1, zero=1)
    )
    parameters = sum(p.numel() for p in real_model(SMALL | {"tied_head": True}).parameters())
    assert figures.parameters == parameters
    assert sum(figures.written) == 12 * parameters


# --- activations ---------------------------------------------------------------------------------------


def saved(module: nn.Module, function: Any, *inputs: Tensor) -> int:
    """Return the bytes that autograd saves in a call, each storage once, without the module's parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            found[tensor.untyped_storage().data_ptr()] = tensor  # keeps the memory from being reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))
def test_activations_are_those_that_autograd_saves(kind: dict[str, Any], precision: str) -> None:
    options = SMALL | kind | {"hidden_size": 128, "num_layers": 1}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = GPT(GPTConfig(**options)).to(dtype)
    job = make_job(from_model_config(options), precision=precision)
    tokens = torch.randint(0, 500, (2, 64))
    wide = torch.randn(2, 64, 128, dtype=dtype, requires_grad=True)
    links = {link.name: of_link(job, link, recomputed=False).kept for link in job.shape.links}
    assert links["embed"] == saved(model.embed, model.embed, tokens)
    assert links["norm"] == saved(model.norm, model.norm, wide)
    assert links["head"] == saved(model.head, model.head, wide)
    # autograd also saves the tables of rotary angles, which all layers share in fp32.
    shared = 2 * 64 * 16 * 4 if kind["positions"] == "rotary" and precision == "fp32" else 0
    assert links["layers.0"] == saved(model.layers[0], model.layers[0], wide) - shared
    logits = torch.randn(2, 64, 500, requires_grad=True)
    kept, _ = of_loss(job)
    ids = tokens.nbytes + 4  # the targets and their number
    assert kept == saved(nn.Identity(), next_token_loss, logits, tokens) - ids + logits.nbytes


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_keeps_less(mode: str) -> None:
    job = make_job(from_model_config(SMALL), recompute=mode)
    layer = job.shape.links[1]
    kept, whole = of_link(job, layer, recomputed=True), of_link(job, layer, recomputed=False)
    assert kept.again == whole.kept
    wide = 4 * job.tokens * 64
    if mode == "full":
        assert kept.kept == wide  # its input
    else:  # input, q, k, v, attention, o; gate, up, down; logarithms of the softmax's sums
        assert kept.kept == wide * 7 + 2 * 4 * job.tokens * job.shape.ffn + 4 * job.tokens * 4


def test_every_other_layer_is_half_the_saving() -> None:
    shape = from_model_config(SMALL | {"num_layers": 8, "vocab_size": 8})
    job = make_job(shape, accumulation=1)
    totals = [
        memory(replace(job, recompute="full" if every else "none", every=every or 1))[0].peak.activations
        for every in (0, 2, 1)
    ]
    assert totals[0] > totals[1] > totals[2]
    assert totals[1] == pytest.approx((totals[0] + totals[2]) / 2, rel=0.2)


def test_tensor_parallelism_splits_activations() -> None:
    """It splits those inside attention and feed-forward; sequence parallelism also splits the norms'."""
    shape = from_model_config(SMALL)
    kept = [
        of_link(make_job(shape, tp=tp, sequence_parallel=sequence), shape.links[1], recomputed=False).kept
        for tp, sequence in [(1, False), (2, False), (2, True)]
    ]
    wide = 4 * 128 * 64
    assert kept[0] - kept[1] == (5 * wide + 4 * 4 * 128 * shape.ffn + 4 * 128 * 4) // 2
    assert kept[1] - kept[2] == 2 * (2 * wide + 4 * 128) // 2


# --- a simulated pipeline --------------------------------------------------------------------------------


def plain_orders(pp: int, m: int, schedule: str) -> dict[int, list[Any]]:
    """Return each rank's actions in GPipe or 1F1B, which torch's schedules keep to themselves."""
    forward, backward = schedules._ComputationType.FORWARD, schedules._ComputationType.FULL_BACKWARD
    orders = {}
    for rank in range(pp):
        warm = m if schedule == "gpipe" else min(pp - rank, m)
        steps = [(forward, i) for i in range(warm)]
        for i in range(m):
            steps += [(backward, i)] + ([(forward, warm + i)] if warm + i < m else [])
        orders[rank] = [schedules._Action(rank, kind, i) for kind, i in steps]
    return orders


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("pp", "m"), [(1, 3), (2, 2), (4, 2), (4, 4), (4, 12), (3, 7)])
def test_bubble_and_micro_batches_in_flight(schedule: str, pp: int, m: int) -> None:
    shape = from_model_config(SMALL | {"num_layers": 8})
    job = make_job(shape, pp=pp, accumulation=m, schedule=schedule)
    time, most = play(plain_orders(pp, m, schedule if m >= pp else "gpipe"), pp - 1)
    assert bubble(job) == pytest.approx(1 - 3 * m / time)
    if pp > 1:
        assert [in_flight(job, rank) for rank in range(pp)] == most


TORCHS = [
    ("interleaved", schedules.ScheduleInterleaved1F1B, 2),
    ("interleaved", schedules.ScheduleInterleaved1F1B, 3),
    ("zero_bubble", schedules.ScheduleInterleavedZeroBubble, 1),
    ("zero_bubble", schedules.ScheduleInterleavedZeroBubble, 2),
    ("zero_bubble_v", schedules.ScheduleZBVZeroBubble, 2),
]


def torchs_orders(kind: Any, pp: int, v: int, m: int) -> dict[int, list[Any]]:
    """Return each rank's actions in one of torch's schedules: `(stage, F, B, I or W, micro batch)`."""
    stages = [
        SimpleNamespace(
            stage_index=i * pp,
            num_stages=pp * v,
            group_size=pp,
            group_rank=0,
            group=None,
            has_backward=True,
            is_first=i == 0,
            is_last=False,
            device="cpu",
            submod=None,
            stage_index_to_group_rank=None,
        )
        for i in range(v)
    ]
    orders = kind(stages, m, loss_fn=lambda *_: None).pipeline_order
    return {rank: [action for action in actions if action is not None] for rank, actions in orders.items()}


def play(orders: dict[int, list[Any]], last_stage: int) -> tuple[float, list[int]]:
    """Simulate a pipeline in which a forward and each half of a backward take 1.

    Return the time, and the largest number of micro batches in flight on each rank: until their second half
    is done.
    """
    kinds = schedules._ComputationType
    todo = {rank: list(actions) for rank, actions in orders.items()}
    done: dict[tuple[str, int, int], float] = {}
    clock, held, most = [0.0] * len(todo), [0] * len(todo), [0] * len(todo)
    while any(todo.values()):
        for rank, actions in todo.items():
            while actions:
                first = actions[0]
                stage, kind, i = first.stage_index, first.computation_type, first.microbatch_index
                needs = []
                if kind == kinds.FORWARD and stage > 0:
                    needs = [("F", stage - 1, i)]
                elif kind in (kinds.FULL_BACKWARD, kinds.BACKWARD_INPUT) and stage < last_stage:
                    needs = [("B", stage + 1, i)]
                if any(need not in done for need in needs):
                    break
                begin = max([clock[rank], *(done[need] for need in needs)])
                clock[rank] = begin + (2 if kind == kinds.FULL_BACKWARD else 1)
                if kind != kinds.BACKWARD_WEIGHT:
                    done["F" if kind == kinds.FORWARD else "B", stage, i] = clock[rank]
                held[rank] += (kind == kinds.FORWARD) - (kind in (kinds.FULL_BACKWARD, kinds.BACKWARD_WEIGHT))
                most[rank] = max(most[rank], held[rank])
                actions.pop(0)
    return max(clock), most


@pytest.mark.parametrize(("schedule", "kind", "v"), TORCHS)
@pytest.mark.parametrize(("pp", "m"), [(2, 4), (4, 8), (4, 16)])
def test_torchs_other_schedules(schedule: str, kind: Any, v: int, pp: int, m: int) -> None:
    shape = from_model_config(SMALL | {"num_layers": 16})
    job = make_job(shape, pp=pp, accumulation=m, schedule=schedule, virtual_stages=v)
    time, most = play(torchs_orders(kind, pp, v, m), pp * v - 1)
    assert bubble(job) == pytest.approx(1 - 3 * m * v / time)
    assert [in_flight(job, rank) for rank in range(pp)] == most


# --- proposals -------------------------------------------------------------------------------------------

MACHINE = Machine(flops=1e14, inside=3e11, between=5e10, ranks_per_node=8)
BIG = from_model_config(
    {"vocab_size": 50304, "hidden_size": 2048, "num_layers": 24, "num_heads": 16, "norm": "layernorm"}
)


def test_proposals_are_the_quickest_that_fit() -> None:
    job = make_job(BIG, dp=16, seq_len=2048, micro_batch=2, accumulation=4, precision="bf16", device="cuda")
    limit = 8 * 2**30
    found = propose(job, 16, limit, MACHINE)
    assert len(found) > 3
    seconds = [proposal.cost.seconds for proposal in found]
    assert seconds == sorted(seconds)
    for proposal in found:
        assert proposal.job.ranks.total == 16
        assert proposal.job.batch == job.batch
        assert proposal == judge(proposal.job, MACHINE)
        assert worst(memory(proposal.job)).peak.total == proposal.need <= limit
    # No other setting of the best split fits and is faster.
    best = min(found, key=lambda proposal: proposal.cost.seconds)
    ranks = best.job.ranks
    for zero, mode, micro in itertools.product(range(4), ["none", "selective", "full"], [1, 2, 4, 8]):
        share = job.batch // ranks.dp
        if share % micro == 0:
            other = judge(
                replace(
                    best.job,
                    ranks=replace(ranks, zero=zero),
                    recompute=mode,
                    micro_batch=micro,
                    accumulation=share // micro,
                ),
                MACHINE,
            )
            assert other.need > limit or other.cost.seconds >= best.cost.seconds


def test_less_memory_is_more_recomputation_or_more_ranks() -> None:
    job = make_job(BIG, dp=16, seq_len=2048, micro_batch=2, accumulation=4, precision="bf16", device="cuda")
    roomy, tight = (propose(job, 16, gib * 2**30, MACHINE)[0] for gib in (80, 6))
    assert tight.need <= 6 * 2**30 < roomy.need
    assert tight.cost.seconds > roomy.cost.seconds


def test_if_nothing_fits_the_nearest_is_named() -> None:
    job = make_job(BIG, dp=2, seq_len=2048, accumulation=4, precision="bf16")
    (nearest,) = propose(job, 2, 2**30, MACHINE)
    assert nearest.need > 2**30
    assert nearest.need == min(proposal.need for proposal in propose(job, 2, nearest.need, MACHINE))


def test_tensor_parallelism_stays_inside_a_node() -> None:
    job = make_job(BIG, dp=16, seq_len=512, accumulation=2, precision="bf16")
    found = propose(job, 16, 80 * 2**30, replace(MACHINE, ranks_per_node=2))
    assert {proposal.job.ranks.tp for proposal in found} == {1, 2}
