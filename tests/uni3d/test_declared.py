"""What a model says of itself stands in its checkpoints, whatever topology wrote them."""

from __future__ import annotations

import pytest
from model import GPT, GPTConfig
from ranks import Ranks
from small_models import OwnLoss, make_engine
from tied_gpt import TIED, gpt_engine

import ckpt


def save_case(place: tuple[int, int, int, int], folder: str) -> None:
    engine = gpt_engine(*place)
    engine.save_checkpoint(folder)
    engine.wait_for_checkpoint()


@pytest.mark.parametrize("place", [(1, 1, 1, 0), (2, 1, 2, 1)])
def test_how_it_may_be_split(ranks: Ranks, tmp_path, place):
    ranks.run(place[0] * place[1] * place[2], save_case, place, str(tmp_path))
    model = GPT(GPTConfig(**TIED))
    assert ckpt.open_checkpoint(tmp_path).manifest["model"]["declared"] == {
        "class": "GPT",
        "pipeline_layers": model.pipeline_layers,
        "tp_plan": model.tp_plan,
        "tp_units": model.tp_units,
    }


@pytest.mark.usefixtures("alone")
def test_a_model_that_says_nothing(tmp_path):
    engine = make_engine(OwnLoss())
    engine.save_checkpoint(tmp_path)
    engine.wait_for_checkpoint()
    assert ckpt.open_checkpoint(tmp_path).manifest["model"]["declared"] == {"class": "OwnLoss"}
