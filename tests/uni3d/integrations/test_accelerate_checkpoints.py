"""Loops over an Accelerator save and resume by uni3d: their steps are those of plain PyTorch."""

import multiprocessing
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from marks import matrix, slow
from models import WIDTH, Net, seeded
from page_diffs import script
from ranks import RankError, Ranks
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import uni3d.deepspeed

if multiprocessing.parent_process() is not None:
    uni3d.deepspeed.install()  # in ranks, for others' cases: it can't come after accelerate

from accelerate import Accelerator, DataLoaderConfiguration, DistributedType, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import FullyShardedDataParallelPlugin

from uni3d.integrations.accelerate import AcceleratorCheckpointer

pytestmark = pytest.mark.usefixtures("fresh_ranks")

GLOBAL_BATCH, SAMPLES, EPOCHS, SEED = 6, 30, 2, 11
STEPS = SAMPLES // GLOBAL_BATCH


class Average:
    """A registered object: a number, a list and a tensor."""

    def __init__(self) -> None:
        self.value, self.names, self.mean = 0.0, ["a"], torch.zeros(3)

    def update(self, loss: float) -> None:
        self.value = 0.9 * self.value + 0.1 * loss
        self.names.append(str(len(self.names)))
        self.mean = 0.5 * self.mean + loss

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "names": self.names, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.names, self.mean = state["value"], state["names"], state["mean"]


def data() -> TensorDataset:
    inputs = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, inputs.square().mean(1, keepdim=True))


def accelerator(
    sharded: bool, accumulation: int = 1, by_optimizer: bool = False, version: int = 2
) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    plugin = None
    if sharded:
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU  # it shards on these alone
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=version,
            use_orig_params=True if version == 1 else None,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Linear"],
        )
    return Accelerator(
        cpu=not sharded,
        fsdp_plugin=plugin,
        gradient_accumulation_steps=accumulation,
        step_scheduler_with_optimizer=by_optimizer,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )


Found = tuple[list[float], dict[str, Tensor], dict[str, Any], float]


def accelerate_case(run: str, sharded: bool, stop: int, seed: int) -> Found:
    """Train until a step; return the mean losses, the weights, the registered object and the rate."""
    ranks = dist.get_world_size()
    accel = accelerator(sharded)
    model: Any = seeded(Net)
    torch.manual_seed(seed)  # of the order of samples
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.02, eps=0.01, foreach=False)
    schedule: Any = StepLR(optimizer, 2, 0.5)
    loader: Any = DataLoader(data(), batch_size=GLOBAL_BATCH // ranks, shuffle=True)
    model, optimizer, loader, schedule = accel.prepare(model, optimizer, loader, schedule)
    average = Average()
    accel.register_for_checkpointing(average)
    keeper = AcceleratorCheckpointer(accel, run)
    restored = keeper.restore()
    place = {"epoch": 0, "batches": 0} if restored is None else restored.client_state
    losses = []
    for epoch in range(place["epoch"], EPOCHS):
        loader.set_epoch(epoch)
        number = first = place["batches"] if epoch == place["epoch"] else 0
        for number, (x, y) in enumerate(accel.skip_first_batches(loader, first), start=first + 1):
            loss = F.mse_loss(model(x), y)
            accel.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(accel.reduce(loss.detach(), "mean").item())
            average.update(losses[-1])
            if epoch * STEPS + number == stop:
                keeper.save(stop, client_state={"epoch": epoch, "batches": number}).wait()
                break
        if epoch * STEPS + number == stop:
            break
    named = {n.removeprefix("module."): p.detach() for n, p in model.named_parameters()}
    assert sharded == any(isinstance(p, DTensor) for p in named.values())
    weights = {n: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for n, p in named.items()}
    return losses, weights, average.state_dict(), optimizer.param_groups[0]["lr"]


def plain() -> Found:
    """Train in plain PyTorch, on the samples in accelerate's order, which `seed + epoch` decides."""
    model, average, losses = seeded(Net), Average(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, eps=0.01, foreach=False)
    schedule = StepLR(optimizer, 2, 0.5)
    inputs, targets = data().tensors
    for epoch in range(EPOCHS):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(SEED + epoch))
        for rows in order.split(GLOBAL_BATCH):
            loss = F.mse_loss(model(inputs[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            average.update(loss.item())
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return losses, weights, average.state_dict(), schedule.get_last_lr()[0]


RESIZES = [
    slow(2, False, 3, False, 3),
    slow(3, False, 2, True, 7),
    matrix(2, True, 3, True, 7),
    matrix(3, True, 1, False, 5),
]
"""Ranks and whether they shard, before a break and after it, and the steps before it."""


@pytest.mark.parametrize(("ranks_before", "sharded_before", "ranks_after", "sharded_after", "stop"), RESIZES)
def test_the_steps_are_those_of_plain_pytorch(
    ranks: Ranks,
    tmp_path: Path,
    ranks_before: int,
    sharded_before: bool,
    ranks_after: int,
    sharded_after: bool,
    stop: int,
) -> None:
    losses, weights, average, rate = plain()
    run = str(tmp_path / "run")
    for found, _, _, _ in ranks.run(ranks_before, accelerate_case, run, sharded_before, stop, SEED):
        assert found == pytest.approx(losses[:stop], rel=1e-5)
    # Another seed, so that the order comes from the checkpoint.
    for found, held, kept, last in ranks.run(ranks_after, accelerate_case, run, sharded_after, -1, SEED + 1):
        assert found == pytest.approx(losses[stop:], rel=1e-5)
        assert last == pytest.approx(rate)
        assert kept["names"] == average["names"]
        assert kept["value"] == pytest.approx(average["value"], rel=1e-5)
        torch.testing.assert_close(kept["mean"], average["mean"], rtol=1e-5, atol=1e-6)
        for name, weight in weights.items():
            torch.testing.assert_close(held[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def random_case(run: str) -> None:
    accel = accelerator(False)
    accel.prepare(seeded(Net))
    keeper = AcceleratorCheckpointer(accel, run, async_save=False)
    torch.manual_seed(7 + dist.get_rank())
    keeper.save(1)
    expected = torch.rand(3)
    again = AcceleratorCheckpointer(accel, run)
    assert again.restore() is not None
    assert torch.equal(torch.rand(3), expected)
    assert again.step == 1


def test_each_rank_draws_on(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, random_case, str(tmp_path / "run"))


def schedule_case(run: str) -> None:
    accel = accelerator(False, by_optimizer=True)
    model: Any = seeded(Net)
    optimizer: Any = torch.optim.SGD(model.parameters())
    accel.prepare(model, optimizer, StepLR(optimizer, 2))
    keeper = AcceleratorCheckpointer(accel, run, async_save=False)
    if keeper.restore() is None:
        keeper.save(1)


def test_a_schedule_that_counts_ranks_is_not_resized(ranks: Ranks, tmp_path: Path) -> None:
    for _ in range(2):
        ranks.run(2, schedule_case, str(tmp_path / "run"))
    with pytest.raises(
        RankError, match="takes 3 steps of the scheduler for each of the optimizer's here, 2 in"
    ):
        ranks.run(3, schedule_case, str(tmp_path / "run"))


def by_two(model: nn.Module) -> tuple[list[Any], list[Any]]:
    first, *rest = model.parameters()
    sgd = torch.optim.SGD([first], lr=0.05, momentum=0.9, foreach=False)
    adamw = torch.optim.AdamW(rest, lr=0.02, eps=0.01, foreach=False)
    return [sgd, adamw], [StepLR(sgd, 2, 0.5), StepLR(adamw, 3, 0.5)]


def by_one(model: nn.Module) -> tuple[list[Any], list[Any]]:
    return [torch.optim.AdamW(model.parameters(), lr=0.02, eps=0.01, foreach=False)], []


def descend(
    model: nn.Module, optimizers: list[Any], schedules: list[Any], steps: list[int], accel: Any = None
) -> list[float]:
    """Take steps on samples in order, with an Accelerator on this rank's part; return the mean losses."""
    losses, (rank, ranks) = [], (accel.process_index, accel.num_processes) if accel else (0, 1)
    for step in steps:
        x, y = (part[step * 6 : step * 6 + 6][rank::ranks] for part in data().tensors)
        loss = F.mse_loss(model(x), y)
        (accel.backward if accel else torch.autograd.backward)(loss)
        for item in (*optimizers, *schedules):
            item.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.append((accel.reduce(loss.detach(), "mean") if accel else loss).item())
    return losses


def steps_case(run: str, flat: bool, steps: list[int]) -> list[float]:
    """Train by FSDP1 or by two optimizers, from a checkpoint if there is one, and save."""
    with warnings.catch_warnings(action="ignore"):  # accelerate: FSDP1 is deprecated
        accel = accelerator(flat, version=1)
        model: Any = seeded(Net)
        if flat:
            accel.state.device = torch.device("cpu")  # FSDP1 takes cpu:0 for another device
            model = accel.prepare(model)
            assert isinstance(model, FullyShardedDataParallel)
        optimizers, schedules = (by_one if flat else by_two)(model)
        if not flat:
            model = accel.prepare(model)
        optimizers, schedules = [*map(accel.prepare, optimizers)], [*map(accel.prepare, schedules)]
        keeper = AcceleratorCheckpointer(accel, run, async_save=False)
        keeper.restore()
        losses = descend(model, optimizers, schedules, steps, accel)
        keeper.save(steps[-1] + 1)
    return losses


@pytest.mark.parametrize("flat", [False, slow(True)], ids=["two optimizers", "FSDP1"])
def test_steps_go_on_with_more_ranks(ranks: Ranks, tmp_path: Path, flat: bool) -> None:
    model: Any = seeded(Net)
    expected = descend(model, *(by_one if flat else by_two)(model), [0, 1, 2, 3])
    found = ranks.run(2, steps_case, str(tmp_path), flat, [0, 1])[0]
    found += ranks.run(3, steps_case, str(tmp_path), flat, [2, 3])[0]
    assert found == pytest.approx(expected, rel=1e-5)


def page_case(folder: str, changed: bool, samples: int) -> list[float]:
    """Run the page's script over the first samples."""
    accel, losses = accelerator(False), []
    model, ranks = seeded(Net), dist.get_world_size()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, eps=0.01, foreach=False)
    part = torch.utils.data.Subset(data(), range(samples))
    loader: Any = DataLoader(part, batch_size=GLOBAL_BATCH // ranks)

    def train_step(model: nn.Module, optimizer: Any, batch: Any) -> None:
        loss = F.mse_loss(model(batch[0]), batch[1])
        accel.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accel.reduce(loss.detach(), "mean").item())

    names = {"accelerator": accel, "model": model, "optimizer": optimizer, "loader": loader}
    os.chdir(folder)
    exec(script("accelerate: the Accelerator", changed=changed), names | {"train_step": train_step})
    return losses


def test_the_pages_script(ranks: Ranks, tmp_path: Path) -> None:
    for name in ("plain", "kept"):
        (tmp_path / name).mkdir()
    expected = ranks.run(2, page_case, str(tmp_path / "plain"), False, SAMPLES)[0]
    assert len(expected) == STEPS
    found = ranks.run(2, page_case, str(tmp_path / "kept"), True, 2 * GLOBAL_BATCH)[0]
    found += ranks.run(3, page_case, str(tmp_path / "kept"), True, SAMPLES)[0]
    assert found == pytest.approx(expected, rel=1e-5)


# --- refusals ------------------------------------------------------------------------------------------


class Closure(Average):
    def state_dict(self) -> dict[str, Any]:
        return {"update": self.update}


def unsaved_state(run: str) -> None:
    accel = accelerator(False)
    accel.prepare(seeded(Net))
    accel.register_for_checkpointing(Average(), Closure())
    AcceleratorCheckpointer(accel, run).save(1)


def two_models(run: str) -> None:
    accel = accelerator(False)
    accel.prepare(seeded(Net), seeded(Net))
    AcceleratorCheckpointer(accel, run)


def nothing_prepared(run: str) -> None:
    AcceleratorCheckpointer(accelerator(False), run)


def registered_later(run: str) -> None:
    accel = accelerator(False)
    accel.prepare(seeded(Net))
    keeper = AcceleratorCheckpointer(accel, run)
    accel.register_for_checkpointing(Average())
    keeper.save(1)


def between_steps(run: str) -> None:
    accel = accelerator(False, accumulation=2)
    model = accel.prepare(seeded(Net))
    keeper = AcceleratorCheckpointer(accel, run)
    with accel.accumulate(model):
        accel.backward(model(torch.ones(1, WIDTH)).sum())
        keeper.save(1)


def not_registered_then(run: str) -> None:
    accel = accelerator(False)
    accel.prepare(seeded(Net))
    AcceleratorCheckpointer(accel, run, async_save=False).save(1)
    accel.register_for_checkpointing(Average())
    AcceleratorCheckpointer(accel, run).restore()


REFUSED: dict[Callable[[str], None], str] = {
    unsaved_state: r"objects\['registered_1'\] \(Closure\): state/update is a method; a checkpoint keeps",
    two_models: "has prepared 2 models; expected one",
    nothing_prepared: "has prepared 0 models; expected one",
    registered_later: "has prepared or registered more since: make the AcceleratorCheckpointer after",
    between_steps: "gradients are being accumulated, and a checkpoint doesn't keep them",
    not_registered_then: r"missing in the checkpoint: objects\['registered_0'\]",
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.__name__)
def test_refusals(ranks: Ranks, tmp_path: Path, case: Callable[[str], None]) -> None:
    with pytest.raises(RankError, match=REFUSED[case]) as error:
        ranks.run(2, case, str(tmp_path / "run"))
    assert "rank 1:" in str(error.value)
