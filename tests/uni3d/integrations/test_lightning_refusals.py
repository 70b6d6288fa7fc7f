"""`UniversalCheckpoint`: what it can't save or resume is refused by its name."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import nn
from torch.utils.data import DataLoader

pytest.importorskip("lightning")

from lightning.pytorch import Callback, Trainer
from lightning_runs import BATCH, Net, Pool, data, fit_case

import ckpt
from uni3d.integrations.lightning import UniversalCheckpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fresh_ranks"),
]  # ranks take many seconds to import Lightning


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
    ({"callbacks": [Two()]}, "optimizers 0 and 1 both have a parameter of shape"),
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
    (
        {"interval": "plateau"},
        "the checkpoint's scheduler isn't this run's ReduceLROnPlateau: its keys",
    ),
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


def again_case(run: str) -> tuple[int, list[str]]:
    """Fit, and fit on with the same Trainer, which doesn't resume; then resume in an order that was drawn."""
    keeper, module = UniversalCheckpoint(run), Net(3, "step")
    loader = DataLoader(data(), BATCH, shuffle=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(
            max_steps=6, callbacks=[keeper], accelerator="cpu", devices=1, plugins=[Pool()], **quiet
        )
        trainer.fit(module, loader)
        trainer.fit_loop.epoch_loop.max_steps = 7
        trainer.fit(module, loader)
        assert keeper.restored is None
        trainer = Trainer(
            max_steps=8, callbacks=[keeper], accelerator="cpu", devices=1, plugins=[Pool()], **quiet
        )
        trainer.fit(module, loader)
    assert keeper.restored is not None
    return trainer.global_step, [str(warning.message) for warning in told]


def test_a_drawn_order_is_warned_about(ranks: Ranks, tmp_path: Path) -> None:
    step, told = ranks.run(1, again_case, str(tmp_path / "run"))[0]
    assert step == 8
    assert any("samples may come twice or not at all in this epoch" in text for text in told)
