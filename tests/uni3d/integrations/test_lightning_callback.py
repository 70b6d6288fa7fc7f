"""`UniversalCheckpoint`: a Lightning run goes on with other ranks and another strategy, as uninterrupted."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from marks import slow
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

pytest.importorskip("lightning")

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only

import ckpt
from uni3d.integrations.lightning import UniversalCheckpoint
from uni3d.manifest import RunManifest

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
    module, count = Net(seed, interval), Count(stop)
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


MID = {"keeper": {"every_n_steps": 5}, "stop": 7}
"""Ends after step 7, in an epoch, and leaves a checkpoint of step 5."""
PAIRS = [
    (2, "ddp", 3, "fsdp"),
    slow(3, "fsdp", 2, "ddp"),
    slow(4, "fsdp x tp", 2, "ddp"),
    slow(2, "ddp", 4, "fsdp x tp"),
    slow(2, "fsdp", 1, "plain"),
    slow(1, "plain", 2, "ddp"),
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
    slow({"max_epochs": 1, "interval": "epoch"}, {}, 4),
    slow({"max_epochs": 2, "interval": "plateau"}, {}, 8),
    slow({"max_steps": 8}, {}, 8),  # Lightning restarts otherwise if steps are its limit
    slow({"max_steps": 6}, {}, 6),
    slow({"max_steps": 3, "accumulate_grad_batches": 2}, {"accumulate_grad_batches": 2}, 6),
    slow({"interval": "epoch", **MID}, {}, 5),
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_loaders_with_a_state_go_on(ranks: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("torchdata")
    run = str(tmp_path / "run")
    ranks.run(2, with_stateful_case, run, 3, 7)
    states = RunManifest.of(ckpt.open_checkpoint(run)).data.states
    assert [state["value"]["loaders"][0]["_num_yielded"] for state in states] == [1, 1]
    for result in ranks.run(2, with_stateful_case, run, 8, None):
        check(result, alone("epoch"), first=5)


# --- what is refused ----------------------------------------------------------------------------------------


def refused_case(run: str, seed: int, options: dict[str, Any]) -> str:
    try:
        fit_case("plain", run, seed, {"max_epochs": 2, **options})
    except (ckpt.CheckpointError, ValueError, KeyError) as error:
        return str(error)
    return "nothing was refused"


class Two(Callback):
    """Makes the module's optimizers several."""

    def setup(self, trainer: Trainer, pl_module: Net, stage: str) -> None:
        pl_module.automatic_optimization = False
        pl_module.configure_optimizers = lambda: [adam(pl_module), adam(pl_module)]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters())


REFUSED = [
    ({"callbacks": [Two()]}, "configure_optimizers returns 2 optimizers, and a checkpoint keeps one"),
    ({"callbacks": [UniversalCheckpoint("x")]}, "the Trainer has 2 callbacks UniversalCheckpoint"),
    ({"keep": (1, 2)}, "the Trainer's state['hooks']['mine']['value'] is a tuple"),
    ({"keep": torch.zeros(300_000)}, "['value'] is a tensor of 1,200,000 bytes; up to 1,048,576 are kept"),
    ({"keep": "state_dict"}, "state_dict: UniversalCheckpoint's hooks see epoch, global_step"),
    ({"keep": {1: 2}}, "['value'] has the key 1; keys must be strings"),
    ({"keeper": {"every_n_step": 1}}, "unknown key 'checkpoint.every_n_step'"),
    ({"keeper": {"every_n_steps": 0}}, "every_n_steps must be a positive int or None; got 0"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=[said[-30:] for _, said in REFUSED])
def test_what_is_refused(ranks: Ranks, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    assert said in ranks.run(1, refused_case, str(tmp_path / "run"), 3, options)[0]


RESUMES = [
    ({"batch": 6}, "the checkpoint is of batch 2 of an epoch of 4 batches, and an epoch now has 8"),
    ({"fit": {"ckpt_path": "PATH"}}, "leave ckpt_path out to resume the run"),
    ({"interval": "plateau"}, "the checkpoint has no ReduceLROnPlateau, and configure_optimizers returns a"),
]


@pytest.mark.parametrize(("options", "said"), RESUMES, ids=[said[-30:] for _, said in RESUMES])
def test_a_resume_that_is_refused(ranks: Ranks, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    run = str(tmp_path / "run")
    ranks.run(1, fit_case, "plain", run, 3, {"max_steps": 2})
    if "fit" in options:
        ranks.run(
            1,
            fit_case,
            "plain",
            run + "-2",
            3,
            {"max_steps": 2, "enable_checkpointing": True, "default_root_dir": str(tmp_path)},
        )
        options = {"fit": {"ckpt_path": str(next(tmp_path.rglob("*.ckpt")))}}
    assert said in ranks.run(1, refused_case, run, 3, options)[0]
