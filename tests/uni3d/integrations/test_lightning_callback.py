"""`UniversalCheckpoint`: a Lightning run goes on with other ranks and another strategy, as uninterrupted."""

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from marks import matrix
from page_diffs import script
from ranks import Ranks
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

pytest.importorskip("lightning")

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from lightning_runs import BATCH, EPOCHS, Manual, Net, Pool, alone, alone_by_two, data, fit_case

import ckpt
from uni3d.manifest import RunManifest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fresh_ranks"),
]  # ranks take many seconds to import Lightning

MID = {"keeper": {"every_n_steps": 5}, "stop": 7}
"""Ends after step 7, in an epoch, and leaves a checkpoint of step 5."""
PAIRS = [
    (2, "ddp", 3, "fsdp"),
    matrix(3, "fsdp", 2, "ddp"),
    (4, "fsdp x tp", 2, "ddp"),
    matrix(2, "ddp", 4, "fsdp x tp"),
    (2, "fsdp", 1, "plain"),
    matrix(1, "plain", 2, "ddp"),
]


def check(result: dict[str, Any], oracle: tuple[dict[int, float], dict[str, Tensor]], first: int) -> None:
    """Compare the batches from `first` to the end, and the weights after them."""
    losses, weights = oracle
    assert list(result["losses"]) == list(range(first, len(losses)))
    for number, loss in result["losses"].items():
        assert loss == pytest.approx(losses[number], rel=1e-5), number
    for name, weight in weights.items():
        torch.testing.assert_close(result["weights"][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("before", "writer", "after", "reader"), PAIRS)
def test_a_run_goes_on_within_an_epoch(
    ranks: Ranks, tmp_path: Path, before: int, writer: str, after: int, reader: str
) -> None:
    run = str(tmp_path / "run")
    ranks.run(before, fit_case, writer, run, 3, {"max_epochs": EPOCHS, **MID})
    found = ranks.run(after, fit_case, reader, run, 8, {"max_epochs": EPOCHS, "keeper": {"every_n_steps": 5}})
    for result in found:
        check(result, alone(), first=5)
        assert (result["step"], result["epoch"], result["logged"]) == (12, EPOCHS, 12)
        assert (result["seen"], result["best"]) == (12, float("inf"))
        assert result["kept"]["seen"] == [5, 0.5]
        assert result["kept"]["value"].tolist() == [1, 2]


ENDS = [
    ({"max_epochs": 1}, {}, 4),
    ({"max_epochs": 1, "interval": "epoch"}, {}, 4),
    ({"max_epochs": 2, "interval": "plateau"}, {}, 8),
    ({"max_steps": 8}, {}, 8),  # Lightning restarts otherwise if steps are its limit
    ({"max_steps": 6}, {}, 6),
    ({"max_steps": 3, "accumulate_grad_batches": 2}, {"accumulate_grad_batches": 2}, 6),
    ({"interval": "epoch", **MID}, {}, 5),
]


@pytest.mark.parametrize(("first", "then", "batch"), ENDS)
def test_a_run_goes_on_where_it_ended(
    ranks: Ranks, tmp_path: Path, first: dict[str, Any], then: dict[str, Any], batch: int
) -> None:
    run, interval = str(tmp_path / "run"), first.get("interval", "step")
    limit = {"max_steps": 12 // then.get("accumulate_grad_batches", 1)}
    limit = limit if "max_steps" in first else {"max_epochs": EPOCHS}
    ranks.run(2, fit_case, "ddp", run, 3, {**({"max_epochs": EPOCHS} if "stop" in first else {}), **first})
    oracle = alone(interval, then.get("accumulate_grad_batches", 1))
    for result in ranks.run(3, fit_case, "ddp", run, 8, {"interval": interval, **limit, **then}):
        check(result, oracle, first=batch)
        assert result["step"] == result["logged"] == len(oracle[0]) // then.get("accumulate_grad_batches", 1)
        assert result["epoch"] == EPOCHS


def test_validations_go_on_with_the_steps(ranks: Ranks, tmp_path: Path) -> None:
    """A checkpoint of a step is taken after its validation, which a resume doesn't repeat."""
    run, options = str(tmp_path / "run"), {"val_check_interval": 2, "max_epochs": EPOCHS}
    first = {**options, "keeper": {"every_n_steps": 6}, "stop": 7, "interval": "epoch"}
    assert ranks.run(2, fit_case, "ddp", run, 3, first)[0]["validated"][:3] == [2, 4, 6]
    for result in ranks.run(2, fit_case, "fsdp", run, 8, {**options, "interval": "epoch"}):
        check(result, alone("epoch"), first=6)
        assert result["validated"] == [8, 10, 12]


def with_lightnings_case(run: str, seed: int, steps: int) -> dict[str, Any]:
    folder = f"{run}-lightning"
    kept = ModelCheckpoint(folder, monitor="val", save_top_k=2)
    options = {"enable_checkpointing": True, "callbacks": [EarlyStopping("val", patience=9), kept]}
    return fit_case("ddp", run, seed, {"max_epochs": steps, **options})


def test_states_of_lightnings_own_callbacks(ranks: Ranks, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    (stopping, kept) = ranks.run(2, with_lightnings_case, run, 3, 2)[0]["states"]
    result = ranks.run(2, with_lightnings_case, run, 8, 2)[0]  # nothing is left to do
    assert result["losses"] == {}
    assert result["states"][0] == stopping
    for key in ("best_model_path", "best_model_score", "best_k_models", "kth_value"):
        assert result["states"][1][key] == kept[key], key
    assert len(kept["best_k_models"]) == 2


def with_stateful_case(run: str, seed: int, stop: int | None) -> dict[str, Any]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader(dataset: TensorDataset, rows: int, **_: Any) -> Any:
        return StatefulDataLoader(dataset, rows, sampler=DistributedSampler(dataset))

    options = {"max_epochs": EPOCHS, "keeper": {"every_n_steps": 5}, "stop": stop, "interval": "epoch"}
    return fit_case("ddp", run, seed, {**options, "loader": loader})


def test_loaders_with_a_state_go_on(ranks: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("torchdata")
    run = str(tmp_path / "run")
    ranks.run(2, with_stateful_case, run, 3, 7)
    states = RunManifest.of(ckpt.open_checkpoint(run)).data.states
    assert [state["value"]["loaders"][0]["_num_yielded"] for state in states] == [1, 1]
    for result in ranks.run(2, with_stateful_case, run, 8, None):
        check(result, alone("epoch"), first=5)


def test_several_optimizers(ranks: Ranks, tmp_path: Path) -> None:
    """Each batch takes two steps by Lightning's count, so a checkpoint is due when 9 are behind it."""
    run, options = str(tmp_path / "run"), {"module": Manual, "max_epochs": EPOCHS}
    before = ranks.run(2, fit_case, "ddp", run, 3, {**options, "keeper": {"every_n_steps": 9}, "stop": 12})[0]
    assert [path.name for path in (tmp_path / "run").glob("global_step*")] == ["global_step10"]
    expected = alone_by_two()
    assert before["losses"] == pytest.approx({n: expected[n] for n in range(6)}, rel=1e-5)
    for result in ranks.run(3, fit_case, "fsdp", run, 8, options):
        assert result["losses"] == pytest.approx({n: expected[n] for n in range(5, 12)}, rel=1e-5)


# --- the page ------------------------------------------------------------------------------------------


def page_case(folder: str, changed: bool, epochs: int) -> dict[int, float]:
    """Run the page's script, with a Trainer that stops after some epochs; return the losses by batch."""
    ranks = dist.get_world_size()
    limits = {"accelerator": "cpu", "devices": ranks, "plugins": [Pool()], "max_epochs": epochs}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    module = Net(3 if epochs == 1 else 8, "step")  # other weights for the run that resumes
    names = {"Trainer": partial(Trainer, **limits, **quiet), "module": module}
    names["loader"] = DataLoader(data(), BATCH // ranks, shuffle=True)
    os.chdir(folder)
    try:
        with warnings.catch_warnings(action="ignore"):  # Lightning's advice on workers and logs
            exec(script("PyTorch Lightning: the Trainer", changed=changed), names)
    finally:
        rank_zero_only.rank = 0
    return module.losses


def test_the_pages_script(ranks: Ranks, tmp_path: Path) -> None:
    for name in ("plain", "kept"):
        (tmp_path / name).mkdir()
    expected, _ = alone()
    first = ranks.run(2, page_case, str(tmp_path / "plain"), False, 1)[0]
    assert list((tmp_path / "plain").rglob("*.ckpt")), "of Lightning's own"
    found = ranks.run(2, page_case, str(tmp_path / "kept"), True, 1)[0]
    assert found == first
    found |= ranks.run(3, page_case, str(tmp_path / "kept"), True, EPOCHS)[0]
    assert found == pytest.approx(expected, rel=1e-5)
    assert not list((tmp_path / "kept").rglob("*.ckpt"))
