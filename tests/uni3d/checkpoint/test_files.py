"""Files of a checkpoint hold a whole array, or the part of it that one rank writes."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from models import OwnLoss, global_batches, make_engine, save_and_wait, seeded, train, whole
from ranks import RankError, Ranks
from torch import Tensor, nn

import ckpt


class Wide(OwnLoss):
    """A model with a weight of 4 MiB, of which each of two ranks writes a chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(1024, 1024, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return super().forward(x, y) + self.wide.weight[0].square().mean()


def save_case(run: Path, files: str) -> Any:
    engine = make_engine(seeded(Wide), zero=1, config={"checkpoint": {"files": files}})
    train(engine, global_batches(1))
    save_and_wait(engine, run)
    return whole(engine.module)


def load_case(run: Path) -> Any:
    engine = make_engine(seeded(Wide), zero=3, micro=1)
    engine.load_checkpoint(run)
    return whole(engine.module)


@pytest.mark.parametrize(("files", "count"), [("auto", 1), ("array", 1), ("writer", 2)])
def test_a_file_for_each_array_or_for_each_writer(
    ranks: Ranks, tmp_path: Path, files: str, count: int
) -> None:
    saved = ranks.run(2, save_case, tmp_path, files)[0]
    (folder,) = tmp_path.glob("global_step1/atoms/wide.weight/exp_avg")
    assert len(list(folder.glob("c.*"))) == count
    assert ckpt.verify(ckpt.open_checkpoint(tmp_path)) == []
    loaded = ranks.run(3, load_case, tmp_path)[0]
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def mounted_otherwise_case(run: Path) -> None:
    chosen = ["array", "writer"][dist.get_rank()] if dist.is_initialized() else "array"
    with mock.patch("ckpt.files_for", return_value=chosen):
        save_case(run, "auto")


def test_ranks_on_other_mounts_are_told(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankError) as refused:
        ranks.run(2, mounted_otherwise_case, tmp_path)
    message = "the run's folder is on another kind of file system on rank 1 than on rank 0; mount it alike"
    assert str(refused.value).count(message) >= 2, "on both ranks"
    assert not list(tmp_path.iterdir())
