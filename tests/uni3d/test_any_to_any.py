"""Resumes between any two topologies, every ordered pair, against one-process PyTorch.

Each rank pool trains on A and saves; then for each B one engine loads the checkpoint of every A, compares
parameters and moments with the oracle, and takes one step more.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
import tensorstore
import torch
import zarr
from marks import matrix, slow
from models import save_and_wait
from ranks import Ranks
from tied_gpt import gpt_engine, worst_error
from torch import Tensor
from torch.distributed.tensor import DTensor

STEPS = 3
TOLERANCE = 1e-5


class Place(NamedTuple):
    pp: int
    dp: int
    tp: int
    zero: int
    micro: int
    """Samples per micro batch."""

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.tp

    def __str__(self) -> str:
        return f"pp{self.pp}dp{self.dp}tp{self.tp}z{self.zero}"


PLACES = [
    Place(1, 1, 1, 0, 12),
    Place(1, 2, 1, 0, 3),
    Place(1, 2, 1, 1, 3),
    Place(1, 3, 1, 2, 2),
    Place(1, 3, 1, 3, 4),
    Place(1, 4, 1, 1, 1),
    Place(1, 1, 2, 3, 6),
    Place(1, 2, 2, 2, 3),
    Place(2, 1, 1, 1, 4),
    Place(2, 2, 1, 1, 2),
    Place(2, 2, 1, 3, 3),
    Place(2, 1, 2, 0, 4),
    Place(3, 1, 1, 2, 6),
    Place(4, 1, 1, 3, 3),
]
SOME = [PLACES[i] for i in (0, 4, 7, 8, 10, 11)]
"""Places with every ZeRO stage and each axis cut."""
States = dict[str, dict[str, Tensor]]
HEADS = {
    "tied": {"tied_head": True},
    "untied": {"tied_head": False, "norm": "layernorm", "positions": "learned"},
}


def make_engine(place: Place, options: dict[str, Any], masked: bool = False) -> Any:
    *degrees, micro = place
    sizes = oracle.MODEL | options
    return gpt_engine(*degrees, sizes=sizes, groups=True, masked=masked, train_micro_batch_size_per_gpu=micro)


def whole_state(engine: Any) -> States:
    """Return the live tensors of this rank's stage, gathered by torch."""

    def whole(tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    states = {}
    engine.model.zero.reshard()  # the optimizer has the sharded parameters
    for name, parameter in engine.module.named_parameters():
        moments = engine.optimizer.state.get(parameter, {})
        tensors = {"fp32": parameter.detach()} | {k: v for k, v in moments.items() if v.ndim > 0}
        states[engine.model.first_name(name)] = {k: whole(v).clone() for k, v in tensors.items()}
    return states


def save_case(place: Place, options: dict[str, Any], run: str) -> dict[str, Any]:
    engine = make_engine(place, options)
    initial = whole_state(engine)
    losses = [engine.train_batch().item() for _ in range(STEPS)]
    norms = engine.get_global_grad_norm()
    save_and_wait(engine, run, client_state={"from": str(place), "nested": [1, 2.5, None]})
    return {"initial": initial, "losses": losses, "norm": norms, "final": whole_state(engine)}


def load_case(place: Place, options: dict[str, Any], runs: list[str], expected: str) -> list[dict[str, Any]]:
    engine = make_engine(place, options)
    state = torch.load(expected, weights_only=True)
    results = []
    for run in runs:
        _, client_state = engine.load_checkpoint(run)
        results.append(
            {
                "error": worst_error(engine, state),
                "client_state": client_state,
                "steps": engine.global_steps,
                "optimizer_steps": {float(s["step"]) for s in engine.optimizer.state.values()},
                "decay": [group["weight_decay"] for group in engine.optimizer.param_groups],
                "lr": engine.get_lr(),
                "loss": engine.train_batch().item(),
            }
        )
    return results


def assert_close(state: States, expected: States, where: str) -> None:
    for name, tensors in state.items():
        assert tensors.keys() == expected[name].keys(), f"{where}: {name}"
        for key, tensor in tensors.items():
            scale = expected[name][key].abs().max().item()
            error = (tensor - expected[name][key]).abs().max().item() / max(scale, 1e-30)
            assert error <= TOLERANCE, f"{where}: {name}/{key} differs by {error:.1e} of its largest element"


@pytest.mark.parametrize(
    ("head", "places"),
    [slow("tied", SOME), matrix("tied", PLACES), matrix("untied", PLACES)],
    ids=["some", "tied", "untied"],
)
def test_every_pair_of_topologies(ranks: Ranks, head: str, places: list[Place], tmp_path: Path) -> None:
    options = HEADS[head]
    trace = oracle.train(oracle.MODEL | options, STEPS + 1)
    names = set(trace.states[0])
    runs = []
    for place in places:
        run = str(tmp_path / str(place))
        runs.append(run)
        results = ranks.run(place.world, save_case, place, options, run)
        held = set().union(*(result["initial"] for result in results))
        assert held == names, "every parameter is somewhere"
        for result in results:
            assert result["losses"] == pytest.approx(trace.losses[:STEPS], rel=TOLERANCE), place
            assert result["norm"] == pytest.approx(trace.norms[STEPS - 1], rel=TOLERANCE), place
            for name, tensors in result["initial"].items():
                assert torch.equal(tensors["fp32"], trace.states[0][name]["fp32"]), f"{place}: initial {name}"
            assert_close(result["final"], trace.states[STEPS], f"trained on {place}")
        live = {k: v for result in results for k, v in result["final"].items()}
        check_atoms(Path(run) / f"global_step{STEPS}", live)
    expected = str(tmp_path / "expected.pt")
    torch.save(trace.states[STEPS], expected)
    for place in places:
        for results in ranks.run(place.world, load_case, place, options, runs, expected):
            for source, result in zip(places, results, strict=True):
                where = f"{source} -> {place}"
                assert result["error"][0] <= TOLERANCE, f"{where}: {result['error']}"
                assert result["loss"] == pytest.approx(trace.losses[STEPS], rel=TOLERANCE), where
                assert result["client_state"] == {"from": str(source), "nested": [1, 2.5, None]}
                assert result["steps"] == STEPS
                assert result["optimizer_steps"] == {float(STEPS)}
                assert result["decay"] == [0.1, 0.0]
                assert result["lr"] == pytest.approx([oracle.learning_rate(STEPS + 1)] * 2)


def check_atoms(folder: Path, live: dict[str, dict[str, Tensor]]) -> None:
    """Check that zarr-python and tensorstore read the live model bit for bit, each tied weight once."""
    group = zarr.open_group(folder, mode="r")
    assert {name for name, _ in group["atoms"].groups()} == set(live)
    for name, tensors in live.items():
        for key, tensor in tensors.items():
            expected = tensor.numpy()
            np.testing.assert_array_equal(group[f"atoms/{name}/{key}"][...], expected)
            path = str(folder / "atoms" / name / key)
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
            stored = tensorstore.open(spec, read=True).result().read().result()
            np.testing.assert_array_equal(stored, expected)


def masked_case(place: Place) -> list[float]:
    engine = make_engine(place, HEADS["tied"], masked=True)
    return [engine.train_batch().item() for _ in range(STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize("place", [Place(1, 3, 1, 2, 2), Place(2, 1, 2, 1, 3)], ids=str)
def test_loss_is_the_mean_over_tokens_not_a_mean_of_means(ranks: Ranks, place: Place) -> None:
    trace = oracle.train(oracle.MODEL | HEADS["tied"], STEPS, masked=True)
    for losses in ranks.run(place.world, masked_case, place):
        assert losses == pytest.approx(trace.losses, rel=TOLERANCE)
