"""Folders that accelerate and transformers' Trainer have written are read and loaded in place."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from commands import answer
from hf_models import hf
from marks import slow
from models import Net, global_batches, seeded
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler, StepLR

import uni3d.deepspeed
from uni3d.importers.in_place import ForeignCheckpoint
from uni3d.manifest import RunManifest

if multiprocessing.parent_process() is not None:
    uni3d.deepspeed.install()  # in ranks, for others' cases: it can't come after accelerate

from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import FullyShardedDataParallelPlugin

pytestmark = pytest.mark.usefixtures("fresh_ranks")

BEFORE, AFTER = 3, 3
Arrays = dict[str, Tensor]


def prepare() -> None:
    """Make accelerate see this process as a rank that can shard, as on GPUs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.pop("ACCELERATE_USE_FSDP", None)


def held(model: nn.Module, optimizer: Any) -> Arrays:
    """Return copies of all weights and moments, whole."""

    def whole(tensor: Tensor) -> Tensor:
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()

    found = {}
    for name, p in model.named_parameters():
        name = name.removeprefix("module.")
        found[f"fp32/{name}"] = whole(p)
        found |= {f"{key}/{name}": whole(optimizer.state[p][key]) for key in ("exp_avg", "exp_avg_sq")}
    return found


def stored(checkpoint: Any) -> Arrays:
    return {f"{key.state}/{key.atom}": torch.from_numpy(checkpoint.read(*key)) for key in checkpoint.arrays}


def assert_same(found: Arrays, wanted: Arrays) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


# --- accelerate ---------------------------------------------------------------------------------------------


def with_decay(model: nn.Module) -> torch.optim.Optimizer:
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == two] for two in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.02, eps=0.01, foreach=False)


def train(model: Any, optimizer: Any, schedule: Any, first: int, last: int) -> list[float]:
    """Take steps on this rank's part of each global batch; return the losses over all of it."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    losses = []
    for x, y in global_batches(BEFORE + AFTER)[first:last]:
        loss = F.mse_loss(model(x.chunk(world)[rank]), y.chunk(world)[rank])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item() / world)
    return losses


def made(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer, LRScheduler]:
    optimizer = with_decay(model)
    return model, optimizer, StepLR(optimizer, 2, 0.5)


def accelerate_case(folder: str, form: str) -> tuple[Arrays, list[float], list[float]]:
    """Train under accelerate, save_state, and train on; then load that into a model of FSDP2's own."""
    prepare()
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Linear"],
        state_dict_type=form,
    )
    accel = Accelerator(fsdp_plugin=plugin, step_scheduler_with_optimizer=False)
    model, optimizer, schedule = accel.prepare(*made(seeded(Net)))
    assert any(isinstance(p, DTensor) for p in model.parameters())
    train(model, optimizer, schedule, 0, BEFORE)
    accel.save_state(folder)
    arrays = held(model, optimizer)
    losses = train(model, optimizer, schedule, BEFORE, BEFORE + AFTER)
    other, mine, its_schedule = made(fully_shard(seeded(Net)))
    restored = uni3d.load(folder, model=other, optimizer=mine, lr_scheduler=its_schedule)
    assert len(restored.report.restored) == len(arrays)
    assert_same(held(other, mine), arrays)
    return arrays, losses, train(other, mine, its_schedule, BEFORE, BEFORE + AFTER)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("form", [slow("SHARDED_STATE_DICT"), slow("FULL_STATE_DICT")])
def test_accelerates_folder(ranks: Ranks, tmp_path: Path, form: str) -> None:
    folder = tmp_path / "state"
    arrays, losses, again = ranks.run(2, accelerate_case, str(folder), form)[0]
    assert again == pytest.approx(losses, rel=1e-6)
    found = uni3d.open(folder)
    assert isinstance(found, ForeignCheckpoint)
    assert found.source.kind == ("accelerate" if form == "SHARDED_STATE_DICT" else "torch")
    assert_same(stored(found), arrays)
    manifest = RunManifest.of(found)
    assert (manifest.step, manifest.scheduler["last_epoch"]) == (BEFORE, BEFORE)  # type: ignore[index]
    assert [group["weight_decay"] for group in manifest.optimizer.groups] == [0.1, 0.0]  # type: ignore[union-attr]
    assert "random_states_0.pkl, random_states_1.pkl: not read (states of random" in " ".join(found.left_out)
    model, optimizer, schedule = made(seeded(Net))
    uni3d.load(folder, model=model, optimizer=optimizer, lr_scheduler=schedule)
    assert train(model, optimizer, schedule, BEFORE, BEFORE + AFTER) == pytest.approx(losses, rel=1e-5)
    answer("import", folder, tmp_path / "run")
    assert answer("diff", folder, tmp_path / "run")["differences"] == []


# --- transformers -------------------------------------------------------------------------------------------


class Keep(hf.TrainerCallback):
    """Keeps what the model and the optimizer hold when the Trainer has saved."""

    arrays: Arrays

    def on_save(self, args: Any, state: Any, control: Any, **has: Any) -> None:
        self.arrays = held(has["model"], has["optimizer"])


def trainer(folder: str, **options: Any) -> Any:
    hf.utils.logging.disable_progress_bar()
    ids = torch.randint(0, hf_models.VOCABULARY, (12, 6), generator=torch.Generator().manual_seed(1))
    args = hf.TrainingArguments(
        folder,
        per_device_train_batch_size=2,
        max_steps=BEFORE,
        save_steps=BEFORE,
        learning_rate=0.02,
        weight_decay=0.1,
        warmup_steps=2,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        **options,
    )
    if args.fsdp:
        PartialState().distributed_type = DistributedType.MULTI_GPU
    data = [{"input_ids": row, "labels": row} for row in ids]
    made = hf.Trainer(hf_models.make("llama"), args, train_dataset=data)
    made.remove_callback(hf.PrinterCallback)
    return made


def trainer_case(folder: str, sharded: bool) -> Arrays:
    prepare()
    fsdp = {"fsdp": True, "fsdp_config": {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
    run = trainer(folder, **(fsdp if sharded else {}))
    keep = Keep()
    run.add_callback(keep)
    run.train()
    assert sharded == any(isinstance(p, DTensor) for p in run.model.parameters())
    return keep.arrays


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore:.*in this run, .* in the checkpoint")
@pytest.mark.parametrize("sharded", [True, False])
def test_the_trainers_folder(hf_ranks: Ranks, tmp_path: Path, sharded: bool) -> None:
    arrays = hf_ranks.run(2, trainer_case, str(tmp_path / "out"), sharded)[0]
    folder = tmp_path / "out" / f"checkpoint-{BEFORE}"
    assert (folder / "pytorch_model_fsdp_0").is_dir() == sharded
    with pytest.raises(uni3d.CheckpointError, match=r"did you mean .*/checkpoint-3\?"):
        uni3d.open(tmp_path / "out")
    found = uni3d.open(folder)
    weights = {name: tensor for name, tensor in arrays.items() if sharded or name.startswith("fp32/")}
    assert_same(stored(found), weights)
    assert RunManifest.of(found).step == BEFORE
    assert (RunManifest.of(found).optimizer is not None) == sharded, "else its numbers may be anyone's"
    made = trainer(str(tmp_path / "next"))
    made.create_optimizer_and_scheduler(BEFORE)
    made.optimizer.param_groups[0]["lr"] = 0.5
    uni3d.load(folder, model=made.model, optimizer=made.optimizer, lr_scheduler=made.lr_scheduler)
    assert_same(held(made.model, made.optimizer), arrays)
    assert made.optimizer.param_groups[0]["lr"] == made.lr_scheduler.get_last_lr()[0]
    assert made.lr_scheduler.last_epoch == BEFORE
