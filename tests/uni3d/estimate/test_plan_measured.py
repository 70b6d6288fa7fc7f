"""Compare the planned peak memory and bytes sent of a training job with those of real ranks.

Measured memory is the memory in use between steps, plus the peak of torch's profiler record of allocations in
a step. The record misses memory that a collective's own thread frees. So each step gives two bounds: the
recorded peak, and that peak less all memory never seen freed. Several steps narrow them.
"""

import gc
from typing import Any, NamedTuple

import pytest
import torch
from dispatch_modes import SentBytes
from marks import matrix
from model import GPT, GPTConfig
from ranks import Ranks
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import TensorDataset

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
            precision=self.precision,
            recompute=self.recompute,
            device="cpu",
            schedule=self.schedule,
            virtual_stages=self.virtual,
            sequence_parallel=self.sequence,
            shard_group=self.group,
        )


CASES = [
    matrix(Case(1, 1, 1, 0)),
    matrix(Case(1, 1, 1, 0, recompute="full", accumulation=1)),
    matrix(Case(1, 2, 1, 1)),
    matrix(Case(1, 2, 1, 1, "bf16", model="gpt2")),
    Case(1, 2, 1, 2, "bf16", "full"),
    matrix(Case(1, 2, 1, 3)),
    matrix(Case(1, 2, 1, 3, "bf16", "full")),
    Case(2, 1, 1, 1, accumulation=4),
    matrix(Case(2, 1, 1, 1, "bf16", "full", model="gpt2")),
    Case(1, 1, 2, 1),
    matrix(Case(1, 1, 2, 1, "bf16", "full", model="gpt2")),
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
    Case(2, 1, 2, 1, accumulation=4, sequence=True),
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
    engine.model.zero.reshard()  # to the sharded ones
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


def traffic_case(case: Case) -> int:
    engine = make_engine(case)
    engine.train_batch()
    with SentBytes() as sent:
        engine.train_batch()
    return sent.bytes.total()


TRAFFIC = [
    matrix(Case(1, 1, 2, 1)),
    Case(1, 1, 2, 1, "bf16", "full", model="gpt2"),
    matrix(Case(2, 1, 1, 1, accumulation=4, model="gpt2")),
    Case(1, 2, 1, 3, "bf16"),
    Case(1, 1, 2, 1, sequence=True),
    matrix(Case(2, 1, 2, 1, accumulation=4, sequence=True)),
    Case(2, 1, 1, 1, accumulation=4, schedule="zero_bubble_v", virtual=2),
]


@pytest.mark.parametrize("case", TRAFFIC, ids=str)
def test_planned_traffic_is_what_real_ranks_send(ranks: Ranks, case: Case) -> None:
    planned = traffic(case.job)
    found = ranks.run(case.job.ranks.total, traffic_case, case)
    assert planned.total == pytest.approx(max(found), rel=0.01)
