"""The engine on a CUDA device, for which a CPU passes: devices of tensors, waits of the host, numbers."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product, starmap
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cpu_as_cuda import compiled, cpu_as_cuda, moved, waits
from marks import matrix, slow
from models import OwnLoss, Stack, global_batches, make_engine, save_and_wait, seeded, train
from ranks import Ranks
from tied_gpt import gpt_engine

import uni3d
from uni3d.bench.measure import _phases, _timed, timed_passes
from uni3d.checkpoint import pinned
from uni3d.state import Held, Inventory

STEPS = 4
PLACES: dict[str, tuple[tuple[int, int, int, int], dict[str, Any]]] = {
    "one rank": ((1, 1, 1, 0), {}),
    "zero 3": ((1, 3, 1, 3), {}),
    "tp": ((1, 2, 2, 2), {"parallel": {"sequence_parallel": True}}),
    "pp": ((2, 1, 1, 1), {}),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {"activation_checkpointing": {"mode": "full"}},
    "selective": {"activation_checkpointing": {"mode": "selective"}},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
    "offload": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
}
QUICK = {("one rank", "plain")}
SOME = {("zero 3", "plain"), ("tp", "full"), ("pp", "bf16"), ("one rank", "fp16"), ("zero 3", "offload")}
NOTHING = {("one rank", "offload")}
"""Stage 0 shards nothing, and so offloads nothing."""
REST = {*product(PLACES, WAYS)} - QUICK - SOME - NOTHING
ALL = [*sorted(QUICK), *starmap(slow, sorted(SOME)), *starmap(matrix, sorted(REST))]


@pytest.fixture(scope="module")
def gpu_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    library = compiled(tmp_path_factory.mktemp("library"))
    if library is None:
        pytest.skip("needs g++, and a torch without CUDA")
    pool = Ranks(environment={"LD_PRELOAD": str(library)})
    yield pool
    pool.stop()


def steps_case(place: str, way: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train on the CPU, then on the device."""
    with cpu_as_cuda():
        there = trained(place, way, "cuda")
    return trained(place, way, "cpu"), there


def trained(place: str, way: str, device: str) -> dict[str, Any]:
    degrees, config = PLACES[place]
    settings = config | WAYS[way]
    settings["parallel"] = settings.get("parallel", {}) | {"device": device}
    engine = gpt_engine(*degrees, **settings)
    losses, waited = [], []
    for _ in range(STEPS):
        waits.clear()
        losses.append(engine.train_batch())
        waited.append([*waits])
    states = [v for s in engine.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    tensors = [*engine.module.parameters(), *engine.module.buffers(), *states]
    return {
        "numbers": [*(loss.item() for loss in losses), engine.get_global_grad_norm()],
        "devices": {str(x.device) for x in tensors if x.ndim > 0},
        "loss": losses[0].device.type,
        "waits": waited,
    }


READ = "Event.synchronize in step.read < step."
SETTLED = {f"{READ}_conclude < step.settle"}
"""Wait for the numbers of the step before, which have long arrived."""
READ_AT_ONCE = {f"{READ}_conclude < step.finish", f"{READ}finish < training_core.train_batch"}
OFFLOADED = {
    "Event.synchronize in gatherer._end",
    "Event.synchronize in fsdp_internals.end_backward < reducer.after_backward < zero.backward",
    "_to_copy in gatherer._post_backward < fsdp_internals.backward",
    "_to_copy in gatherer._post_backward < gatherer._end",
    "_to_copy in fsdp_internals.reduce_gradients < reducer._reduce < reducer.arrived",
    "_to_copy in gradients.square_sum < gradients.sum_over_ranks < step.finish",
    "_to_copy in step._update < step.finish < training_core.train_batch",
    "_to_copy in ties.<dictcomp> < ties.sum < step.finish",
    "copy_ in ties.sum < step.finish < training_core.train_batch",
}
"""Waits of a step whose optimizer works in the host's memory."""
WAITS = {"fp16": READ_AT_ONCE, "offload": READ_AT_ONCE | OFFLOADED}


@pytest.mark.parametrize(("place", "way"), ALL)
def test_steps(gpu_ranks: Ranks, place: str, way: str) -> None:
    for cpu, there in gpu_ranks.run(prod(PLACES[place][0][:3]), steps_case, place, way):
        assert there["numbers"] == pytest.approx(cpu["numbers"], rel=1e-3 if "16" in way else 1e-6)
        assert there["loss"] == "cuda"
        assert there["devices"] == {"cpu" if way == "offload" else "cuda:0"}
        for waited in there["waits"][1:]:  # in the first step the ranks compare what they run
            assert {*waited} <= WAITS.get(way, SETTLED)


def measured_case() -> dict[str, tuple[Any, list[str]]]:
    found: dict[str, tuple[Any, list[str]]] = {}
    with cpu_as_cuda():
        engine = gpt_engine(1, 2, 1, 1, parallel={"device": "cuda"})
        engine.train_batch()
        engine.train_batch()
        works = {"timed": lambda: _timed(engine, 3), "phases": lambda: _phases(engine)}
        for name, work in works.items():
            waits.clear()
            found[name] = work(), [*waits]
        found["passes"] = timed_passes(engine), []
    return found


def test_a_measurement_waits_at_its_end_alone(gpu_ranks: Ranks) -> None:
    """Waiting between the parts of a step would forbid the overlap that is measured."""
    for found in gpu_ranks.run(2, measured_case):
        (_, seconds), waited = found["timed"]
        assert len(seconds) == 3
        assert min(seconds) > 0
        assert [wait for wait in waited if wait not in SETTLED] == [
            *("synchronize in measure._timed", "_local_scalar_dense in measure._timed")
        ]
        phases, waited = found["phases"]
        assert min(phases[name] for name in ("data", "forward", "backward", "step")) > 0
        assert [wait for wait in waited if wait not in SETTLED] == ["synchronize in measure._phases"]
        parts = [one["part"] for one in found["passes"][0]]
        assert parts == ["data", "forward", "backward", "forward", "backward", "step"]


class Broken(OwnLoss):
    """A model whose loss isn't finite in one step."""

    broken = False

    def forward(self, *batch: Any) -> Any:
        loss = super().forward(*batch)
        return loss * math.nan if self.broken else loss


def rejected_case() -> tuple[bool, bool, int]:
    with cpu_as_cuda():
        model = seeded(Broken)
        first = next(model.parameters())
        engine = make_engine(model, config={"parallel": {"device": "cuda"}}, model_parameters=[first])
        batches = global_batches(4)
        train(engine, batches[:2])
        deferred = engine._stepper.deferred
        engine.optimizer.add_param_group({"params": [*engine.module.parameters()][1:]})
        engine.module.broken = True
        with pytest.raises(FloatingPointError):
            train(engine, batches[2:3])
        states = len(engine.optimizer.state)
        engine.module.broken = False
        train(engine, batches[3:])
        return deferred, engine._stepper.deferred, states


def test_a_rejected_step_makes_no_states(gpu_ranks: Ranks) -> None:
    """The GPU would leave them uninitialized, and the host would learn of it too late."""
    assert gpu_ranks.run(1, rejected_case) == [(True, True, 1)]


def built_case() -> tuple[int, int]:
    with cpu_as_cuda():
        model = seeded(Stack)
        whole = sum(p.nbytes for p in model.parameters())
        moved.clear()
        make_engine(model, zero=3, config={"parallel": {"device": "cuda"}})
        return sum(moved), whole


def test_a_model_from_the_cpu_comes_in_parts(gpu_ranks: Ranks) -> None:
    for parts, whole in gpu_ranks.run(2, built_case):
        assert 0 < parts < 0.75 * whole


def resumed_case(run: str) -> tuple[list[float], list[float]]:
    settings = {"parallel": {"device": "cuda"}, "bf16": {"enabled": True}}
    with cpu_as_cuda():
        engine = gpt_engine(1, 2, 1, 3, **settings)
        for _ in range(2):
            engine.train_batch()
        save_and_wait(engine, run)
        expected = [engine.train_batch().item() for _ in range(2)]
        engine = gpt_engine(1, 2, 1, 3, **settings)
        engine.load_checkpoint(run)
        return expected, [engine.train_batch().item() for _ in range(2)]


def test_a_resume_is_the_same_bits(gpu_ranks: Ranks, tmp_path: Path) -> None:
    for expected, found in gpu_ranks.run(2, resumed_case, str(tmp_path)):
        assert found == expected


def held_by(engine: uni3d.Engine) -> list[Held]:
    return Inventory(engine._state.model).arrays(engine.optimizer)


def sums(engine: uni3d.Engine) -> list[float]:
    return [held.tensor.double().sum().item() for held in held_by(engine)]


def loaded_case(run: str) -> tuple[list[int], int, list[str], list[float], list[float]]:
    with cpu_as_cuda():
        engine = gpt_engine(1, 2, 1, 3, parallel={"device": "cuda"})
        engine.train_batch()
        save_and_wait(engine, run)
        expected = sums(engine)
        engine.train_batch()
        with mock.patch.object(pinned, "BUFFER_BYTES", 512), mock.patch.object(pinned, "MOST_BYTES", 1024):
            moved.clear()
            waits.clear()
            engine.load_checkpoint(run)
            copies, waited = [*moved], [*waits]
        return copies, sum(held.tensor.nbytes for held in held_by(engine)), waited, expected, sums(engine)


def test_a_load_streams_to_the_device(gpu_ranks: Ranks, tmp_path: Path) -> None:
    """Nothing is copied to the host first, only to be overwritten."""
    for copies, whole, waited, expected, found in gpu_ranks.run(2, loaded_case, str(tmp_path)):
        assert found == expected
        assert max(copies) <= 512
        assert sum(copies) >= whole
        assert not [wait for wait in waited if wait.startswith(("_to_copy", "to "))], waited


class Scaled(OwnLoss):
    """A model with a parameter of no dims, which isn't sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, *batch: Any) -> Any:
        return super().forward(*batch) * self.scale


def scaled_case() -> tuple[list[float], list[float]]:
    losses = []
    for device, place in (("cpu", nullcontext), ("cuda", cpu_as_cuda)):
        with place():
            engine = make_engine(
                seeded(Scaled), zero=3, clip=0.1, offload=True, config={"parallel": {"device": device}}
            )
            losses.append(train(engine, global_batches(3)))
    return losses[0], losses[1]


def test_offload_beside_a_scalar(gpu_ranks: Ranks) -> None:
    for cpu, there in gpu_ranks.run(2, scaled_case):
        assert there == pytest.approx(cpu, rel=1e-6)
