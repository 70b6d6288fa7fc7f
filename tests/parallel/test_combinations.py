"""Refused combinations give their reason; all others train as plain PyTorch does."""

import warnings
from itertools import product
from typing import Any, get_args

import oracle
import pytest
import torch
import torch.nn.functional as F
from marks import slow
from model import GPT, GPTConfig
from ranks import Ranks
from torch import Tensor

import parallel
from parallel.combinations import REFUSED, check_combination, check_micro_batches
from parallel.settings import Schedule

RECOMPUTE = [None, parallel.Recompute(mode="full"), parallel.Recompute(mode="selective")]
COMPILE = [None, parallel.Compile(backend="eager")]
MICRO_BATCHES = 4
MODEL = oracle.MODEL | {"num_layers": 2, "tied_head": True}


def combinations() -> list[parallel.Settings]:
    """Return every schedule with one to three stages on a rank, and each change of the layers."""
    given = product(get_args(Schedule), (1, 2, 3), RECOMPUTE, COMPILE)
    return [
        parallel.Settings(
            seed=oracle.SEED, zero_stage=3, schedule=s, virtual_stages=v, recompute=again, compile=compiled
        )
        for s, v, again, compiled in given
    ]


def refused(settings: parallel.Settings) -> bool:
    """Return whether the documentation says that the settings are refused."""
    many = settings.virtual_stages > 1
    stages = {"gpipe": not many, "1f1b": not many, "interleaved": many, "zero_bubble": True}
    stages["zero_bubble_v"] = settings.virtual_stages == 2
    split = settings.schedule.startswith("zero_bubble")
    changed = settings.recompute is not None or settings.compile is not None
    return not stages[settings.schedule] or (split and changed)


def test_the_table_refuses_what_it_says_and_nothing_else() -> None:
    for settings in combinations():
        reasons = [r for r in REFUSED if r.applies(settings)]
        assert bool(reasons) == refused(settings), settings
        if reasons:
            with pytest.raises(ValueError, match="is refused") as caught:
                check_combination(settings)
            assert reasons[0].reason in str(caught.value)
            assert reasons[0].what in str(caught.value)
        else:
            check_combination(settings)
    for refusal in REFUSED:
        assert any(refusal.applies(settings) for settings in combinations()), refusal.what


def gradients_case(settings: list[parallel.Settings], tp: int = 1) -> list[dict[str, Tensor]]:
    """Return this rank's gradients and the summed loss, by name."""
    results = []
    for how in settings:
        topology = parallel.Topology(parallel.Degrees(pp=2, dp=1, tp=tp), zero_stage=how.zero_stage)
        with torch.device("meta"):
            model = GPT(GPTConfig(**MODEL))
        built = parallel.build(model, topology, how)
        inputs, targets = (x[:MICRO_BATCHES] for x in oracle.samples())
        with warnings.catch_warnings():
            if how.compile is not None:  # dynamo reads .grad of non-leaf tensors, which warns
                warnings.simplefilter("ignore")
            loss = built.pipeline.run(list(zip(inputs.split(1), targets.split(1), strict=True)), train=True)
        built.zero.reshard()
        built.tied.sum()
        found = {built.first_name(n): p.grad.full_tensor() for n, p in built.module.named_parameters()}
        if loss is not None:
            found["loss"] = loss.total
        results.append(found)
    return results


def expected_gradients() -> dict[str, Tensor]:
    model = oracle.initial_model(MODEL)
    inputs, targets = (x[:MICRO_BATCHES] for x in oracle.samples())
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


def check(results: list[list[dict[str, Tensor]]], expected: dict[str, Tensor]) -> None:
    for of_ranks in zip(*results, strict=True):
        assert {name for found in of_ranks for name in found} == expected.keys()
        for found in of_ranks:
            for name, tensor in found.items():
                scale = expected[name].abs().max().item()
                torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("schedule", [slow(s) if s == "gpipe" else s for s in get_args(Schedule)])
def test_what_is_not_refused_trains(ranks: Ranks, schedule: str) -> None:
    accepted = [s for s in combinations() if s.schedule == schedule and not refused(s)]
    accepted = [s for s in accepted if s.virtual_stages < 3]  # the model has five links
    assert accepted
    check(ranks.run(2, gradients_case, accepted), expected_gradients())


@pytest.mark.parametrize("schedule", [slow("interleaved"), slow("zero_bubble"), "zero_bubble_v"])
def test_with_tensor_parallelism(ranks: Ranks, schedule: Any) -> None:
    settings = [
        parallel.Settings(seed=oracle.SEED, zero_stage=zero, schedule=schedule, virtual_stages=2)
        for zero in (1, 3)
    ]
    check(ranks.run(4, gradients_case, settings, 2), expected_gradients())


@pytest.mark.parametrize("schedule", ["interleaved", "zero_bubble"])
@pytest.mark.parametrize(
    ("pp", "micro_batches", "rounds"),
    [(2, 5, 2), (4, 9, 2), (4, 7, None), (4, 3, None), (2, 1, None), (2, 6, None)],
)
def test_micro_batches_come_in_rounds(schedule: Any, pp: int, micro_batches: int, rounds: int | None) -> None:
    settings = parallel.Settings(seed=0, schedule=schedule, virtual_stages=2)
    if rounds is None:
        check_micro_batches(settings, pp, micro_batches)
        return
    values = rf"pp\({pp}\), but gradient_accumulation_steps\({micro_batches}\)"
    message = rf"schedule {schedule} .* {values} .* its {rounds} rounds"
    with pytest.raises(ValueError, match=message):
        check_micro_batches(settings, pp, micro_batches)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero_bubble_v"])
def test_the_other_schedules_take_any_number(schedule: Any) -> None:
    for micro_batches in (1, 5, 7):
        check_micro_batches(parallel.Settings(seed=0, schedule=schedule), 2, micro_batches)
