"""Every pipeline schedule under every ZeRO stage takes the steps of plain one-process PyTorch."""

from pathlib import Path
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from marks import matrix, slow
from models import take_steps
from ranks import Ranks
from tied_gpt import gpt_engine, worst_error

STEPS = 3
TOLERANCE = 1e-5
UNTIED = {"tied_head": False, "norm": "layernorm", "positions": "learned"}
TIED = {"tied_head": True}


class How(NamedTuple):
    schedule: str
    virtual: int = 1
    pp: int = 2
    micro: int = 1
    """Samples per micro batch."""

    def __str__(self) -> str:
        return f"{self.schedule}-v{self.virtual}-pp{self.pp}"


HOW = [
    slow(How("gpipe")),
    matrix(How("interleaved", 2)),
    matrix(How("interleaved", 3)),  # as many stages as links
    matrix(How("zero_bubble")),
    matrix(How("zero_bubble", 2)),
    slow(How("zero_bubble_v", 2)),
]
CLASSES = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zero_bubble": "ScheduleInterleavedZeroBubble",
    "zero_bubble_v": "ScheduleZBVZeroBubble",
}
PLACES = {"zero_bubble_v": {2: [[0, 3], [1, 2]], 4: [[0, 7], [1, 6], [2, 5], [3, 4]]}}
"""Stages on each rank, for schedules that don't assign them round-robin."""


def make_engine(how: How, zero: int, options: dict[str, Any], **config: Any) -> Any:
    config = {"train_micro_batch_size_per_gpu": how.micro} | config
    pipeline = {"schedule": how.schedule, "virtual_stages": how.virtual}
    config["parallel"] = pipeline | config.get("parallel", {})
    return gpt_engine(how.pp, "auto", 1, zero, sizes=oracle.MODEL | options, groups=True, **config)


def train_case(how: How, zeros: list[int], options: dict[str, Any], expected: str) -> list[dict[str, Any]]:
    final = torch.load(expected, weights_only=True)
    results = []
    for zero in zeros:
        engine = make_engine(how, zero, options)
        held_out = engine.eval_batch(iter(zip(*(x.split(how.micro) for x in oracle.samples()), strict=True)))
        losses, norms = take_steps(engine, STEPS)
        stages = {id(s): s for s in engine.model.pipeline._schedules.values()}.values()
        results.append(
            {
                "losses": losses,
                "norms": norms,
                "evaluation": held_out.item(),
                "error": worst_error(engine, final)[0],
                "kinds": {type(s).__name__ for s in stages},
                "stages": [list(engine.model.pipeline._stages)],
                "names": sorted({engine.model.first_name(n) for n, _ in engine.module.named_parameters()}),
            }
        )
    return results


def check(results: list[list[dict[str, Any]]], how: How, trace: oracle.Trace) -> None:
    for rank, of_rank in enumerate(results):
        place = rank // (len(results) // how.pp)
        for found in of_rank:
            assert found["losses"] == pytest.approx(trace.losses, rel=TOLERANCE)
            assert found["norms"] == pytest.approx(trace.norms, rel=TOLERANCE)
            assert found["error"] < TOLERANCE
            assert found["kinds"] == {CLASSES[how.schedule]}
            dealt = [list(range(r, how.pp * how.virtual, how.pp)) for r in range(how.pp)]
            places = PLACES.get(how.schedule, {}).get(how.pp, dealt)
            assert found["stages"] == [places[place]]
    for of_stage in zip(*results, strict=True):
        names = {name for found in of_stage for name in found["names"]}
        assert names == set(trace.states[0]), "every parameter is somewhere, under its own name"
        assert len({found["evaluation"] for found in of_stage}) == 1


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[oracle.Trace, str]]:
    """Oracle training for each kind of model, and the file of its last state."""
    found = {}
    for name, options in {"tied": TIED, "untied": UNTIED, "deep": TIED | {"num_layers": 5}}.items():
        trace = oracle.train(oracle.MODEL | options, STEPS + 1)
        path = tmp_path_factory.mktemp("states") / f"{name}.pt"
        torch.save(trace.states[STEPS], path)
        trace.losses, trace.norms = trace.losses[:STEPS], trace.norms[:STEPS]
        found[name] = trace, str(path)
    return found


@pytest.mark.parametrize("how", HOW, ids=str)
def test_all_zero_stages_with_a_tied_head(ranks: Ranks, traces: Any, how: How) -> None:
    """Test on 2 x 2 ranks; the tied weight is on two ranks or, in the V, on two stages of one."""
    trace, path = traces["tied"]
    check(ranks.run(4, train_case, how, [0, 1, 2, 3], TIED, path), how, trace)


@pytest.mark.parametrize("how", [slow(How("interleaved", 2)), How("zero_bubble_v", 2)], ids=str)
def test_without_ties(ranks: Ranks, traces: Any, how: How) -> None:
    trace, path = traces["untied"]
    check(ranks.run(2, train_case, how, [2], UNTIED, path), how, trace)


@pytest.mark.slow
def test_eight_stages_in_a_v_on_four_ranks(ranks: Ranks, traces: Any) -> None:
    trace, path = traces["deep"]
    how = How("zero_bubble_v", 2, pp=4, micro=2)
    check(ranks.run(4, train_case, how, [1, 3], TIED | {"num_layers": 5}, path), how, trace)


@pytest.mark.parametrize("schedule", [slow("interleaved"), slow("zero_bubble"), "zero_bubble_v"])
def test_one_rank_with_two_stages(ranks: Ranks, traces: Any, schedule: str) -> None:
    trace, path = traces["tied"]
    how = How(schedule, 2, pp=1, micro=4)
    results = ranks.run(1, train_case, how, [1], TIED, path)
    assert results[0][0]["losses"] == pytest.approx(trace.losses, rel=TOLERANCE)
    assert results[0][0]["norms"] == pytest.approx(trace.norms, rel=TOLERANCE)
    assert results[0][0]["error"] < TOLERANCE


@pytest.mark.parametrize("schedule", ["interleaved", slow("zero_bubble"), "zero_bubble_v"])
@pytest.mark.parametrize("micro", [3, 12], ids=["four", "one"])
def test_few_micro_batches(ranks: Ranks, traces: Any, schedule: str, micro: int) -> None:
    trace, path = traces["tied"]
    how = How(schedule, 2, micro=micro)
    check(ranks.run(2, train_case, how, [3], TIED, path), how, trace)


def save_case(how: How, zero: int, options: dict[str, Any], run: Path) -> None:
    engine = make_engine(how, zero, options)
    for _ in range(STEPS):
        engine.train_batch()
    engine.save_checkpoint(run)
    engine.save_checkpoint(run, tag="again")  # by what the first one found out of the tensors


def load_case(how: How, zero: int, options: dict[str, Any], run: Path, expected: str) -> tuple[float, float]:
    engine = make_engine(how, zero, options)
    engine.load_checkpoint(run, tag="again")
    error, _ = worst_error(engine, torch.load(expected, weights_only=True))
    return error, engine.train_batch().item()


@pytest.mark.parametrize("name", [slow("tied"), matrix("untied")])
def test_a_checkpoint_goes_to_any_schedule(ranks: Ranks, traces: Any, tmp_path: Path, name: str) -> None:
    options = TIED if name == "tied" else UNTIED
    _, path = traces[name]
    after = oracle.train(oracle.MODEL | options, STEPS + 1).losses[STEPS]
    plain = How("1f1b", pp=1, micro=3)
    for how in (How("interleaved", 2, micro=3), How("zero_bubble_v", 2, micro=3), plain):
        run = tmp_path / str(how)
        ranks.run(2, save_case, how, 1, options, run)
        others = [plain] if how != plain else [How("interleaved", 2), How("zero_bubble_v", 2)]
        for other in others:
            for error, loss in ranks.run(2, load_case, other, 2, options, run, path):
                assert error < TOLERANCE
                assert loss == pytest.approx(after, rel=TOLERANCE)


def beside_case(how: How, config: dict[str, Any]) -> Any:
    return take_steps(make_engine(how, 2, TIED, **config), STEPS)


SPLIT = [matrix(How("zero_bubble")), How("zero_bubble_v", 2)]


@pytest.mark.slow
@pytest.mark.parametrize("how", SPLIT, ids=str)
@pytest.mark.parametrize("what", ["shard_group", "offload", "sequence_parallel"])
def test_a_split_backward_pass_beside(ranks: Ranks, traces: Any, how: How, what: str) -> None:
    """Test features that rely on hooks, which a split backward pass runs differently."""
    trace, _ = traces["tied"]
    tensor = what == "sequence_parallel"
    place = {"tp": 2, "sequence_parallel": True} if tensor else {}
    zero: dict[str, Any] = {"stage": 2}
    zero |= {"mics_shard_size": 1} if what == "shard_group" else {}
    zero |= {"offload_optimizer": {"device": "cpu"}} if what == "offload" else {}
    for losses, norms in ranks.run(4, beside_case, how, {"parallel": place, "zero_optimization": zero}):
        assert losses == pytest.approx(trace.losses, rel=TOLERANCE)
        assert norms == pytest.approx(trace.norms, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("how", SPLIT, ids=str)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_split_backward_pass_in_16_bits(ranks: Ranks, how: How, precision: str) -> None:
    """Compare with the schedule that doesn't split, whose parity is tested."""
    config = {precision: {"enabled": True}}
    plain = ranks.run(2, beside_case, How("1f1b"), config)
    for (losses, norms), (expected, expected_norms) in zip(
        ranks.run(2, beside_case, how, config), plain, strict=True
    ):
        assert losses == pytest.approx(expected, rel=1e-4)
        assert norms == pytest.approx(expected_norms, rel=2e-3)
