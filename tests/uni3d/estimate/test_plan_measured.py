"""Compare the planned peak memory and bytes sent of a training job with those of real ranks.

Measured memory is the memory in use between steps, plus the peak of torch's profiler record of allocations in
a step. The record misses memory that a collective's own thread frees. So each step gives two bounds: the
recorded peak, and that peak less all memory never seen freed. Several steps narrow them.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from model import GPT, GPTConfig
from ranks import Ranks
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset
from zero_held import held

import parallel
import uni3d
from uni3d.estimate.gpt import from_model_config
from uni3d.estimate.job import Job
from uni3d.estimate.memory import Memory, memory
from uni3d.estimate.traffic import traffic

pytestmark = pytest.mark.slow

WITHIN = 0.15
STEPS = 3
LLAMA: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 192,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
}
GPT2 = LLAMA | {"num_kv_heads": 4, "norm": "layernorm", "positions": "learned", "activation": "gelu"}
GPT2 |= {"max_seq_len": 64, "tied_head": True}
MODELS = {"llama": LLAMA, "gpt2": GPT2}


class Case(NamedTuple):
    pp: int
    dp: int
    tp: int
    zero: int
    precision: str = "fp32"
    recompute: str = "none"
    accumulation: int = 2
    model: str = "llama"
    schedule: str = "1f1b"
    virtual: int = 1
    sequence: bool = False
    group: int | None = None

    def __str__(self) -> str:
        place = f"pp{self.pp}dp{self.dp}tp{self.tp}z{self.zero}"
        name = f"{place}-{self.precision}-{self.recompute}-{self.accumulation}-{self.model}"
        more = [f"{self.schedule}{self.virtual}"] if self.schedule != "1f1b" else []
        more += (["sequence"] if self.sequence else []) + ([f"group{self.group}"] if self.group else [])
        return "-".join([name, *more])

    @property
    def job(self) -> Job:
        return Job(
            shape=from_model_config(MODELS[self.model]),
            ranks=parallel.Ranks(pp=self.pp, dp=self.dp, tp=self.tp, zero=self.zero),
            seq_len=64,
            micro_batch=4 if self.precision == "fp32" else 2,  # CPUs are slow at bf16
            accumulation=self.accumulation,
            precision=self.precision,  # type: ignore[arg-type]
            recompute=self.recompute,  # type: ignore[arg-type]
            device="cpu",
            schedule=self.schedule,  # type: ignore[arg-type]
            virtual_stages=self.virtual,
            sequence_parallel=self.sequence,
            shard_group=self.group,
        )


CASES = [
    Case(1, 1, 1, 0),
    Case(1, 1, 1, 0, recompute="full", accumulation=1),
    Case(1, 2, 1, 1),
    Case(1, 2, 1, 1, "bf16", model="gpt2"),
    Case(1, 2, 1, 2, "bf16", "full"),
    Case(1, 2, 1, 3),
    Case(1, 2, 1, 3, "bf16", "full"),
    Case(2, 1, 1, 1, accumulation=4),
    Case(2, 1, 1, 1, "bf16", "full", model="gpt2"),
    Case(1, 1, 2, 1),
    Case(1, 1, 2, 1, "bf16", "full", model="gpt2"),
]
MORE = [
    Case(1, 1, 1, 0, "bf16"),
    Case(1, 1, 1, 0, recompute="selective"),
    Case(1, 2, 1, 0, "bf16", "full"),
    Case(1, 2, 1, 2, accumulation=1),
    Case(1, 2, 1, 3, "bf16", accumulation=1, model="gpt2"),
    Case(2, 1, 1, 1, "bf16", accumulation=4),
    Case(2, 2, 1, 3, recompute="full"),
    Case(2, 1, 2, 1, "bf16", model="gpt2"),
    Case(4, 1, 1, 1, accumulation=4),
    Case(1, 1, 2, 1, recompute="full", model="gpt2", sequence=True),
    Case(1, 4, 1, 3, group=2),
    Case(2, 1, 1, 1, accumulation=4, schedule="gpipe"),
    Case(2, 1, 1, 1, accumulation=4, schedule="interleaved", virtual=2),
    Case(2, 1, 1, 1, accumulation=4, schedule="zero_bubble"),
    Case(3, 1, 1, 1, accumulation=6, schedule="zero_bubble"),
    Case(2, 1, 1, 1, accumulation=4, schedule="zero_bubble_v", virtual=2),
]


def make_engine(case: Case) -> Any:
    job = case.job
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": job.micro_batch,
        "gradient_accumulation_steps": job.accumulation,
        "parallel": {
            "pp": case.pp,
            "dp": case.dp,
            "tp": case.tp,
            "device": "cpu",
            "schedule": case.schedule,
            "virtual_stages": case.virtual,
            "sequence_parallel": case.sequence,
        },
        "zero_optimization": {"stage": case.zero, "zero_hpz_partition_size": case.group or 1},
        "optimizer": {"type": "AdamW"},
        "activation_checkpointing": {"mode": case.recompute},
    }
    if case.precision != "fp32":
        settings[case.precision] = {"enabled": True}
    with torch.device("meta"):
        model = GPT(GPTConfig(**MODELS[case.model]))
    samples = torch.randint(0, job.shape.vocab, (2, job.batch, job.seq_len))
    return uni3d.initialize(model=model, training_data=TensorDataset(*samples), config=settings)[0]


def storage_bytes(tensors: list[Tensor]) -> int:
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


def recorded(engine: Any) -> tuple[int, int]:
    """Return the peak of memory allocated in a step, and the bytes that were never seen freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        engine.train_batch()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most, total


def tensors_alive() -> list[Tensor]:
    gc.collect()
    return [t for t in gc.get_objects() if issubclass(type(t), Tensor)]


def memory_case(case: Case) -> dict[str, int]:
    earlier = {id(t): t for t in tensors_alive()}  # left by other cases in this process
    engine = make_engine(case)
    for _ in range(2):  # until the optimizer has its states, the pipeline its buffers
        engine.train_batch()
    parameters = [p.detach() for p in engine.module.parameters()]
    states = [v for s in engine.optimizer.state.values() for v in s.values() if v.ndim > 0]
    everything = [t.detach() for t in tensors_alive() if id(t) not in earlier and not t.is_meta]
    steps = [recorded(engine) for _ in range(STEPS)]
    between = storage_bytes(everything)
    return {
        "parameters": storage_bytes(parameters),
        "optimizer": storage_bytes(states),
        "at_most": between + min(most for most, _ in steps),
        "at_least": between + max(most - left for most, left in steps),
    }


def check_memory(ranks: Ranks, case: Case) -> None:
    """Compare each stage. Its ranks do the same, so the bounds of each hold for all of them."""
    place = case.job.ranks
    stages = memory(case.job)
    for _ in range(3):  # until the record misses next to nothing
        found = ranks.run(place.total, memory_case, case)
        of_stage = [found[n * place.of_a_stage : (n + 1) * place.of_a_stage] for n in range(place.pp)]
        bounds = [
            (max(real["at_least"] for real in same), min(real["at_most"] for real in same))
            for same in of_stage
        ]
        if all(most < 1.05 * least for least, most in bounds):
            break
    for stage, same, (least, most) in zip(stages, of_stage, bounds, strict=True):
        planned: Memory = stage.peak
        told = f"stage {stage.rank}: planned {planned.total:,}, measured {least:,} to {most:,}, {planned}"
        print(told)
        for real in same:
            assert planned.parameters == real["parameters"], told
            assert planned.optimizer == real["optimizer"], told
        assert least * (1 - WITHIN) <= planned.total <= most * (1 + WITHIN), told
        assert most < 1.15 * least, f"not measured: {told}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory_is_what_a_real_step_takes(ranks: Ranks, case: Case) -> None:
    check_memory(ranks, case)


@pytest.mark.matrix
@pytest.mark.parametrize("case", MORE, ids=str)
def test_memory_is_what_a_real_step_takes_in_more_places(ranks: Ranks, case: Case) -> None:
    check_memory(ranks, case)


# --- bytes sent ----------------------------------------------------------------------------------------

RINGS = {"all_reduce": 2, "allreduce": 2, "all_gather": 1, "allgather": 1, "reduce_scatter": 1}
"""Rounds of a ring by collective, given as part of its name."""


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counter of the bytes that this rank sends."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name()
        tensors = [x for x in tree_leaves((args, result)) if isinstance(x, Tensor)]
        if name == "c10d::send":
            self.sent += tensors[0].nbytes
        elif "c10d" in name and (rounds := next((n for part, n in RINGS.items() if part in name), 0)):
            size = group_size(args)  # the larger of input and output is the whole tensor
            self.sent += rounds * max(x.nbytes for x in tensors) * (size - 1) // size
        return result


def group_size(args: Any) -> int:
    """Return the size of a collective's group, which is among its arguments as an object or a name."""
    for arg in reversed(args):
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return int(dist.ProcessGroup.unbox(arg).size())
        if isinstance(arg, str):
            return int(c10d._resolve_process_group(arg).size())  # type: ignore[attr-defined, arg-type]
    raise AssertionError("a collective without a group")


def traffic_case(case: Case) -> int:
    engine = make_engine(case)
    engine.train_batch()
    with Counting() as counting:
        engine.train_batch()
    return counting.sent


TRAFFIC = [
    Case(1, 1, 2, 1),
    Case(1, 1, 2, 1, "bf16", "full", model="gpt2"),
    Case(2, 1, 1, 1, accumulation=4, model="gpt2"),
    Case(1, 2, 1, 3, "bf16"),
    Case(1, 1, 2, 1, sequence=True),
    Case(2, 1, 1, 1, accumulation=4, schedule="zero_bubble_v", virtual=2),
]


@pytest.mark.parametrize("case", TRAFFIC, ids=str)
def test_planned_traffic_is_what_real_ranks_send(ranks: Ranks, case: Case) -> None:
    planned = traffic(case.job)
    found = ranks.run(case.job.ranks.total, traffic_case, case)
    assert planned.total == pytest.approx(max(found), rel=0.01)


# --- against the formulas of ZeRO ------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_agrees_with_the_formulas_of_zero(zero: int, precision: str) -> None:
    """Activations are negligible here, and dp divides all sizes."""
    case = Case(1, 2, 1, zero, precision)
    job = replace(case.job, seq_len=1, micro_batch=1)
    formula = held(
        job.shape.parameters, stage=zero, dp=2, compute_bytes=job.compute_bytes, accumulation=job.accumulation
    )
    peak = memory(job)[0].peak
    assert peak.optimizer == formula.optimizer
    unit = 4 * max(job.whole(unit) for unit in job.stages[0].units)
    if zero < 3:  # at stage 3 gathered parameters are transient
        assert peak.parameters + peak.gathered == formula.parameters
    assert abs(peak.gradients - formula.gradients) <= unit, "at the peak of all memory, not their own"
