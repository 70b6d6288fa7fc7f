"""Runs of Lightning for tests: a module, a callback with a state, and the same run in plain PyTorch."""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from uni3d.integrations.lightning import UniversalCheckpoint

WIDTH, SAMPLES, BATCH, EPOCHS = 8, 48, 12, 3
STEPS_PER_EPOCH = SAMPLES // BATCH


def layers(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, WIDTH), nn.LayerNorm(WIDTH))


def data() -> TensorDataset:
    inputs = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, inputs.roll(1, 1).square())


def optimizer_and_rate(model: nn.Module, interval: str) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1, eps=0.01, foreach=False)
    if interval == "plateau":
        return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)


class Net(LightningModule):
    def __init__(self, seed: int, interval: str) -> None:
        super().__init__()
        self.layers, self.interval = layers(seed), interval
        self.losses: dict[int, float] = {}
        self.kept: dict[str, Any] = {}
        self.validated: list[int] = []
        self.keep: Any = torch.tensor([1, 2])

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is None or isinstance(self.layers[0].weight, DTensor):
            return
        if mesh["tensor_parallel"].size() > 1:
            styles = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.layers, mesh["tensor_parallel"], styles)
        fully_shard(self.layers, mesh=mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.layers(batch[0]), batch[1])
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        batch_number = self.current_epoch * self.trainer.num_training_batches + batch_idx
        self.losses[batch_number] = mean.item()
        return loss

    def on_validation_start(self) -> None:
        self.validated.append(self.global_step)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = nn.functional.mse_loss(self.layers(batch[0]), batch[1])
        self.log("val", loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer, schedule = optimizer_and_rate(self, self.interval)
        interval = "epoch" if self.interval == "plateau" else self.interval
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": interval, "monitor": "val"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"seen": [self.global_step, 0.5], "value": self.keep}
        if isinstance(self.keep, str):
            checkpoint["mine"]["value"] = checkpoint[self.keep]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.kept = checkpoint["mine"]


class Manual(Net):
    """Two optimizers, with a schedule each, that `training_step` steps itself."""

    def __init__(self, seed: int, interval: str) -> None:
        super().__init__(seed, interval)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for item in (*self.optimizers(), *self.lr_schedulers()):
            item.step()
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        return loss

    def configure_optimizers(self) -> Any:
        return two_optimizers(self)


def two_optimizers(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """Return two optimizers and their schedules."""
    first, *rest = model.parameters()
    sgd = torch.optim.SGD([first], lr=0.05, momentum=0.9, foreach=False)
    adamw = torch.optim.AdamW(rest, lr=0.02, eps=0.01, foreach=False)
    schedules = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.8), torch.optim.lr_scheduler.StepLR(adamw, 3)
    return [sgd, adamw], list(schedules)


class Count(Callback):
    """Stops after some step, and keeps what JSON can't."""

    def __init__(self, stop: int | None) -> None:
        self.stop, self.steps, self.best = stop, 0, torch.tensor(0.0)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.steps += 1
        trainer.should_stop |= trainer.global_step == self.stop

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "best": torch.tensor(float("inf")), "worst": float("-inf")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.best = state["steps"], state["best"]


class Pool(LightningEnvironment):
    """Ranks that are there already, with a process group."""

    creates_processes_externally = True

    def local_rank(self) -> int:
        return dist.get_rank()


def strategy(name: str) -> Any:
    if name == "ddp":
        return DDPStrategy()
    if name == "fsdp":
        return ModelParallelStrategy(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)
    if name == "fsdp x tp":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=2)
    return "auto"


def fit_case(name: str, run: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Fit; return the losses by batch, the whole weights, and Lightning's counters."""
    options = dict(options)
    interval, stop = options.pop("interval", "step"), options.pop("stop", None)
    keeper = UniversalCheckpoint(run, **options.pop("keeper", {}))
    module, count = options.pop("module", Net)(seed, interval), Count(stop)
    module.keep = options.pop("keep", module.keep)
    make, fit = options.pop("loader", DataLoader), options.pop("fit", {})
    batch_size = options.pop("batch", None)
    parts = {"fsdp x tp": 2, "plain": 1}.get(name, dist.get_world_size())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers, logs and loaders
        try:
            trainer = Trainer(
                accelerator="cpu",
                devices=1 if name == "plain" else dist.get_world_size(),
                strategy=strategy(name),
                plugins=[Pool()],
                callbacks=[keeper, count, *options.pop("callbacks", [])],
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                **{"enable_checkpointing": False, "num_sanity_val_steps": 0, **options},
            )
            sampler = DistributedSampler(data(), 1, 0) if name == "plain" else None
            rows = batch_size or BATCH // parts
            loader = make(data(), rows, shuffle=sampler is None, sampler=sampler)
            trainer.fit(module, loader, DataLoader(data(), BATCH // parts), **fit)
        finally:
            rank_zero_only.rank = 0
    return {
        "losses": module.losses,
        "weights": {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in module.named_parameters()
        },
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "logged": trainer.fit_loop.epoch_loop._batches_that_stepped,
        "seen": count.steps,
        "best": count.best.item(),
        "kept": module.kept,
        "validated": module.validated,
        "states": [callback.state_dict() for callback in trainer.callbacks[2:]],
    }


def alone_by_two() -> dict[int, float]:
    """Train with two optimizers in plain PyTorch; return the losses by batch."""
    model, losses = nn.ModuleDict({"layers": layers(3)}), []
    optimizers, schedules = two_optimizers(model)
    sampler = DistributedSampler(data(), 1, 0)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for inputs, targets in DataLoader(data(), BATCH, sampler=sampler):
            loss = nn.functional.mse_loss(model["layers"](inputs), targets)
            loss.backward()
            for item in (*optimizers, *schedules):
                item.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
            losses.append(loss.item())
    return dict(enumerate(losses))


def alone(interval: str = "step", accumulate: int = 1) -> tuple[dict[int, float], dict[str, Tensor]]:
    """Train in plain PyTorch; return the losses by batch, and the weights."""
    model, losses, number = nn.ModuleDict({"layers": layers(3)}), {}, 0
    optimizer, schedule = optimizer_and_rate(model, interval)
    sampler = DistributedSampler(data(), 1, 0)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for inputs, targets in DataLoader(data(), BATCH, sampler=sampler):
            loss = nn.functional.mse_loss(model["layers"](inputs), targets)
            (loss / accumulate).backward()
            losses[number] = loss.item()
            number += 1
            if number % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                if interval == "step":
                    schedule.step()
        if interval == "epoch":
            schedule.step()
        elif interval == "plateau":
            with torch.no_grad():
                inputs, targets = data().tensors
                schedule.step(nn.functional.mse_loss(model["layers"](inputs), targets))
    return losses, dict(model.named_parameters())
