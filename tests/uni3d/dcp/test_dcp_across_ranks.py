"""A run that DCP saved through uni3d goes on anywhere: by DCP on other ranks, and in uni3d's engine."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import zarr
from dcp_runs import (
    BATCHES,
    FLAT,
    NESTED,
    STEPS,
    Form,
    assert_equal,
    everything,
    full,
    loaded,
    save,
    state_of,
    take_step,
    trained,
)
from marks import slow
from models import OwnLoss, make_engine, save_and_wait, seeded, train
from ranks import Ranks
from torch import nn

import ckpt
import uni3d

FORMS = pytest.mark.parametrize("form", [NESTED, FLAT], ids=["groups", "flat"])


def save_fsdp(folder: str, form: Form) -> dict[str, Any]:
    """Train under FSDP2 and save; return what was held."""
    run = trained(sharded=True)
    save(state_of(run, form) | {"epoch": 2}, folder)
    return everything(run)


def load_fsdp(folder: str, form: Form) -> dict[str, Any]:
    return everything(loaded(folder, sharded=True, form=form))


def save_engine(folder: str, zero: int) -> None:
    engine = make_engine(seeded(OwnLoss), zero=zero)
    train(engine, BATCHES[:STEPS])
    save_and_wait(engine, folder, client_state={"epoch": 2, "seen": {"a.b": [1, 2]}})


def plain_loss() -> float:
    """Return the loss of the step after the checkpoint, without a checkpoint."""
    run = trained()
    return take_step(run, BATCHES[STEPS])


@FORMS
def test_dcp_loads_it_on_other_numbers_of_ranks(tmp_path: Path, ranks: Ranks, form: Form) -> None:
    held = ranks.run(2, save_fsdp, str(tmp_path), form)[0]
    assert ckpt.committed_tags(tmp_path) == [f"global_step{STEPS}"]
    for world in (1, 3):
        for found in ranks.run(world, load_fsdp, str(tmp_path), form):
            assert_equal(found, held)


@pytest.mark.usefixtures("alone")
@FORMS
def test_the_engine_goes_on(tmp_path: Path, ranks: Ranks, form: Form) -> None:
    ranks.run(2, save_fsdp, str(tmp_path), form)
    engine = make_engine(seeded(OwnLoss, 0.0))
    with pytest.warns(UserWarning, match="doesn't say in which order") as warned:
        _, client_state = engine.load_checkpoint(tmp_path)
    assert "group 0's" not in str(warned[0].message), "a hyperparameter isn't what it was"
    assert client_state == {"epoch": 2}
    assert engine.global_steps == STEPS
    assert train(engine, BATCHES[STEPS:])[0] == pytest.approx(plain_loss(), rel=1e-5)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("form", [NESTED, FLAT, slow(("app.model", "app.optim", False))])
def test_dcp_loads_what_the_engine_saved(tmp_path: Path, ranks: Ranks, form: Form) -> None:
    ranks.run(2, save_engine, str(tmp_path), 3)
    run = loaded(tmp_path, form=form)
    checkpoint = ckpt.open_checkpoint(tmp_path)
    for name, parameter in run[0].named_parameters():
        assert np.array_equal(checkpoint.read(name), parameter.detach().numpy()), name
        for state, value in run[1].state.get(parameter, {}).items():
            wanted = STEPS if state == "step" else checkpoint.read(name, state)
            assert np.array_equal(value.numpy(), wanted), (name, state)
    assert run[1].param_groups[0]["betas"] == (0.9, 0.999)
    assert take_step(run, BATCHES[STEPS]) == pytest.approx(plain_loss(), rel=1e-5)


@pytest.mark.usefixtures("alone")
def test_values_of_the_client_state_are_found(tmp_path: Path, ranks: Ranks) -> None:
    ranks.run(1, save_engine, str(tmp_path), 0)
    state = {"epoch": 0, "seen": {"a.b": [0, 0]}}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(state, storage_reader=uni3d.dcp.StorageReader(tmp_path))
    assert state == {"epoch": 2, "seen": {"a.b": [1, 2]}}


def test_it_is_a_checkpoint_like_any_other(tmp_path: Path, ranks: Ranks) -> None:
    from uni3d.cli import app

    held = ranks.run(2, save_fsdp, str(tmp_path), NESTED)[0]
    for command in ("verify", "inspect", "doctor"):
        words = [command, str(tmp_path), *(["--world-size", "4"] if command == "doctor" else [])]
        with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as done:
            app(words)
        assert command == "doctor" or not done.value.code, out.getvalue()
    group = zarr.open_group(tmp_path / f"global_step{STEPS}", mode="r")
    for name, state in [("encode.weight", "exp_avg_sq"), ("out.bias", "exp_avg")]:
        assert np.array_equal(group[f"atoms/{name}/{state}"][...], held[f"{state}/{name}"].numpy())
    assert np.array_equal(group["atoms/fixed.weight/fp32"][...], held["model/fixed.weight"].numpy())
    assert group["atoms/calls/value"][...] == STEPS
    checkpoint = ckpt.open_checkpoint(tmp_path)
    assert "decode.weight" not in checkpoint.atoms, "it is tied"
    weights = uni3d.get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert torch.equal(weights["decode.weight"], held["model/encode.weight"])


# --- what the ranks write --------------------------------------------------------------------------------


def save_replicated(folder: str) -> tuple[int, int]:
    """Save a model that every rank has whole; return the bytes in its arrays, and those written."""
    run = trained()
    report = save(state_of(run), folder).report
    infos = ckpt.open_checkpoint(folder).arrays.values()
    return sum(info.nbytes + 4 * len(info.sums) for info in infos), report.bytes_written


def test_replicas_are_written_once(tmp_path: Path, ranks: Ranks) -> None:
    found = ranks.run(2, save_replicated, str(tmp_path))
    assert found[0] == found[1]
    expected, written = found[0]
    assert written == expected


def save_groups(folder: str) -> tuple[int, int]:
    """Save a model that each of two groups of two ranks shards; return bytes as `save_replicated`."""
    run = trained(sharded=(2, 2))
    report = save(state_of(run), folder).report
    assert_equal(everything(loaded(folder, sharded=True)), everything(run))
    infos = ckpt.open_checkpoint(folder).arrays.values()
    return sum(info.nbytes + 4 * len(info.sums) for info in infos), report.bytes_written


@pytest.mark.slow
def test_groups_that_hold_the_same_write_it_once(tmp_path: Path, ranks: Ranks) -> None:
    ((expected, written),) = set(ranks.run(4, save_groups, str(tmp_path)))
    assert written == expected


def save_and_go_on(folder: str) -> dict[str, Any]:
    """Save in the background while training goes on; return what was held at the save."""
    run, batch = trained(sharded=True), BATCHES[STEPS]
    own = dist.new_group(backend="gloo")  # as DCP's own collectives need one
    held = everything(run)
    writer = uni3d.dcp.StorageWriter(folder)
    saving = dcp.async_save(state_of(run), storage_writer=writer, process_group=own)
    done = torch.tensor(0.0)
    while not done:  # on all ranks: each takes the same steps
        take_step(run, batch)
        done = torch.tensor(float(saving.done()))
        dist.all_reduce(done, dist.ReduceOp.MIN)
    saving.result()
    dist.barrier()
    return held


def test_training_goes_on_during_an_async_save(tmp_path: Path, ranks: Ranks) -> None:
    held = ranks.run(2, save_and_go_on, str(tmp_path))[0]
    assert ckpt.open_checkpoint(tmp_path).manifest["aliases"] == {"decode.weight": "encode.weight"}
    assert_equal(everything(loaded(tmp_path)), held)


@pytest.mark.slow
def test_an_async_save_by_a_process(tmp_path: Path) -> None:
    """Both saves are of one state, so that they have the same arrays."""
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).parents[2] / "support" / "dcp_process_save.py"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    here, process = (ckpt.open_checkpoint(tmp_path, tag) for tag in ("here", "process"))
    assert ckpt.compare(here, process) == []
    assert process.manifest["aliases"] == here.manifest["aliases"] == {"decode.weight": "encode.weight"}


class Uneven(nn.Module):
    """Rows that three ranks don't divide: with five, one has fewer; with two, one has none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)


def save_uneven(folder: str, world: int) -> dict[str, torch.Tensor]:
    from torch.distributed.fsdp import fully_shard

    model = seeded(Uneven)
    fully_shard(model)
    save({"net": model.state_dict()}, folder, "t")
    return {name: full(p) for name, p in model.named_parameters()}


def test_uneven_shards_and_weights_alone(tmp_path: Path, ranks: Ranks) -> None:
    held = ranks.run(3, save_uneven, str(tmp_path), 3)[0]
    checkpoint = ckpt.open_checkpoint(tmp_path, "t")
    assert checkpoint.manifest["optimizer"] is None
    for name, tensor in held.items():
        assert np.array_equal(checkpoint.read(name), tensor.numpy())


def save_as_subgroup(folder: str) -> None:
    """Save from ranks 1 and 2 of 3."""
    group = dist.new_group([1, 2])
    if dist.get_rank():
        run = trained_alone()
        dcp.save(state_of(run), storage_writer=uni3d.dcp.StorageWriter(folder), process_group=group)


def trained_alone() -> Any:
    from dcp_runs import make_run

    run = make_run()
    for batch in BATCHES[:STEPS]:
        run[0](*batch).backward()
        run[1].step()
        run[1].zero_grad()
    return run


def test_a_subgroup_saves(tmp_path: Path, ranks: Ranks) -> None:
    ranks.run(3, save_as_subgroup, str(tmp_path))
    assert_equal(everything(loaded(tmp_path)), everything(trained_alone()))
