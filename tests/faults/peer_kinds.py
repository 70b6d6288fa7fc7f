"""Libraries that save a training run, each used as its documentation shows, and uni3d among them.

All save the same model and its AdamW. `next` saves a checkpoint under a new name beside an older one, `over`
under the name that an older one has.
"""

import copy
import logging
import os
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

Arrays = dict[str, np.ndarray]
WAYS = ("next", "over")
STATES = ("exp_avg", "exp_avg_sq", "step")


class Trainer:
    """A model and its optimizer, with other numbers after each step."""

    def __init__(self, steps: int) -> None:
        torch.manual_seed(steps)  # so that no weight of a blank one is one that was saved
        self.model: Any = make_model()
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-3 * (steps + 1))
        self.steps = steps
        self.checkpoints: Any = None
        if steps:
            learn(self.model, self.optimizer)

    def arrays(self) -> Arrays:
        """Return all that training goes on from."""
        found = {}
        for name, parameter in self.model.named_parameters():
            found[name] = parameter.detach().numpy()
            for key in STATES:
                found[f"{name}/{key}"] = self.optimizer.state[parameter][key].numpy()
                assert key == "step" or found[f"{name}/{key}"].shape == tuple(parameter.shape)
        return found | {"group": settings(self.optimizer)}


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 40), nn.LayerNorm(40))


def learn(model: Any, optimizer: Any) -> None:
    """Take a step, so that there are moments."""
    model(torch.randn(4, 64)).pow(3).mean().backward()
    optimizer.step()


def settings(optimizer: Any) -> np.ndarray:
    """Return the settings of an optimizer's one group."""
    (group,) = optimizer.param_groups
    return np.array([group["lr"], *group["betas"], group["eps"], group["weight_decay"]])


class Peer:
    """A library: how it saves, which checkpoint its reader takes, and how it loads."""

    name = ""
    package = "torch"
    """Package of which the version counts."""
    slow = 1
    """Faults of the others for one of this one."""

    def title(self) -> str:
        number = version(self.package).partition("+")[0]
        return (
            f"{self.name} {number}"
            if self.name.lower() == self.package
            else f"{self.name} ({self.package} {number})"
        )

    def trainer(self, steps: int) -> Any:
        """Make what is saved, after so many steps, or what is loaded into, after none."""
        return Trainer(steps)

    def warm(self, run: Path) -> None:
        """Save and load once, so that processes forked from this one have imported everything."""
        self.save(run, "warm", self.trainer(1))
        self.load(run, "warm", self.trainer(0))

    def go_on(self, run: Path, tag: str, trainer: Any) -> None:
        """Make the trainer one that goes on with the run, where that makes a difference."""

    def save(self, run: Path, tag: str, trainer: Any) -> None:
        raise NotImplementedError

    def load(self, run: Path, tag: str, trainer: Any) -> None:
        raise NotImplementedError

    def newest(self, run: Path) -> str | None:
        """Return the tag that a reader takes: without a mark of the library's own, the last by name."""
        return max((path.stem for path in run.iterdir() if self.counts(path)), default=None)

    def counts(self, path: Path) -> bool:
        """Return whether a reader takes what is in a run's folder for a checkpoint."""
        return not path.name.startswith(".")

    def is_of(self, path: str, tag: str) -> bool:
        """Return whether a file, by its path in the run, is part of a checkpoint."""
        return path.startswith(f"{tag}/")


class TorchSave(Peer):
    """`torch.save` of the state dicts into one file."""

    name = "torch.save"

    def save(self, run: Path, tag: str, trainer: Any) -> None:
        states = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
        torch.save(states, run / f"{tag}.pt")

    def load(self, run: Path, tag: str, trainer: Any) -> None:
        states = torch.load(run / f"{tag}.pt", weights_only=True)
        trainer.model.load_state_dict(states["model"])
        trainer.optimizer.load_state_dict(states["optimizer"])

    def counts(self, path: Path) -> bool:
        return path.suffix == ".pt"

    def is_of(self, path: str, tag: str) -> bool:
        return path == f"{tag}.pt"


class TorchSaveRenamed(TorchSave):
    """`torch.save` by a careful user: into another file, synced and renamed, and its folder synced."""

    name = "torch.save, synced and renamed"

    def save(self, run: Path, tag: str, trainer: Any) -> None:
        super().save(run, f"{tag}.partial", trainer)
        sync(run / f"{tag}.partial.pt")
        os.replace(run / f"{tag}.partial.pt", run / f"{tag}.pt")
        sync(run)

    def counts(self, path: Path) -> bool:
        return path.suffix == ".pt" and ".partial" not in path.name


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


class Distributed(Peer):
    """`torch.distributed.checkpoint`; a reader takes the last folder that has its `.metadata`."""

    name = "DCP"

    def save(self, run: Path, tag: str, trainer: Any) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(trainer.model, trainer.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=run / tag)

    def load(self, run: Path, tag: str, trainer: Any) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

        model, optimizer = get_state_dict(trainer.model, trainer.optimizer)
        states = {"model": model, "optimizer": optimizer}
        dcp.load(states, checkpoint_id=run / tag)
        both = {"model_state_dict": states["model"], "optim_state_dict": states["optimizer"]}
        set_state_dict(trainer.model, trainer.optimizer, **both)

    def counts(self, path: Path) -> bool:
        return (path / ".metadata").exists()


class Zarr(Peer):
    """zarr-python: a group of arrays, with the optimizer's settings as attributes."""

    name, package = "zarr-python", "zarr"

    def options(self) -> dict[str, Any]:
        """Return options of each array: the defaults."""
        return {}

    def save(self, run: Path, tag: str, trainer: Any) -> None:
        import zarr

        attributes = {"group": trainer.optimizer.param_groups[0] | {"params": None}}
        group = zarr.create_group(str(run / tag), overwrite=True, attributes=attributes)
        for name, parameter in trainer.model.named_parameters():
            group.create_array(f"{name}/fp32", data=parameter.detach().numpy(), **self.options())
            for key in STATES:
                state = trainer.optimizer.state[parameter][key].numpy()
                group.create_array(f"{name}/{key}", data=state, **self.options())

    def load(self, run: Path, tag: str, trainer: Any) -> None:
        import zarr

        group: Any = zarr.open_group(str(run / tag), mode="r")
        model, states = {}, {}
        for i, name in enumerate(trainer.model.state_dict()):
            model[name] = torch.from_numpy(np.array(group[f"{name}/fp32"][...]))
            states[i] = {key: torch.from_numpy(np.array(group[f"{name}/{key}"][...])) for key in STATES}
        settings = {**group.attrs["group"], "params": [*states]}
        trainer.model.load_state_dict(model)
        trainer.optimizer.load_state_dict({"state": states, "param_groups": [settings]})


class ZarrChecksums(Zarr):
    """zarr-python whose arrays ask for checksums."""

    name = "zarr-python, crc32c"

    def options(self) -> dict[str, Any]:
        import zarr.codecs

        return {"compressors": [zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()]}


class DeepSpeed(Peer):
    """DeepSpeed's `save_checkpoint` under ZeRO stage 1 on one rank; a reader takes what `latest` names."""

    name, package, slow = "DeepSpeed", "deepspeed", 2

    def trainer(self, steps: int) -> Any:
        """Make an engine; the process group can't be had from before a fork."""
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        import deepspeed
        import torch.distributed as dist

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return Engine(deepspeed, steps)

    def warm(self, run: Path) -> None:
        """Import alone, as an engine's threads don't live on in a forked process."""
        for name in ("engine", "zero.stage_1_and_2", "zero.muon.muon_optimizer"):
            import_module(f"deepspeed.runtime.{name}")
        assert import_module("deepspeed.ops").__compatible_ops__  # looked for once, and kept
        Trainer(1)

    def save(self, run: Path, tag: str, trainer: Any) -> None:
        trainer.engine.save_checkpoint(str(run), tag=tag)

    def load(self, run: Path, tag: str, trainer: Any) -> None:
        path, _ = trainer.engine.load_checkpoint(str(run), tag=tag)
        if path is None:
            raise FileNotFoundError("load_checkpoint returned None")

    def newest(self, run: Path) -> str | None:
        latest = run / "latest"
        return (latest.read_text().strip() or None) if latest.exists() else None


class Engine:
    """DeepSpeed's engine of the model."""

    def __init__(self, deepspeed: Any, steps: int) -> None:
        trainer = Trainer(0)
        torch.manual_seed(steps)
        batch = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 4}
        config = {**batch, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
        optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-3 * (steps + 1))
        self.engine = deepspeed.initialize(model=trainer.model, optimizer=optimizer, config=config)[0]
        for _ in range(steps):
            self.engine.backward(self.engine(torch.randn(4, 64)).pow(3).mean())
            self.engine.step()

    def arrays(self) -> Arrays:
        """Return the weights, the flat states and the settings."""
        found = {name: p.detach().numpy() for name, p in self.engine.module.named_parameters()}
        optimizer = self.engine.optimizer.optimizer
        for i, states in enumerate(optimizer.state.values()):
            found |= {f"{i}/{key}": np.array(states[key]) for key in STATES}
        return found | {"group": settings(optimizer)}


class Ours(Peer):
    """`uni3d.Checkpointer`; a reader takes what `latest` names."""

    name, package = "uni3d", "uni3d"

    def go_on(self, run: Path, tag: str, trainer: Any) -> None:
        """Resume from the tag, without which it may not be replaced, and take the numbers back."""
        states = copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict()))
        self.load(run, tag, trainer)
        trainer.model.load_state_dict(states[0])
        trainer.optimizer.load_state_dict(states[1])

    def save(self, run: Path, tag: str, trainer: Any) -> None:
        self.checkpoints(run, trainer).save(trainer.steps, tag=tag)

    def load(self, run: Path, tag: str, trainer: Any) -> None:
        self.checkpoints(run, trainer).load(tag)

    def checkpoints(self, run: Path, trainer: Any) -> Any:
        import uni3d

        if trainer.checkpoints is None:
            both = {"model": trainer.model, "optimizer": trainer.optimizer}
            trainer.checkpoints = uni3d.Checkpointer(run, **both, async_save=False)
        return trainer.checkpoints

    def newest(self, run: Path) -> str | None:
        import ckpt

        return ckpt.read_latest(run)


KINDS = (Ours, TorchSave, TorchSaveRenamed, Distributed, Zarr, ZarrChecksums, DeepSpeed)
PEERS: dict[str, Peer] = {kind.name: kind() for kind in KINDS}
